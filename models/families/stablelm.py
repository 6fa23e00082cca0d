"""StableLM 3B, 2 (1.6B) and StableLM Zephyr, Stable Code 3B: Llama with LayerNorms, of which a quarter of a head rotates.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..errors import UnsupportedModel
from .hf import Fields
from .hf_names import IGNORED_TENSORS, WEIGHTS
from .llama import common, rotary_width

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    # The first releases brought code of their own, which transformers has long since taken in.
    fields.skip("auto_map")
    if fields.flag("qk_layernorm", False):
        raise UnsupportedModel(
            "config.json: qk_layernorm = True is not supported for StableLM (2 12B's norm of each head)"
        )
    beside = fields.flag("use_parallel_residual", False)
    result = ModelConfig(
        family="stablelm",
        norm="layer",
        norm_bias=True,
        parallel=beside,
        shared_norm=beside,
        qkv_bias=fields.flag("use_qkv_bias", False),
        activation=fields.activation("hidden_act", default="silu"),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        **common(
            fields,
            max_positions=4096,
            rotary_dim=rotary_width(fields, 0.25),
            norm_eps="layer_norm_eps",
            norm_eps_default=1e-5,
        ),
    )
    fields.finish()
    return result
