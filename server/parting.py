"""How the answers to one request are parted into thinking, text and calls: by known marks, or by what the model declares.

Knows which reader it takes; how they read is theirs.
"""

from dataclasses import dataclass

from .backend import Serving
from .reader import MarkReader, Reader
from .reasoning import Markers, Splitter
from .template_reader import TemplateReader
from .tool_formats import PLAIN
from .tool_parser import ToolParser
from .tools import ToolUse


@dataclass(frozen=True, slots=True)
class Parting:
    """Makes the reader of each sequence. By default everything is text."""

    serving: Serving
    chat: bool = False
    """Whether the answers are messages, as the model's template frames them."""
    thinking: bool = False
    """Whether thinking is told apart from the answer."""
    tools: ToolUse | None = None
    """What may be called."""

    @property
    def thinks(self) -> bool:
        """Whether answers may have thinking."""
        declared = self.serving.declared
        return self.thinking and (self._markers is not None if declared is None else declared.thinks)

    @property
    def kept_ids(self) -> frozenset[int]:
        """Control tokens whose text is needed."""
        if self.chat and self.serving.declared is not None:
            return self.serving.declared.kept_ids
        kept = self._markers.special_ids if self._markers is not None else frozenset[int]()
        return kept if self.tools is None else kept | self.serving.tool_ids

    def reader(self, prompt: str, opened: bool) -> Reader:
        """What reads one sequence. `opened`: whether the prompt ends where the model's thinking has begun."""
        declared = self.serving.declared
        if self.chat and declared is not None:
            own = self.tools is not None and self.serving.tool_format is not PLAIN
            tools = {} if self.tools is None or not own else self.tools.parameters
            parser = None if own else self._parser()
            return TemplateReader(declared.template, tools, prompt, thinks=self.thinking, parser=parser)
        return MarkReader(Splitter(self._markers, opened=opened), self._parser())

    @property
    def _markers(self) -> Markers | None:
        return self.serving.markers if self.thinking else None

    def _parser(self) -> ToolParser | None:
        return None if self.tools is None else ToolParser(self.serving.tool_format, self.tools.parameters)
