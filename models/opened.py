"""A model on disk, opened: its configuration and its weights, whichever of the two forms it is stored in.

Knows which reader belongs to which form, and nothing of what either does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .checkpoint import has_weights, open_checkpoint
from .config import ModelConfig
from .gguf import GgufTensors
from .gguf_config import config_from_gguf
from .gguf_file import GgufFile
from .gguf_latent import LatentTensors
from .gguf_weights import GGUF_IGNORED, GGUF_WEIGHTS
from .lora import Adapter, changeable, lora_of
from .lora_weights import AdaptedWeights, AdapterArrays
from .registry import Family, config_from_hf, family_for, read_config, read_json
from .schemes import read_schemes
from .weights import Weights, WeightSource


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """What the engine needs of a model. Nothing large has been read yet."""

    config: ModelConfig
    source: WeightSource | None
    """None if the weights were not asked for."""


def open_model(
    path: Path,
    *,
    weights: bool = True,
    adapters: Sequence[tuple[str, str]] = (),
    adapter_slots: int = 0,
    adapter_rank: int = 0,
) -> OpenedModel:
    """Open a directory in Hugging Face's layout or a GGUF file, and adapters by name and folder, beside which so many more, of
    at most this rank, may come later. Without `weights` only the configuration is read.

    Raises UnsupportedModel, CheckpointError.
    """
    family, config, source = _open(path, weights)
    opened = [Adapter.open(name, Path(folder)) for name, folder in adapters]
    maps = changeable(family.WEIGHTS, config.layers)
    lora = lora_of(opened, maps, adapter_slots, adapter_rank)
    if lora is None or source is None:
        return OpenedModel(replace(config, lora=lora), source)
    return OpenedModel(
        replace(config, lora=lora), AdaptedWeights(source, AdapterArrays.of(lora, maps), opened)
    )


def _open(path: Path, weights: bool) -> tuple[Family, ModelConfig, Weights | None]:
    if path.is_dir():
        said = read_json(path / "config.json")
        family, config = family_for(said), read_config(path)
        if not weights and not (config.stored and has_weights(path)):
            return family, config, None
        source = open_checkpoint(path, family.WEIGHTS, family.IGNORED_TENSORS, read_schemes(said))
        config = replace(config, stored=tuple(filter(source.stores, config.stored)))
        return family, config, source if weights else None
    file = GgufFile(path)
    hf_config = config_from_gguf(file)
    family = family_for(hf_config)
    source = Weights(LatentTensors(GgufTensors(file)), GGUF_WEIGHTS, GGUF_IGNORED) if weights else None
    return family, config_from_hf(hf_config), source
