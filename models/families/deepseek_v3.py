"""DeepSeek-V3, R1, and (with a tokenizer.json, which theirs lack) Kimi-K2 and Moonlight: V2, experts chosen by sigmoids and a bias.

Knows config.json's keys and transformers' defaults for them.
"""

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..weights import plain
from . import deepseek_v2
from .deepseek_v2 import latent, routed
from .hf import Fields
from .moe import skip_training

__all__ = ["IGNORED_TENSORS", "WEIGHTS", "config_from_hf"]

WEIGHTS = {
    **deepseek_v2.WEIGHTS,
    "layers.{i}.experts.choice_bias": plain("model.layers.{i}.mlp.gate.e_score_correction_bias"),
}
# The published weights have a layer more than the network (V3's and R1's is the 62nd), that guesses the token after the
# next (`num_nextn_predict_layers`).
IGNORED_TENSORS = (*deepseek_v2.IGNORED_TENSORS, r"model\.layers\.61\..*")


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Translate config.json, refusing what is not understood."""
    fields = Fields(config)
    skip_training(fields)
    fields.skip("num_nextn_predict_layers")
    fields.one_of("scoring_func", fields.text("scoring_func", default="sigmoid"), "sigmoid")
    fields.one_of("topk_method", fields.text("topk_method", default="noaux_tc"), "noaux_tc")
    result = ModelConfig(
        family="deepseek_v3",
        experts=routed(
            fields,
            dense=3,
            size=2048,
            shared=1,
            scale=2.5,
            shares="sigmoid",
            choice_bias=True,
            normalized=fields.flag("norm_topk_prob", True),
            groups=fields.integer("n_group", 8),
            chosen_groups=fields.integer("topk_group", 4),
            group_best=2,
        ),
        **latent(fields, max_positions=4096),
    )
    fields.finish()
    return result
