"""Everything that can be wrong with a model, drawn once.

ModelError
├── UnsupportedModel   the architecture, or an option in its configuration, is not understood here; names it
├── CheckpointError    a weight or file is missing, duplicate, misshapen, truncated or unmapped; names file and key
├── TokenizerError     the tokenizer or its chat template cannot be read or applied
│   └── TemplateTooCostly  applying it would have taken more time or memory than it may
└── HubError           a model could not be fetched: network, no such repository or revision, no permission
"""

from typing import Literal


class ModelError(Exception):
    """Base: this model cannot be served; the message says why and what to do."""


class UnsupportedModel(ModelError):
    """The architecture, or an option in its configuration, is not one this room understands."""


class CheckpointError(ModelError):
    """The weights on disk are not what the configuration promises."""


class TokenizerError(ModelError):
    """The tokenizer files cannot be used."""


class TemplateTooCostly(TokenizerError):
    """A chat template was broken off."""

    def __init__(self, message: str, took: Literal["time", "memory"]) -> None:
        super().__init__(message)
        self.took: Literal["time", "memory"] = took
        """What it would have taken too much of."""


class HubError(ModelError):
    """The model could not be fetched."""
