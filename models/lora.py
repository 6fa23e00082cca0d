"""LoRA adapters in PEFT's form (Hu et al. 2021): what each adds to which linear map, stacked so that one launch serves them all.

An adapter changes W into W + scale * B A, of rank r. There are S slots, each for one adapter or empty. For each parameter that
an adapter may change, the A of all slots lie below each other, [S * P * r, D], and the B beside each other, [outputs, S * P * r],
where P counts the tensors that are fused in the parameter: queries, keys and values have an A each, and a B that is zero for the
others' outputs. Smaller ranks are filled up with zeros, and B holds the scale. Knows adapters' files and a family's table; not
which request has which adapter, and no arrays (`lora_weights.py`).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .checkpoint import SafetensorsSource
from .config import Lora
from .errors import CheckpointError
from .families.hf import Fields
from .hub import ADAPTER_FILES
from .weights import Recipe, refuse_if_any

CONFIG, TENSORS = ADAPTER_FILES
PREFIX = "base_model.model."
_TRAINING = (
    "task_type", "base_model_name_or_path", "auto_mapping", "revision", "inference_mode", "init_lora_weights",
    "lora_dropout", "loftq_config", "eva_config", "corda_config", "megatron_config", "megatron_core", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "peft_version", "runtime_config", "ensure_weight_tying",
    "arrow_config", "fan_in_fan_out", "qalora_group_size",
)  # fmt: skip
"""How it was trained, and what its tensors say themselves."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter, opened: its tensors have not been read."""

    name: str
    rank: int
    scale: float
    tensors: SafetensorsSource
    digest: str
    """Of its files."""

    @classmethod
    def open(cls, name: str, folder: Path) -> "Adapter":
        """Raises CheckpointError and UnsupportedModel, naming the file and what is not understood."""
        where = folder / CONFIG
        try:
            said = json.loads(where.read_bytes())
        except FileNotFoundError:
            raise CheckpointError(f"{where} is missing; an adapter has one") from None
        except ValueError as error:
            raise CheckpointError(f"{where} is not valid JSON: {error}") from None
        if not isinstance(said, dict):
            raise CheckpointError(f"{where} holds no JSON object")
        rank, scale = _read(Fields(said, str(where)))
        if not (folder / TENSORS).is_file():
            raise CheckpointError(f"{folder / TENSORS} is missing; adapters are read from safetensors only")
        with (folder / TENSORS).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(name, rank, scale, SafetensorsSource([folder / TENSORS]), f"{digest} {scale}")

    def tensor(self, weight: str, part: str) -> str:
        """The tensor of a linear map's `lora_A` or `lora_B`, by the name of its weight; it need not be there."""
        return f"{PREFIX}{weight.removesuffix('.weight')}.{part}.weight"

    def changes(self, weight: str) -> bool:
        """Whether it changes this tensor of the model."""
        return self.tensor(weight, "lora_A") in self.tensors.names()


def _read(fields: Fields) -> tuple[int, float]:
    """Rank and scale of adapter_config.json."""
    fields.one_of("peft_type", fields.text("peft_type", default="LORA"), "LORA")
    fields.one_of("bias", fields.text("bias", default="none"), "none")
    for key in ("use_dora", "lora_bias", "use_qalora"):
        fields.one_of(key, fields.flag(key, False), False)
    for key in ("rank_pattern", "alpha_pattern", "loftq_config"):
        fields.one_of(key, fields.table(key), {})
    for key in ("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication"):
        fields.one_of(key, fields.names(key), ())
    fields.skip(*_TRAINING)
    rank, alpha = fields.integer("r", 8), fields.number("lora_alpha", 8.0)
    by = math.sqrt(rank) if fields.flag("use_rslora", False) else rank
    fields.finish()
    return rank, alpha / by


Maps = Mapping[str, tuple[Recipe, ...]]
"""By the path of each linear map that adapters may change: what its weight may be made of, by the names that adapters call it, all
tensors outputs first, as PEFT's are whatever the weight's layout. However it is made, as many tensors are fused in it."""


def changeable(table: Mapping[str, Recipe], layers: int) -> Maps:
    """All of a family's."""
    return {
        path.replace("{i}", str(layer)).removesuffix(".weight"): tuple(
            replace(made, transposed=False) for made in recipe.of_layer(str(layer)).alternatives
        )
        for path, recipe in table.items()
        if path.startswith("layers.{i}.") and path.endswith(".weight")
        if not recipe.by_expert and ".experts." not in path
        for layer in range(layers)
    }


def lora_of(adapters: Sequence[Adapter], maps: Maps, slots: int, rank: int) -> Lora | None:
    """What these adapters change, and with `slots` more to come all that may be changed with at most `rank`; None for neither.

    Args:
        adapters: those that are there from the start, in the first slots.
        maps: see `changeable`.
        slots: kept for others.
        rank: of those.

    Raises CheckpointError for what cannot be changed.
    """
    if not adapters and not slots:
        return None
    names = [adapter.name for adapter in adapters]
    if len(set(names)) < len(names):
        raise CheckpointError(f"two adapters have one name: {', '.join(names)}")
    check_known(adapters, maps)
    return Lora(
        names=tuple(names),
        digests=tuple(adapter.digest for adapter in adapters),
        slots=len(adapters) + slots,
        rank=max([*(adapter.rank for adapter in adapters), *([rank] if slots else [])]),
        maps=tuple(
            (path, len(made[0].names))
            for path, made in maps.items()
            if slots
            or any(adapter.changes(name) for adapter in adapters for one in made for name in one.names)
        ),
    )


def check_known(adapters: Sequence[Adapter], maps: Maps) -> None:
    """Raise CheckpointError for tensors of adapters that change none of these maps."""
    known = {
        adapter.tensor(name, part)
        for adapter in adapters
        for made in maps.values()
        for one in made
        for name in one.names
        for part in ("lora_A", "lora_B")
    }
    refuse_if_any(
        [
            f"{adapter.tensors.where(name)}: tensor {name} changes nothing of this model that an adapter may change here (the "
            "projections of attention and feed-forward, experts excepted)"
            for adapter in adapters
            for name in adapter.tensors.names()
            if name not in known
        ]
    )
