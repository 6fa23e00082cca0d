"""From named tensors in files to the parameters of a decoder: which tensors make each one, checked, then read in slices.

A format (safetensors, GGUF) implements `TensorSource`; a table of `Recipe`s says what each parameter path is made of;
`Weights` joins the two into the `WeightSource` that the loader reads. Knows no file format, no family and no device.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from .config import StoredWeight
from .errors import CheckpointError
from .spec import ParamSpec, Quant

MOST_REPORTED = 10
"""Problems listed in one error; the rest are counted."""

ORDER = ".order"
"""What the path of a parameter ends with that says in which order the inputs of a weight are."""

Index = tuple[slice, ...]
"""One slice a dimension, step 1, as `jax.make_array_from_callback` hands out."""


class Rows(Protocol):
    """Named arrays that are read by rows."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Row-major, outputs first (GGUF lists its dimensions the other way round)."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Entries start … stop-1 of the first axis, touching only their bytes. The caller may keep the array."""
        ...


class TensorSource(Rows, Protocol):
    """Named arrays of one checkpoint, in the layout of the table's names. Safe to read from several threads."""

    def names(self) -> Iterable[str]:
        """Every tensor that the files hold."""
        ...

    def where(self, name: str) -> str:
        """The file a tensor lies in, for messages."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """What `read_rows` returns; for a quantised tensor what it is dequantised to.

        Raises CheckpointError, naming file, tensor and type, if this type cannot be read.
        """
        ...


class LeafSource(Protocol):
    """Linear maps that a checkpoint has in few bits, as the engine keeps them."""

    def holds(self, name: str, quant: Quant, group: int) -> bool:
        """Whether a tensor is one of these and this leaf, with a scale for so many inputs (0 for all), holds it."""
        ...

    def leaf(self, quant: Quant, part: int) -> Rows:
        """One of the arrays of `spec.Quantized`, of every such tensor; its rows are the outputs."""
        ...

    def order(self, name: str) -> np.ndarray:
        """int32[D]: the order in which the leaf has the inputs."""
        ...

    def is_nothing(self, name: str) -> bool:
        """A tensor that is there for nothing."""
        ...


class WeightSource(Protocol):
    """Parameters by spec, wherever they come from."""

    def check(self, specs: Sequence[ParamSpec]) -> None:
        """Raise CheckpointError unless these specs and the tensors fit each other exactly."""
        ...

    def read(self, spec: ParamSpec, index: Index) -> np.ndarray:
        """A slice of the logical array (`spec.shape`) in `spec.dtype`. Safe to call from several threads."""
        ...

    def by_entry(self, spec: ParamSpec) -> bool:
        """Whether `read` reads whole entries of the first axis, however little of one is asked for."""
        ...

    def read_parts(self, spec: ParamSpec, index: Index) -> list[np.ndarray]:
        """Rows of each array of a weight that is kept `as_stored`; the last slice of `index` is the whole. Safe as `read`."""
        ...


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one parameter is made of. `{i}` in a name stands for the layer."""

    kind: Literal["plain", "qkv", "gate_up", "alternating", "paired"]
    """`plain`: one tensor. `qkv`: queries, keys and values grouped by kv head, [K, G+2, H, …]. `gate_up`: gate, then up,
    [2, F, …]. `alternating`: experts whose rows are gate and up in turns, [X, 2, F, …]. `paired`: all experts' gates, then all
    their ups, [X, 2, F, …]."""
    names: tuple[str, ...]
    """Of `qkv` and `gate_up`, the last name stands for one tensor with all parts that are left below each other. `{e}` stands for the expert:
    then this is what each entry of the parameter's first axis is made of."""
    merged: int = 1
    """Of `plain`: the tensor has this many of the parameter's first axes as one, [K * … * H, …] for [K, …, H, …]."""
    transposed: bool = False
    """The tensor is stored inputs first (GPT-2)."""
    otherwise: "Recipe | None" = None
    """What it is made of where the first of `names` is not in the checkpoint."""

    def of_layer(self, layer: str) -> "Recipe":
        """This recipe with its layer filled in."""
        otherwise = self.otherwise and self.otherwise.of_layer(layer)
        return replace(self._filled("{i}", layer), otherwise=otherwise)

    def of_expert(self, expert: int) -> "Recipe":
        """This recipe with its expert filled in."""
        return self._filled("{e}", str(expert))

    @property
    def alternatives(self) -> "tuple[Recipe, ...]":
        """All that it may be, the first choice first."""
        return (self, *(self.otherwise.alternatives if self.otherwise else ()))

    @property
    def by_expert(self) -> bool:
        """Each expert has tensors of its own."""
        return "{e}" in self.names[0]

    def _filled(self, mark: str, value: str) -> "Recipe":
        return replace(self, names=tuple(name.replace(mark, value) for name in self.names))

    def parts(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The shapes, outputs first, of what a parameter of this logical shape is put together from."""
        if self.kind == "plain":
            return ((math.prod(shape[: self.merged]), *shape[self.merged :]),)
        if self.kind == "gate_up":
            return (shape[1:],) * 2
        if self.kind == "alternating":
            return ((shape[0], 2 * shape[2], *shape[3:]),)
        if self.kind == "paired":
            return ((shape[0], *shape[2:]),) * 2
        kv_heads, members, head_dim, *rest = shape
        queries, keys = (kv_heads * (members - 2) * head_dim, *rest), (kv_heads * head_dim, *rest)
        return (queries, keys, keys)

    def sources(self, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        """Every tensor that a parameter of this logical shape is made of, with the shape it must have."""
        if not self.by_expert:
            return list(zip(self.names, self.source_shapes(shape), strict=True))
        experts = (self.of_expert(expert) for expert in range(shape[0]))
        return [source for expert in experts for source in expert.sources(shape[1:])]

    def source_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The shape each source must have for a parameter of this logical shape."""
        parts, last = self.parts(shape), len(self.names) - 1
        parts = (*parts[:last], (sum(part[0] for part in parts[last:]), *parts[last][1:]))
        return tuple((*part[:-2], part[-1], part[-2]) for part in parts) if self.transposed else parts


def plain(name: str, merged: int = 1, *, transposed: bool = False) -> Recipe:
    """One tensor as it is, or with its first axes to be told apart."""
    return Recipe("plain", (name,), merged, transposed)


def qkv(*names: str, transposed: bool = False) -> Recipe:
    """Three projections (of queries, keys, values) fused, grouped by kv head; or one or two tensors that have them in this order."""
    return Recipe("qkv", names, transposed=transposed)


def gate_up(*names: str) -> Recipe:
    """Two feed-forward projections, stacked; or one tensor that has them below each other."""
    return Recipe("gate_up", names)


def alternating(name: str, *, transposed: bool = False) -> Recipe:
    """One tensor with all experts' gates and what they multiply, row by row in turns."""
    return Recipe("alternating", (name,), transposed=transposed)


def paired(*names: str) -> Recipe:
    """Two tensors, one with all experts' gates and one with what they multiply."""
    return Recipe("paired", names)


def either(recipe: Recipe, otherwise: Recipe) -> Recipe:
    """The first where the checkpoint has its tensors, else the second."""
    return replace(recipe, otherwise=otherwise)


class Weights:
    """A `WeightSource` out of named tensors and a table of recipes."""

    def __init__(
        self,
        tensors: TensorSource,
        table: Mapping[str, Recipe],
        ignored: Iterable[str] = (),
        leaves: LeafSource | None = None,
    ) -> None:
        """Join a format's tensors with a family's table.

        Args:
            tensors: the files.
            table: parameter path, with `{i}` for the layer, to recipe.
            ignored: regular expressions (whole name) of tensors that need not be used.
            leaves: those of `tensors` that the checkpoint has in few bits.
        """
        self._tensors, self._leaves = tensors, leaves
        self._present = frozenset(tensors.names())
        self._table = table
        self._missing_prefix = _missing_prefix(self._present, table)
        self._ignored = tuple(re.compile(pattern) for pattern in ignored)

    def check(self, specs: Sequence[ParamSpec]) -> None:
        """Every spec mapped, every tensor present, well shaped and used. Raises CheckpointError listing what is not."""
        used: set[str] = set()
        problems: list[str] = []
        for spec in specs:
            recipe = self._find(spec.path)
            if recipe is None:
                problems.append(f"parameter {spec.path} has no entry in the weight table")
                continue
            if spec.path.endswith(ORDER):
                continue
            used.update(name for name, _ in recipe.sources(spec.shape))
            problems += self._misfits(spec, recipe)
        for name in sorted(self._present - used):
            whole = self._missing_prefix + name
            if self._leaves is not None and self._leaves.is_nothing(name):
                continue
            if not any(p.fullmatch(name) or p.fullmatch(whole) for p in self._ignored):
                problems.append(
                    f"{self._tensors.where(name)}: tensor {name} is used by no parameter of this model"
                )
        refuse_if_any(problems)

    def read(self, spec: ParamSpec, index: Index) -> np.ndarray:
        """A slice of the logical array in `spec.dtype`. Call `check` first."""
        recipe = self._entry(spec)
        if self._leaves is not None and spec.path.endswith(ORDER):
            return self._order(recipe, self._leaves)[index]
        return assemble(recipe, self._tensors, spec, index)

    def by_entry(self, spec: ParamSpec) -> bool:
        """See `WeightSource.by_entry`: all experts are one tensor, of which an expert is a row."""
        recipe = self._entry(spec)
        in_one = recipe.kind in ("alternating", "paired") or (recipe.kind == "plain" and recipe.merged == 1)
        return len(spec.shape) > 2 and in_one and not recipe.by_expert

    def read_parts(self, spec: ParamSpec, index: Index) -> list[np.ndarray]:
        """The arrays of a weight that is kept as it is stored. Call `check` first."""
        recipe = self._entry(spec)
        if self._leaves is None or spec.quant is None:
            raise CheckpointError(f"parameter {spec.path} is not stored in few bits")
        whole = (*index[:-1], slice(None))
        return [
            assemble(recipe, self._leaves.leaf(spec.quant, number), part, whole)
            for number, part in enumerate(spec.parts)
        ]

    def stores(self, weight: StoredWeight) -> bool:
        """Whether a weight is stored as config.json says; of FP8, where that does not name all that is left in full."""
        recipe, leaves = self._find(weight.path), self._leaves
        if weight.quant != "fp8" or recipe is None or leaves is None:
            return True
        return all(leaves.holds(name, weight.quant, weight.group) for name in recipe.of_expert(0).names)

    def _order(self, recipe: Recipe, leaves: LeafSource) -> np.ndarray:
        """Of the inputs, the same for all that are fused in one parameter."""
        first, *others = ((name, leaves.order(name)) for name in recipe.names)
        for name, order in others:
            if (order != first[1]).any():
                raise CheckpointError(
                    f"{self._tensors.where(name)}: {name} and {first[0]}, which are multiplied at once, have their inputs in "
                    "different orders, which is not supported"
                )
        return first[1]

    def _entry(self, spec: ParamSpec) -> Recipe:
        recipe = self._find(spec.path)
        if recipe is None:
            raise CheckpointError(f"parameter {spec.path} has no entry in the weight table")
        return recipe

    def _find(self, path: str) -> Recipe | None:
        path = path.removesuffix(ORDER) + ".weight" if path.endswith(ORDER) else path
        recipe = entry(self._table, path)
        if recipe is None:
            return None
        *others, last = map(self._without_prefix, recipe.alternatives)
        return next((one for one in others if one.of_expert(0).names[0] in self._present), last)

    def _without_prefix(self, recipe: Recipe) -> Recipe:
        names = tuple(name.removeprefix(self._missing_prefix) for name in recipe.names)
        return replace(recipe, names=names)

    def _misfits(self, spec: ParamSpec, recipe: Recipe) -> list[str]:
        problems: list[str] = []
        for name, expected in recipe.sources(spec.shape):
            if name not in self._present:
                problems.append(f"tensor {name} is missing (needed for {spec.path})")
                continue
            where, found = self._tensors.where(name), self._tensors.shape(name)
            if found != expected:
                problems.append(
                    f"{where}: tensor {name} has shape {found}, the configuration asks for {expected}"
                )
            kept = spec.quant if spec.as_stored else None
            if kept and (self._leaves is None or not self._leaves.holds(name, kept, spec.group)):
                problems.append(
                    f"{where}: tensor {name} is not in the few bits that config.json's quantization_config says it is in"
                )
            try:
                self._tensors.dtype(name)
            except CheckpointError as error:
                problems.append(str(error))
        return problems


def entry(table: Mapping[str, Recipe], path: str) -> Recipe | None:
    """What a table says of a parameter, its layer filled in."""
    match = re.match(r"layers\.(\d+)\.", path)
    recipe = table.get("layers.{i}." + path[match.end() :] if match else path)
    return recipe.of_layer(match[1]) if recipe and match else recipe


def _missing_prefix(present: frozenset[str], table: Mapping[str, Recipe]) -> str:
    """What the names of a checkpoint lack that was saved without its head ("transformer." in GPT-2's), seen by the embedding."""
    recipe = table.get("embed.weight")
    if recipe is None or recipe.names[0] in present:
        return ""
    first, _, rest = recipe.names[0].partition(".")
    return first + "." if rest in present else ""


def assemble(recipe: Recipe, tensors: Rows, spec: ParamSpec, index: Index) -> np.ndarray:
    """Read a slice of one parameter from its sources, in `spec.dtype`."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, spec.shape, strict=True)]
    dtype = np.dtype(spec.dtype)
    if recipe.by_expert:
        one = replace(spec, shape=spec.shape[1:])
        experts = range(*bounds[0])
        return np.stack([assemble(recipe.of_expert(e), tensors, one, index[1:]) for e in experts])
    read = _rows_of(recipe, tensors, spec.shape)
    if recipe.kind == "plain":
        inner = spec.shape[1 : recipe.merged]
        low, high = (bound * math.prod(inner) for bound in bounds[0])
        rows = read(0, low, high).reshape(bounds[0][1] - bounds[0][0], *spec.shape[1:])
        return np.ascontiguousarray(rows[(slice(None), *index[1:])], dtype)
    if recipe.kind == "alternating":
        rows = read(0, *bounds[0])
        pairs = rows.reshape(len(rows), spec.shape[2], 2, *spec.shape[3:]).swapaxes(1, 2)
        return np.ascontiguousarray(pairs[(slice(None), *index[1:])], dtype)
    out = np.empty([stop - start for start, stop in bounds], dtype)
    if recipe.kind == "gate_up":
        for place, which in enumerate(range(*bounds[0])):
            out[place] = read(which, *bounds[1])[(slice(None), *index[2:])]
        return out
    if recipe.kind == "paired":
        for place, which in enumerate(range(*bounds[1])):
            out[:, place] = read(which, *bounds[0])[(slice(None), *index[2:])]
        return out
    # [k, parts, h, …]: which of the G queries, the key and the value lie in the slice
    first_head, last_head = bounds[0]
    group, head_dim = spec.shape[1] - 2, spec.shape[2]
    for part, (width, start) in enumerate(((group, 0), (1, group), (1, group + 1))):
        low, high = (min(max(bound - start, 0), width) for bound in bounds[1])
        if low == high:
            continue
        rows = read(part, first_head * width * head_dim, last_head * width * head_dim)
        heads = rows.reshape(last_head - first_head, width, head_dim, *spec.shape[3:])
        out[:, start + low - bounds[1][0] : start + high - bounds[1][0]] = heads[
            (slice(None), slice(low, high), *index[2:])
        ]
    return out


def _rows_of(recipe: Recipe, tensors: Rows, shape: tuple[int, ...]) -> Callable[[int, int, int], np.ndarray]:
    """What reads rows start … stop-1 of a part, wherever it lies."""
    sizes = [part[0] for part in recipe.parts(shape)]
    last = len(recipe.names) - 1

    def read(part: int, start: int, stop: int) -> np.ndarray:
        name, first = recipe.names[min(part, last)], sum(sizes[last:part])
        if not recipe.transposed:
            return tensors.read_rows(name, first + start, first + stop)
        if len(tensors.shape(name)) > 2:
            return tensors.read_rows(name, first + start, first + stop).swapaxes(-1, -2)
        whole = tensors.read_rows(name, 0, tensors.shape(name)[0])
        return whole.T[first + start : first + stop]

    return read


def refuse_if_any(problems: Sequence[str]) -> None:
    """Raise CheckpointError listing the problems, if there are any."""
    if not problems:
        return
    listed = list(problems[:MOST_REPORTED])
    if len(problems) > MOST_REPORTED:
        listed.append(f"… and {len(problems) - MOST_REPORTED} more")
    heading = "the checkpoint cannot be used: "
    raise CheckpointError(heading + (listed[0] if len(listed) == 1 else "\n  " + "\n  ".join(listed)))
