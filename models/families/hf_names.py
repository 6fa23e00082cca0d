"""What each parameter of the decoder is made of in a Hugging Face checkpoint. Data; all families here name tensors alike."""

from collections.abc import Mapping

from ..weights import Recipe, gate_up, plain, qkv

# Parameter path to the tensors it is made of; the families here all name them alike.
WEIGHTS: Mapping[str, Recipe] = {
    "embed.weight": plain("model.embed_tokens.weight"),
    "layers.{i}.attn_norm.scale": plain("model.layers.{i}.input_layernorm.weight"),
    "layers.{i}.qkv.weight": qkv(
        "model.layers.{i}.self_attn.q_proj.weight",
        "model.layers.{i}.self_attn.k_proj.weight",
        "model.layers.{i}.self_attn.v_proj.weight",
    ),
    "layers.{i}.qkv.bias": qkv(
        "model.layers.{i}.self_attn.q_proj.bias",
        "model.layers.{i}.self_attn.k_proj.bias",
        "model.layers.{i}.self_attn.v_proj.bias",
    ),
    "layers.{i}.q_norm.scale": plain("model.layers.{i}.self_attn.q_norm.weight"),
    "layers.{i}.k_norm.scale": plain("model.layers.{i}.self_attn.k_norm.weight"),
    "layers.{i}.out.weight": plain("model.layers.{i}.self_attn.o_proj.weight"),
    "layers.{i}.out.bias": plain("model.layers.{i}.self_attn.o_proj.bias"),
    "layers.{i}.mlp_norm.scale": plain("model.layers.{i}.post_attention_layernorm.weight"),
    "layers.{i}.gate_up.weight": gate_up(
        "model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"
    ),
    "layers.{i}.gate_up.bias": gate_up(
        "model.layers.{i}.mlp.gate_proj.bias", "model.layers.{i}.mlp.up_proj.bias"
    ),
    "layers.{i}.down.weight": plain("model.layers.{i}.mlp.down_proj.weight"),
    "layers.{i}.down.bias": plain("model.layers.{i}.mlp.down_proj.bias"),
    "norm.scale": plain("model.norm.weight"),
    "head.weight": plain("lm_head.weight"),
}

# Tensors that a checkpoint may hold for nothing: frequencies that follow from the configuration, and the head when it
# is the embedding (an untied model has a parameter made of it, and misses it if it is not there).
IGNORED_TENSORS = (
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"model\.rotary_emb\.inv_freq",
    r"lm_head\.weight",
)
