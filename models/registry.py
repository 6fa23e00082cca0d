"""Which family reads which model: architecture names to family modules, and a model directory to its `ModelConfig`.

Knows config.json and generation_config.json by name; what their keys mean is the families' business.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .config import ModelConfig
from .errors import UnsupportedModel
from .families import (
    bloom,
    cohere,
    cohere2,
    deepseek_v2,
    deepseek_v3,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_bigcode,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    llama,
    mistral,
    mixtral,
    mpt,
    olmo,
    olmo2,
    opt,
    phi,
    phi3,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    santacoder,
    smollm3,
    stablelm,
    starcoder2,
)
from .families.hf import eos_ids
from .schemes import read_schemes
from .weights import Recipe


class Family(Protocol):
    """What each module in `families/` offers."""

    @property
    def WEIGHTS(self) -> Mapping[str, Recipe]:
        """Parameter path (`{i}` for the layer) to the tensors of a Hugging Face checkpoint."""
        ...

    @property
    def IGNORED_TENSORS(self) -> tuple[str, ...]:
        """Patterns of tensors that a checkpoint may hold for nothing."""
        ...

    def config_from_hf(self, config: Mapping[str, Any]) -> ModelConfig:
        """Translate config.json, refusing what is not understood."""
        ...


ARCHITECTURES: Mapping[str, Family] = {
    "BloomForCausalLM": bloom,
    "Cohere2ForCausalLM": cohere2,
    "CohereForCausalLM": cohere,
    "DeepseekV2ForCausalLM": deepseek_v2,
    "DeepseekV3ForCausalLM": deepseek_v3,
    "FalconForCausalLM": falcon,
    "GPT2LMHeadCustomModel": santacoder,
    "GPT2LMHeadModel": gpt2,
    "GPTBigCodeForCausalLM": gpt_bigcode,
    "GPTJForCausalLM": gptj,
    "GPTNeoXForCausalLM": gpt_neox,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "GemmaForCausalLM": gemma,
    "GptOssForCausalLM": gpt_oss,
    "GraniteForCausalLM": granite,
    "LlamaForCausalLM": llama,
    "MPTForCausalLM": mpt,
    "MistralForCausalLM": mistral,
    "MixtralForCausalLM": mixtral,
    "MptForCausalLM": mpt,
    "OPTForCausalLM": opt,
    "Olmo2ForCausalLM": olmo2,
    "OlmoForCausalLM": olmo,
    "Phi3ForCausalLM": phi3,
    "PhiForCausalLM": phi,
    "PhimoeForCausalLM": phimoe,
    "PhiMoEForCausalLM": phimoe,
    "Qwen2ForCausalLM": qwen2,
    "Qwen2MoeForCausalLM": qwen2_moe,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "SmolLM3ForCausalLM": smollm3,
    "StableLmForCausalLM": stablelm,
    "Starcoder2ForCausalLM": starcoder2,
}


def family_for(config: Mapping[str, Any]) -> Family:
    """The family that reads this config.json. Raises UnsupportedModel, listing what is supported."""
    names = config.get("architectures")
    if isinstance(names, list) and len(names) == 1 and names[0] in ARCHITECTURES:
        return ARCHITECTURES[names[0]]
    supported = ", ".join(sorted(ARCHITECTURES))
    raise UnsupportedModel(
        f"config.json: architectures = {names!r} is not supported (supported: {supported})"
    )


def config_from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Translate config.json and, when there is one, the end-of-text ids of generation_config.json."""
    family, schemes = family_for(config), read_schemes(config)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    result = family.config_from_hf(plain)
    experts = result.experts.count if result.experts else 0
    return dataclasses.replace(
        result,
        eos_ids=eos_ids(config, generation),
        stored_by=schemes.method,
        stored=tuple(schemes.weights(family.WEIGHTS, result.layers, experts)),
    )


def read_config(directory: Path) -> ModelConfig:
    """The configuration of a model in Hugging Face's layout."""
    config = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    return config_from_hf(config, read_json(generation) if generation.exists() else None)


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file of the model. Raises UnsupportedModel if it is not there or is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UnsupportedModel(f"{path} is missing; a model directory needs one") from None
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path} holds no JSON object")
    return value
