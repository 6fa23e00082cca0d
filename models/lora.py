"""LoRA adapters in PEFT's form (Hu et al. 2021): what each adds to which linear map, stacked so that one launch serves them all.

An adapter changes W into W + scale * B A, of rank r. For each parameter that any of S adapters changes, the A of all of them lie
below each other, [S * P * r, D], and the B beside each other, [outputs, S * P * r], where P counts the tensors that are fused in
the parameter: queries, keys and values have an A each, and a B that is zero for the others' outputs. Smaller ranks are filled up
with zeros, and B holds the scale. Knows adapters' files and a family's table; not which request has which adapter.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .checkpoint import SafetensorsSource
from .config import Lora
from .errors import CheckpointError
from .families.hf import Fields
from .hub import ADAPTER_FILES
from .spec import ParamSpec
from .weights import Index, Recipe, Weights, assemble, entry, refuse_if_any

CONFIG, TENSORS = ADAPTER_FILES
PREFIX = "base_model.model."
A, B = ".lora_a", ".lora_b"
"""What the paths of the two parameters of a linear map end with."""
_TRAINING = (
    "task_type", "base_model_name_or_path", "auto_mapping", "revision", "inference_mode", "init_lora_weights",
    "lora_dropout", "loftq_config", "eva_config", "corda_config", "megatron_config", "megatron_core", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "peft_version", "runtime_config", "ensure_weight_tying",
    "arrow_config", "fan_in_fan_out",
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


def lora_of(adapters: Sequence[Adapter], table: Mapping[str, Recipe], layers: int) -> Lora | None:
    """Which parameters these adapters change, None without any. Raises CheckpointError for what cannot be changed."""
    if not adapters:
        return None
    names = [adapter.name for adapter in adapters]
    if len(set(names)) < len(names):
        raise CheckpointError(f"two adapters have one name: {', '.join(names)}")
    maps: list[tuple[str, int]] = []
    known: set[str] = set()
    for path, recipe in table.items():
        if not path.startswith("layers.{i}.") or not path.endswith(".weight") or recipe.by_expert:
            continue
        if ".experts." in path:
            continue
        for layer in range(layers):
            for made in recipe.of_layer(str(layer)).alternatives:
                known.update(
                    adapter.tensor(name, part)
                    for adapter in adapters
                    for name in made.names
                    for part in ("lora_A", "lora_B")
                )
                if _changed(made, adapters):
                    maps.append((path.replace("{i}", str(layer)).removesuffix(".weight"), len(made.names)))
    refuse_if_any(
        [
            f"{adapter.tensors.where(name)}: tensor {name} changes nothing of this model that an adapter may change (the "
            "projections of attention and feed-forward, experts excepted)"
            for adapter in adapters
            for name in adapter.tensors.names()
            if name not in known
        ]
    )
    return Lora(
        names=tuple(adapter.name for adapter in adapters),
        digests=tuple(adapter.digest for adapter in adapters),
        rank=max(adapter.rank for adapter in adapters),
        maps=tuple(maps),
    )


def _changed(made: Recipe, adapters: Sequence[Adapter]) -> bool:
    return any(adapter.changes(name) for adapter in adapters for name in made.names)


class AdaptedWeights:
    """A `WeightSource` of a model with adapters."""

    def __init__(self, weights: Weights, adapters: Sequence[Adapter], table: Mapping[str, Recipe]) -> None:
        """`table` is the family's, by whose names adapters call what they change."""
        self._weights, self._adapters, self._table = weights, adapters, table
        self._rank = max(adapter.rank for adapter in adapters)

    def check(self, specs: Sequence[ParamSpec]) -> None:
        """See `WeightSource.check`; each adapter's tensors must fit the model's."""
        own = [spec for spec in specs if not spec.path.endswith((A, B))]
        self._weights.check(own)
        refuse_if_any([problem for spec in specs if spec not in own for problem in self._misfits(spec)])

    def read(self, spec: ParamSpec, index: Index) -> np.ndarray:
        """See `WeightSource.read`."""
        if spec.path.endswith(A):
            return self._down(spec)[index].astype(spec.dtype)
        if spec.path.endswith(B):
            recipe = self._recipe(spec)
            return assemble(recipe, _Up(self._adapters, recipe.names, self._rank), spec, index)
        return self._weights.read(spec, index)

    def read_parts(self, spec: ParamSpec, index: Index) -> list[np.ndarray]:
        """See `WeightSource.read_parts`."""
        return self._weights.read_parts(spec, index)

    def _recipe(self, spec: ParamSpec) -> Recipe:
        recipe = entry(self._table, spec.path[: -len(A)] + ".weight")
        if recipe is None:
            raise CheckpointError(f"parameter {spec.path} has no entry in the weight table")
        made = next(one for one in recipe.alternatives if _changed(one, self._adapters))
        # PEFT's own tensors are outputs first, whatever the weight's layout.
        return replace(made, transposed=False)

    def _misfits(self, spec: ParamSpec) -> list[str]:
        recipe, problems = self._recipe(spec), []
        sizes = [part[0] for part in recipe.parts(spec.shape)] if spec.path.endswith(B) else []
        if len(sizes) > len(recipe.names):
            sizes = [sum(sizes)]
        for adapter in self._adapters:
            for name in filter(adapter.changes, recipe.names):
                part, shape = ("lora_A", (adapter.rank, spec.shape[-1]))
                if spec.path.endswith(B):
                    part, shape = "lora_B", (sizes[recipe.names.index(name)], adapter.rank)
                tensor = adapter.tensor(name, part)
                found = adapter.tensors.shape(tensor) if tensor in adapter.tensors.names() else "missing"
                if found != shape:
                    problems.append(f"adapter {adapter.name}: tensor {tensor} is {found}, expected {shape}")
        return problems

    def _down(self, spec: ParamSpec) -> np.ndarray:
        """float32[S * P * r, D]."""
        names = self._recipe(spec).names
        out = np.zeros((len(self._adapters), len(names), self._rank, spec.shape[-1]), np.float32)
        for slot, adapter in enumerate(self._adapters):
            for part, name in enumerate(names):
                if adapter.changes(name):
                    out[slot, part, : adapter.rank] = adapter.tensors.read_rows(
                        adapter.tensor(name, "lora_A"), 0, adapter.rank
                    )
        return out.reshape(spec.shape)


@dataclass(frozen=True, slots=True)
class _Up:
    """Rows of the B of all adapters beside each other, under the names of the model's own tensors."""

    adapters: Sequence[Adapter]
    names: tuple[str, ...]
    rank: int

    def shape(self, name: str) -> tuple[int, ...]:
        """Never asked: rows lie as they are."""
        raise NotImplementedError(name)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """float32[rows, S * P * r]."""
        out = np.zeros((stop - start, len(self.adapters), len(self.names), self.rank), np.float32)
        for slot, adapter in enumerate(self.adapters):
            if adapter.changes(name):
                rows = adapter.tensors.read_rows(adapter.tensor(name, "lora_B"), start, stop)
                out[:, slot, self.names.index(name), : adapter.rank] = rows.astype(np.float32) * np.float32(
                    adapter.scale
                )
        return out.reshape(stop - start, -1)
