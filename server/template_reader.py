"""An answer read by the response template that its model declares: thinking, text, calls. Knows no JSON of any API.

Text is told as it comes, a call when it is complete: only then is it known what it is. What turns out to be no call (another
tool, another shape, an end too early) is text as it stands. A field of another name than those of `response_template.py` is
text as well. Nothing is lost but spaces round a field, and what the template has no field for.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any

from .argument_text import argument_json, as_json, kinds_of
from .call_scan import object_text
from .generate import Progress
from .reader import Told
from .region_scan import Ended, Region, RegionScan, Said
from .region_values import content_of, shaped
from .response_template import ResponseTemplate
from .tool_parser import CallArguments, CallStart, Piece, ToolParser, call_id, joined

Tools = Mapping[str, Mapping[str, Any]]
"""The schema of the arguments of each tool that may be called."""


class TemplateReader:
    """Reads one sequence."""

    def __init__(
        self,
        template: ResponseTemplate,
        tools: Tools,
        prompt: str = "",
        *,
        thinks: bool = True,
        parser: ToolParser | None = None,
    ) -> None:
        """
        Args:
            template: what the model declares.
            tools: what may be called.
            prompt: as the model sees it.
            thinks: whether thinking is told apart from the answer.
            parser: finds the calls of a model that was told in words how to make them, in its text.
        """
        self._tools = tools
        self._parser = parser
        self._thinks = thinks
        self._scan = RegionScan(template)
        self._region: Region | None = None
        """The one that is being read."""
        self._body: list[str] = []
        """Its text, where it is read as a whole."""
        self._spaces = ""
        """Those at the end of a text, which are part of it only if more follows."""
        self._told: set[bool] = set()
        """What has a text: thinking, and the answer."""
        self._starts: list[int] = []
        """Where the tokens begin."""
        self._thoughts: list[tuple[int, int | None]] = []
        """From where to where thinking stands, in characters; to None while it lasts."""
        self._answer_start: int | None = None
        self._end = 0
        """All before is told."""
        self._calls = 0
        for news in self._scan.begin(prompt):
            self._take(news)
        self._spaces, self._calls, self._answer_start, self._end = "", 0, None, 0

    @property
    def calls(self) -> int:
        """Calls so far."""
        return self._calls + (0 if self._parser is None else self._parser.calls)

    @property
    def span(self) -> tuple[int, int]:
        """The answer so far, calls included, as offsets in the whole text of the sequence."""
        return self._end if self._answer_start is None else self._answer_start, self._end

    @property
    def reasoning_tokens(self) -> int:
        """Generated tokens that are thinking, the delimiters included."""
        return sum(
            (len(self._starts) if end is None else bisect_left(self._starts, end))
            - bisect_left(self._starts, start)
            for start, end in self._thoughts
        )

    def of(self, progress: Progress) -> Told:
        """What one progress brings."""
        self._starts += [token.start for token in progress.tokens]
        reasoning: list[str] = []
        pieces: list[Piece] = []
        for news in self._scan.push(progress.text, end=progress.done is not None):
            found = self._take(news)
            if self._is_thinking(news.region):
                reasoning += (piece for piece in found if isinstance(piece, str))
            else:
                pieces += found
        if self._parser is not None:
            said = "".join(piece for piece in pieces if isinstance(piece, str))
            pieces = self._parser.push(said, end=progress.done is not None)
        return Told("".join(reasoning), [*joined(pieces)])

    def _is_thinking(self, region: Region) -> bool:
        return self._thinks and region.field.thinks

    def _take(self, news: Said | Ended) -> list[Piece]:
        region = news.region
        if region is not self._region:
            self._region, self._body, self._spaces = region, [], ""
            if self._is_thinking(region):
                self._thoughts.append((region.start - len(region.opening), None))
        if isinstance(news, Ended):
            if self._is_thinking(region):
                self._thoughts[-1] = (self._thoughts[-1][0], news.end)
            pieces = [*self._close(news)] if region.field.calls else []
            self._end = news.end
            return pieces
        if region.field.calls:
            self._body.append(news.text)
            return []
        return [text] if (text := self._text(news)) else []

    def _text(self, said: Said) -> str:
        """The part of a text that is certain, without the spaces round its field."""
        field, text = said.region.field, self._spaces + said.text
        begins = said.start - len(self._spaces)
        kept = text.rstrip() if field.arguments.get("strip", True) else text
        self._spaces = text[len(kept) :]
        first = not self._body
        if first and field.arguments.get("strip", True):
            begins += len(kept) - len(kept.lstrip())
            kept = kept.lstrip()
        self._end = begins + len(kept)
        # What the prompt says of it is no part of what is told.
        kept, begins = kept[max(0, -begins) :], max(0, begins)
        thinks = self._is_thinking(said.region)
        joined = field.join if first and thinks in self._told else ""
        if said.start < 0 or kept:
            self._body, self._told = [""], {*self._told, thinks}
        if not kept:
            return ""
        if not thinks and self._answer_start is None:
            self._answer_start = begins
        return joined + kept

    def _close(self, ended: Ended) -> Iterator[Piece]:
        """The calls that have come; what is none is a text."""
        region, body = ended.region, "".join(self._body)
        begins = region.start - len(region.opening)
        calls = self._called(region, body)
        if self._answer_start is None:
            self._answer_start = max(0, begins)
        if calls is None:
            self._told.add(False)
            yield f"{region.opening}{body}{ended.closing}"[max(0, -begins) :]
            return
        for name, arguments in calls:
            yield CallStart(self._calls, call_id(), name)
            yield CallArguments(self._calls, arguments)
            self._calls += 1

    def _called(self, region: Region, body: str) -> list[tuple[str, str]] | None:
        """Names and arguments, as JSON; None if the text is no call of these tools."""
        field = region.field
        try:
            read = content_of(body, field.content, field.arguments)
            value = shaped(read, field.transform, field.each, region.captured)
            calls = [self._call(one) for one in (value if isinstance(value, list) else [value])]
        # Whatever a model writes, in whatever shape its template's author did not think of.
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
        return calls

    def _call(self, value: Any) -> tuple[str, str]:
        """One call. Raises ValueError, TypeError, LookupError or AttributeError if it is none."""
        function = value.get("function", value)
        name, arguments = function["name"], function.get("arguments")
        schema = self._tools[name]
        if isinstance(arguments, Mapping):
            properties = schema.get("properties")
            known = properties if isinstance(properties, Mapping) else {}
            fields = [
                f"{as_json(k)}: {_json(v, kinds_of(known.get(k), schema))}" for k, v in arguments.items()
            ]
            return name, f"{{{', '.join(fields)}}}"
        text = object_text(arguments)
        if text is None:
            raise ValueError("arguments are an object")
        return name, text


def _json(value: Any, kinds: frozenset[str]) -> str:
    """The JSON of an argument of these types. A text that cannot be one was written without a type."""
    if isinstance(value, str) and "string" not in kinds:
        return argument_json(value, kinds)
    if isinstance(value, list) and "array" not in kinds:
        return f"[{', '.join(_json(one, kinds) for one in value)}]"
    return as_json(value)
