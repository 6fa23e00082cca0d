"""What `quantization_config` says of a checkpoint: which linear maps it has in few bits, and in which layout.

GPTQ, AWQ, compressed-tensors and FP8 are translated into rules on the names of modules; of MXFP4 the tensors say themselves what
they are, and of FP8 which of those are. What would change an answer and is not understood is refused by name. Activations that were to be
rounded too stay as they are: their rounding is an approximation that buys speed on hardware made for it, weights do not depend
on it, and without it the answers are nearer to those of the model that was quantised. Knows keys, and no tensors
(`bit_tensors.py`).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from .config import StoredWeight
from .errors import UnsupportedModel
from .families.hf import Fields
from .fp8 import BLOCK
from .spec import GROUP, Quant
from .weights import Recipe

Layout = Literal["gptq", "awq", "words", "bytes", "fp8"]
"""`gptq` and `awq`: as these tools write. compressed-tensors': `words` of 32 bits along the inputs, or a `byte` each. Of `fp8` the
tensors say the rest (`fp8.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a linear map is stored: weight = (value - zero point) * scale, both shared by a group of an output's inputs."""

    layout: Layout
    bits: int
    group: int
    """Inputs that share a scale; 0 for all of them."""
    symmetric: bool
    """Zero points are in the middle."""
    by_index: bool = False
    """A tensor says which group an input belongs to; else they are neighbours."""
    zero_offset: int = 0
    """What stored zero points lack: GPTQ's first format has them less one."""

    @property
    def leaf(self) -> Quant | None:
        """The engine's own form that holds such weights without loss but the scales' rounding; None if there is none, and they
        are dequantised."""
        if self.layout == "fp8":
            return "fp8"
        if self.bits == 4 and self.group % GROUP == 0:
            return "int4"
        return "int8" if self.bits == 8 and self.symmetric else None

    @property
    def leaf_group(self) -> int:
        """Inputs that share a scale in that form, of 8 bits; 0 for all of them."""
        return self.group if self.bits == 8 else 0


@dataclass(frozen=True, slots=True)
class Schemes:
    """How the modules of one checkpoint are stored."""

    method: str = ""
    """`quant_method`; empty for a checkpoint that is not quantised."""
    rules: tuple[tuple[re.Pattern[str], Scheme | None], ...] = ()
    """The first that matches the whole name of a module decides; None leaves it alone."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors that scale something which is not rounded here."""

    def of(self, module: str) -> Scheme | None:
        """How a module is stored; None if in full."""
        return next((scheme for pattern, scheme in self.rules if pattern.fullmatch(module)), None)

    def weights(self, table: Mapping[str, Recipe], layers: int, experts: int) -> Iterator[StoredWeight]:
        """The parameters, of a family's table, that can be kept as they are stored."""
        for path, recipe in table.items():
            linear = path.startswith("layers.") or path == "head.weight"
            weight = path.endswith(".weight") and not path.endswith(_IN_FULL)
            if not self.rules or not linear or not weight or recipe.transposed:
                continue
            for layer in range(layers) if "{i}" in path else (0,):
                one = recipe.of_layer(str(layer))
                each = [one.of_expert(e) for e in range(experts)] if one.by_expert else [one]
                modules = [name.removesuffix(".weight") for recipe in each for name in recipe.names]
                found = {self.of(module) for module in modules}
                scheme = found.pop() if len(found) == 1 else None
                # Experts have an order of inputs each, and only a `Linear` puts its own in order.
                elsewhere = one.by_expert or path == "head.weight"
                if scheme and scheme.leaf and not (scheme.by_index and elsewhere):
                    at = path.replace("{i}", str(layer))
                    yield StoredWeight(at, scheme.leaf, scheme.by_index, scheme.leaf_group)


_IN_FULL = ("router.weight", "shared_gate.weight")
"""Small, and decide much."""


def read_schemes(config: Mapping[str, Any]) -> Schemes:
    """Of a config.json. Raises UnsupportedModel, naming what is not understood."""
    fields = Fields(config).mapping("quantization_config")
    if fields is None:
        return Schemes()
    method = fields.text("quant_method", default="")
    readers = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors, "fp8": _fp8}
    if method == "mxfp4":
        return Schemes(method)
    if method not in readers:
        known = ", ".join((*readers, "mxfp4"))
        raise fields.refusal(
            "quant_method",
            method or None,
            f"weights quantised this way are not read ({known}, and GGUF files are)",
        )
    schemes = readers[method](fields)
    fields.finish()
    return schemes


def _fp8(fields: Fields) -> Schemes:
    """Which weights are stored so the tensors say in the end: not all that is left in full is named here."""
    fields.skip(*_FP8_HOW)
    fields.one_of("fmt", fields.text("fmt", default="e4m3"), "e4m3")
    scheme = _FP8 if fields.raw("weight_block_size") is None else _blocks(fields, "weight_block_size")
    left_out = (*fields.names("modules_to_not_convert"), *fields.names("ignored_layers"))
    rules = [(f".*{re.escape(part)}.*", None) for part in left_out]
    return _schemes("fp8", [*rules, (HEADS, None), (".*", scheme)], _kv_scales(fields))


def _blocks(fields: Fields, key: str) -> Scheme:
    """With a scale for each block, of the only size that is read."""
    fields.one_of(key, fields.raw(key), [BLOCK, BLOCK])
    return replace(_FP8, group=BLOCK)


def _gptq(fields: Fields) -> Schemes:
    fields.skip(*_GPTQ_HOW)
    version = fields.text("checkpoint_format", "format", default="gptq")
    fields.one_of("checkpoint_format", version, "gptq", "gptq_v2")
    fields.one_of("data_type", fields.text("data_type", default="int"), "int")
    fields.one_of("pack_dtype", fields.text("pack_dtype", default="int32"), "int32")
    group = fields.size_or_all("group_size", 128)
    scheme = Scheme(
        layout="gptq",
        bits=_bits(fields, "bits", 4),
        group=group,
        symmetric=fields.flag("sym", True),
        by_index=fields.flag("desc_act", False) and group > 0,
        zero_offset=1 if version == "gptq" else 0,
    )
    rules: list[tuple[str, Scheme | None]] = []
    for pattern, changes in fields.table("dynamic").items():
        if not pattern.startswith("-:"):
            raise fields.refusal("dynamic", {pattern: changes}, "modules with bits of their own are not read")
        rules.append((f"(?:{pattern[2:]}).*", None))
    if not fields.flag("lm_head", False):
        rules.append((HEADS, None))
    inside = fields.names("modules_in_block_to_quantize")
    rules += [(rf".*\.{re.escape(module)}", scheme) for module in inside] or [(".*", scheme)]
    return _schemes("gptq", rules)


def _awq(fields: Fields) -> Schemes:
    fields.skip("do_fuse", "modules_to_fuse", "fuse_max_seq_len", "exllama_config")
    fields.one_of("version", fields.text("version", default="gemm").lower(), "gemm")
    fields.one_of("backend", fields.text("backend", default="autoawq"), "autoawq")
    fields.one_of("bits", fields.integer("w_bit", _bits(fields, "bits", 4)), 4)
    group = fields.size_or_all("q_group_size", fields.size_or_all("group_size", 128) or -1)
    # Without zero points they are stored all the same, and read.
    fields.flag("zero_point", True)
    scheme = Scheme(layout="awq", bits=4, group=group, symmetric=False)
    left_out = fields.names("modules_to_not_convert")
    rules = [(f".*{re.escape(part)}.*", None) for part in left_out]
    return _schemes("awq", [*rules, (HEADS, None), (".*", scheme)])


def _compressed_tensors(fields: Fields) -> Schemes:
    fields.skip("global_compression_ratio", "version")
    # Older tools wrote frozen and compressed all the same: which it is, tensors say.
    status = fields.text("quantization_status", default="compressed")
    fields.one_of("quantization_status", status, "compressed", "frozen")
    form = fields.text("format", default="pack-quantized")
    for key in ("sparsity_config", "transform_config"):
        if (how := fields.table(key)) and how.get("format") != "dense":  # which is all that there is
            raise fields.refusal(key, how, "weights kept sparse or rotated are not read")
    rules: list[tuple[str, Scheme | None]] = [(_pattern(name), None) for name in fields.names("ignore")]
    groups, numbers = fields.mapping("config_groups"), fields.table("config_groups")
    for number in numbers:
        group = groups and groups.mapping(number)
        if group is None:
            raise fields.refusal("config_groups", numbers, "an object for each group is expected")
        scheme = _group(group, form)
        rules += [
            (".*" if target == "Linear" else _pattern(target), scheme) for target in group.names("targets")
        ]
        group.finish()
    return _schemes("compressed-tensors", rules, _kv_scales(fields))


def _group(group: Fields, form: str) -> Scheme:
    """One of `config_groups`."""
    form = group.text("format", default=form)
    group.one_of("format", form, "pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    group.skip("input_activations", "output_activations")
    weights = group.mapping("weights")
    if weights is None:
        raise group.refusal("weights", None, "what is quantised must say how")
    weights.skip("observer", "observer_kwargs", "dynamic", "scale_dtype", "zp_dtype")
    kind = weights.text("type", default="int")
    if kind == "float":
        weights.one_of("num_bits", weights.integer("num_bits", 8), 8)
        weights.skip("symmetric", "group_size", "actorder")
        strategy = weights.text("strategy", default="tensor")
        weights.one_of("strategy", strategy, "tensor", "channel", "block")
        scheme = _blocks(weights, "block_structure") if strategy == "block" else _FP8
        weights.finish()
        return scheme
    weights.one_of("type", kind, "int")
    grouped = weights.size_or_all("group_size", -1)
    strategy = weights.text("strategy", default="group" if grouped else "tensor")
    weights.one_of("strategy", strategy, "tensor", "channel", "group")
    order = weights.text("actorder", default="static")
    weights.one_of("actorder", order, "static", "weight", "dynamic", "group")
    scheme = Scheme(
        layout="words" if form == "pack-quantized" else "bytes",
        bits=_bits(weights, "num_bits", 8),
        group=grouped if strategy == "group" else 0,
        symmetric=weights.flag("symmetric", True),
        by_index=order in ("dynamic", "group"),
    )
    weights.finish()
    return scheme


def _kv_scales(fields: Fields) -> tuple[str, ...]:
    """Tensors that are scales of a KV cache in 8 bits, which here has its own."""
    return (r".*\.self_attn\.[kv]_(scale|zero_point)",) if fields.table("kv_cache_scheme") else ()


def _pattern(name: str) -> str:
    """compressed-tensors' `re:…`, which matches from the start, or a whole name."""
    return f"(?:{name[3:]}).*" if name.startswith("re:") else re.escape(name)


def _bits(fields: Fields, key: str, default: int) -> int:
    bits = fields.integer(key, default)
    fields.one_of(key, bits, 4, 8)
    return bits


def _schemes(method: str, rules: list[tuple[str, Scheme | None]], ignored: tuple[str, ...] = ()) -> Schemes:
    try:
        compiled = tuple((re.compile(pattern), scheme) for pattern, scheme in rules)
    except re.error as error:
        raise UnsupportedModel(
            f"config.json: quantization_config: {error.pattern!r} is no pattern: {error}"
        ) from None
    return Schemes(method, compiled, ignored)


HEADS = "lm_head|embed_out|output"
_FP8 = Scheme(layout="fp8", bits=8, group=0, symmetric=True)
_FP8_HOW = ("activation_scheme", "scale_fmt", "dequantize", "is_checkpoint_fp8_serialized")
"""How activations are rounded, and scales were, and who should compute with them."""
_GPTQ_HOW = (
    "model_name_or_path", "model_file_base_name", "is_marlin_format", "quantizer", "meta", "dataset", "tokenizer",
    "batch_size", "use_exllama", "exllama_config", "use_cuda_fp16", "max_input_length", "cache_block_outputs",
    "block_name_to_quantize", "module_name_preceding_first_block", "model_seqlen", "pad_token_id", "backend", "method",
    "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "mse", "disable_exllama",
    "autoround_version", "iters", "lr", "minmax_lr", "nsamples", "seqlen", "enable_minmax_tuning", "enable_quanted_input",
    "enable_norm_bias_tuning", "gradient_accumulate_steps", "low_gpu_mem_usage", "low_cpu_mem_usage", "amp", "scale_dtype",
    "quant_block_list", "not_use_best_mse", "dynamic_max_gap", "train_bs", "act_bits",
)  # fmt: skip
"""How the weights were found, and who should compute with them."""
