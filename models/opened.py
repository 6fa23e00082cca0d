"""A model on disk, opened: its configuration and its weights, whichever of the two forms it is stored in.

Knows which reader belongs to which form, and nothing of what either does.
"""

from dataclasses import dataclass
from pathlib import Path

from .checkpoint import open_checkpoint
from .config import ModelConfig
from .gguf import GgufTensors
from .gguf_config import config_from_gguf
from .gguf_file import GgufFile
from .registry import config_from_hf, family_for, read_config, read_json
from .schemes import read_schemes
from .weights import Weights, WeightSource


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """What the engine needs of a model. Nothing large has been read yet."""

    config: ModelConfig
    source: WeightSource | None
    """None if the weights were not asked for."""


def open_model(path: Path, *, weights: bool = True) -> OpenedModel:
    """Open a directory in Hugging Face's layout or a GGUF file. Without `weights` only the configuration is read.

    Raises UnsupportedModel, CheckpointError.
    """
    if path.is_dir():
        config = read_config(path)
        if not weights:
            return OpenedModel(config, None)
        said = read_json(path / "config.json")
        family = family_for(said)
        return OpenedModel(
            config, open_checkpoint(path, family.WEIGHTS, family.IGNORED_TENSORS, read_schemes(said))
        )
    file = GgufFile(path)
    hf_config = config_from_gguf(file)
    family = family_for(hf_config)
    source = Weights(GgufTensors(file), family.WEIGHTS, family.IGNORED_TENSORS) if weights else None
    return OpenedModel(config_from_hf(hf_config), source)
