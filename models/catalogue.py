"""The page of supported models, written from the registry: `python -m xlane.models.catalogue > docs/models.md`.

Knows the registry and the families' own first words; not what is tried where (`tests/support/tiny.py`).
"""

import inspect
from collections.abc import Iterator
from types import ModuleType

from .families.hf_rope import KINDS
from .gguf import READABLE
from .gguf_architectures import ARCHITECTURES as GGUF_ARCHITECTURES
from .registry import ARCHITECTURES

HEADING = """# Models

Written from the registry by `python -m xlane.models.catalogue > docs/models.md`; a test says when it is out of date.

A model is known by `architectures` in its config.json. Every key there is understood, known to be harmless, or refused by
name; so is every tensor. A key that transformers does not read of such a model either, as published files carry, is told of at
start. All families run on one decoder, with paged KV, over every mesh that divides their key and value heads.

Each family is tried on tiny random models against transformers: the logits of prefills (in chunks, beside another
sequence) and of decodes over page borders agree to 1e-4 of the largest, with weights packed for the native CPU kernels and
without; several are also split over two devices. Each also answers through the real engine as transformers does, on one
device and over two. Two published sizes were run: SmolLM2-135M (the demo), and Llama 3.1 8B's shape with random weights (performance.md).

Of DeepSeek's keys and values the vector is kept that they are made of (latent form): 576 numbers a token and layer, whatever
the number of heads; 70 kB a token of V3 in bfloat16. Heads are split over the model axis, and that vector is whole on each of its devices.
Attention in this form is XLA's on every platform. An adapter cannot change what makes heads of it (`kv_b_proj`), which
`--quantize` leaves as it is.

Layers of experts are computed for the experts that are chosen and no others. The experts are split over all devices, those
of the data axis too, where their number divides, else over the model axis. MXFP4 weights (gpt-oss) are dequantised as they are read.

Checkpoints of GPTQ (4 and 8 bits, both conventions of zero points, `desc_act`), AWQ (`gemm`) and compressed-tensors
(`pack-quantized`, `int-quantized`) are served as they are stored: 4 bits in groups of a multiple of 32 inputs, with or without zero points,
and 8 bits without, with one scale an output or a group. Scales of 4 bits are rounded to bfloat16. FP8 weights (float8_e4m3, of
`fp8` and compressed-tensors checkpoints) are kept too, with a scale a tensor, an output or a block of 128 by 128, and converted in the
product, by the native CPU kernels as well. Where inputs do not divide into the groups, weights are dequantised as they are read; so are
8 bits with zero points, and what `desc_act` sorts in experts and in the output head. Activations are not rounded where a
checkpoint would have them rounded: that is an approximation for speed, which no weight depends on. What is left out (`ignore`,
`modules_to_not_convert`, `dynamic`) stays in full, and an option that is not understood is refused by name.

| bytes of a weight, scales included | |
|---|---|
| bfloat16 | 2 |
| int8 and FP8, a scale an output of 4096 inputs | 1.001 |
| FP8, a scale for 128 inputs of an output | 1.031 |
| int8, a scale for 128 inputs of an output (GPTQ) | 1.031 |
| int4, a scale and a floor for 32 inputs of an output | 0.625 |

`--quantize int8` and `int4` serve each of these in fewer bits, made while the weights are read: int8 with a scale for each
output, int4 with a scale and a floor for 32 inputs of each output (int8 where inputs do not divide into 32). Embeddings and output head take
8 bits with either; norms, biases, learned positions and what chooses among experts stay as they are. Logits agree to 1e-4 with
those of transformers given the same rounded weights. `--kv-cache-dtype int8` keeps keys and values in 8 bits, with a scale for
each token and head; on TPUs, where two heads of 64 fill a row, for both of them (and heads of 256 cost a copy of a layer's pools in each
launch there). What both cost and bring: performance.md.

`--lora-adapters` takes LoRA adapters in PEFT's form (safetensors) for the projections of attention and feed-forward of every
family, experts excepted, over quantised weights too. A request names one or none, those of one batch are computed in
one launch, and each answers as the model with its adapter merged does. DoRA, biases, modules that were trained whole and ranks by pattern are refused
by name. What adapters cost grows with the ranks of all slots, empty ones too: each launch reads and multiplies them all.

`--lora-adapters slots=4,rank=16` keeps slots for 4 adapters, of rank 16 at most, that come while requests run; each that is named fills
one more. `POST /v1/load_lora_adapter` with `lora_name` and `lora_path` (a directory on the server's host, or a Hub repository) fills one,
`POST /v1/unload_lora_adapter` with `lora_name` empties it, as in vLLM: nothing is compiled, and other streams go on as they were. Requests that
have begun keep their adapter to their end, and its slot with it; with `load_inplace` the new one of a name takes another slot. An engine that
dies is followed by one with the same adapters, if their files are still the same. Several processes
(`--num-processes`) and engines elsewhere (`--engine`) have their adapters from the start.

What stands above holds for every family; where one is an exception it says so. A model of any of them is also read from GGUF, under
the name that llama.cpp writes, where the table has one; Mistral and Mixtral go by `llama` there, DeepSeek-V3 by `deepseek2`.

| family | `architectures` | in GGUF | what it is |
|---|---|---|---|
"""


def markdown() -> str:
    """The whole page."""
    formats = f"""
Rotary scalings (`rope_type`): {KINDS}. Where they follow from the length of the
context (dynamic, longrope), it is the context that is served (`--max-total-tokens`), the same for all texts.

GGUF files are stored as {", ".join(READABLE)}.
"""
    return HEADING + "".join(_rows()) + formats


def _rows() -> Iterator[str]:
    names: dict[str, list[str]] = {}
    modules: dict[str, ModuleType] = {}
    for architecture, family in ARCHITECTURES.items():
        module = inspect.getmodule(family.config_from_hf)
        assert module is not None
        name = module.__name__.rsplit(".", 1)[1]
        names.setdefault(name, []).append(f"`{architecture}`")
        modules[name] = module
    for name, module in sorted(modules.items()):
        said = " ".join((module.__doc__ or "").split("\n\n")[0].split())
        files = [
            f"`{file}`" for file, known in GGUF_ARCHITECTURES.items() if f"`{known.hf_class}`" in names[name]
        ]
        yield f"| {name} | {', '.join(names[name])} | {', '.join(files)} | {said} |\n"


if __name__ == "__main__":
    print(markdown(), end="")
