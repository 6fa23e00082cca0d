"""What one sequence says, parted as it comes: thinking, text, calls of tools. The same for every API. Knows no JSON of any."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from .generate import Done, Ending, Progress
from .reasoning import Splitter
from .tool_parser import CallArguments, CallStart, Piece, ToolParser


class Told(NamedTuple):
    """What became certain: first thinking, then the answer in order."""

    reasoning: str
    pieces: Sequence[Piece]


@dataclass(frozen=True, slots=True)
class Call:
    """A whole call of a tool."""

    id: str
    name: str
    arguments: str
    """As JSON text; where the model was cut off, as far as it came."""


class Reader(Protocol):
    """Reads one sequence."""

    def of(self, progress: Progress) -> Told:
        """What one progress brings."""
        ...

    @property
    def span(self) -> tuple[int, int]:
        """The answer so far, calls included, as offsets in the whole text of the sequence."""
        ...

    @property
    def reasoning_tokens(self) -> int:
        """Generated tokens that are thinking."""
        ...

    @property
    def calls(self) -> int:
        """Calls so far."""
        ...


class MarkReader:
    """Reads the answer of a model whose marks are known: round its thinking, and of its calls."""

    def __init__(self, splitter: Splitter, parser: ToolParser | None = None) -> None:
        """Without a parser there are no calls in an answer, whatever it says."""
        self._splitter = splitter
        self._parser = parser

    def of(self, progress: Progress) -> Told:
        """What one progress brings."""
        reasoning, text = self._splitter.of(progress)
        if self._parser is None:
            return Told(reasoning, (text,) if text else ())
        done = progress.done
        cut = done is None or done.ending is Ending.LENGTH
        return Told(reasoning, self._parser.push(text, end=done is not None, cut=cut))

    @property
    def span(self) -> tuple[int, int]:
        """The answer so far, calls included, as offsets in the whole text of the sequence."""
        return self._splitter.span

    @property
    def reasoning_tokens(self) -> int:
        """Generated tokens that are thinking."""
        return self._splitter.reasoning_tokens

    @property
    def calls(self) -> int:
        """Calls so far."""
        return 0 if self._parser is None else self._parser.calls


def whole(pieces: Iterable[Piece]) -> list[str | Call]:
    """All pieces of an answer, put together to texts and calls, in order."""
    found: list[str | Call] = []
    for piece in pieces:
        last = found[-1] if found else None
        match piece:
            case CallStart():
                found.append(Call(piece.id, piece.name, ""))
            case CallArguments():
                assert isinstance(last, Call), "arguments follow a start"
                found[-1] = replace(last, arguments=last.arguments + piece.text)
            case str() if isinstance(last, str):
                found[-1] = last + piece
            case str():
                found.append(piece)
    return found


def calls_tools(done: Done, calls: int) -> bool:
    """Whether a sequence ended to have tools called. One that was cut off did not."""
    return calls > 0 and done.ending is not Ending.LENGTH


def openai_finish(done: Done, calls: int, *, legacy: bool = False) -> str:
    """`finish_reason`. `legacy`: of a chat that speaks of functions, not of tools."""
    if calls_tools(done, calls):
        return "function_call" if legacy else "tool_calls"
    return done.ending.openai
