"""config.json to ModelConfig: what transformers writes is understood, what it would change is refused by name."""

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.tiny import TINY_KINDS, hf_tensors, tiny_model
from xlane.models.catalogue import markdown
from xlane.models.config import Llama3Rope, ModelConfig
from xlane.models.decoder import DecoderGraph
from xlane.models.errors import UnsupportedModel
from xlane.models.opened import open_model
from xlane.models.registry import ARCHITECTURES, config_from_hf, family_for, read_config
from xlane.models.rope import attention_factor, inverse_frequencies

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "initializer_range": 0.02,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def read(name: str = "Llama", drop: tuple[str, ...] = (), **changes: Any) -> ModelConfig:
    config = {**LLAMA, "architectures": [f"{name}ForCausalLM"], **changes}
    return config_from_hf({key: value for key, value in config.items() if key not in drop})


def test_llama():
    assert read() == ModelConfig(
        family="llama", vocab_size=32000, hidden_size=2048, layers=4, heads=32, kv_heads=8, head_dim=64,
        ffn_size=5632, max_positions=4096, norm_eps=1e-5, rope_theta=10000.0, bos_id=1, eos_ids=(2,),
    )  # fmt: skip


def test_the_oldest_llama_has_as_many_kv_heads_as_heads():
    assert read(drop=("num_key_value_heads", "rms_norm_eps")).kv_heads == 32


def test_published_smollm2_is_a_llama():
    extra = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}
    assert read(**extra, tie_word_embeddings=True, pad_token_id=2).tied_embeddings


def test_biases():
    config = read(attention_bias=True, mlp_bias=True)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, True, True)


def test_explicit_head_dim_wins_over_the_quotient():
    assert read(head_dim=128).head_dim == 128


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
        {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3_ROPE, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}},
        {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000}, "rope_scaling": None},
    ],
    ids=["transformers 4", "two names", "transformers 5", "whole number"],
)
def test_llama3_rope_in_every_spelling(rope: dict[str, Any]):
    config = read(**rope)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_linear_rope(key: str):
    config = read(rope_scaling={key: "linear", "factor": 4})
    assert (config.rope_linear_factor, config.rope_scaling) == (4.0, None)


def test_default_rope_of_transformers_5():
    config = read(rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert (config.rope_theta, config.rope_scaling, config.rope_linear_factor) == (1e6, None, 1.0)


def test_other_rope_scalings_are_refused_by_name():
    with pytest.raises(UnsupportedModel, match=r"'mrope' is not supported.*linear, llama3"):
        read(rope_scaling={"rope_type": "mrope", "factor": 2.0})


def test_yarn_and_dynamic_stretch_the_context():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert read("Qwen2", rope_scaling=yarn).max_positions == 4 * 4096
    assert read("Qwen2", rope_scaling=yarn, max_position_embeddings=40960).max_positions == 40960
    assert read(rope_scaling={"type": "dynamic", "factor": 2.0}).max_positions == 2 * 4096


@pytest.mark.parametrize("context", [64, 512])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False},
        {"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.5},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.5] * 32, "long_factor": [2.0] * 31 + [9.0]},
        LLAMA3_ROPE,
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_frequencies_are_those_of_transformers(rope: dict[str, Any], context: int):
    """For every rescaling, at a served context within the original one and beyond it."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = LlamaConfig(**{**LLAMA, "max_position_embeddings": 128}, rope_scaling=dict(rope))
    if rope["rope_type"] == "longrope":
        # transformers takes the factor from the two contexts where the configuration has both.
        theirs.original_max_position_embeddings, theirs.max_position_embeddings = 128, 512
        config = read(original_max_position_embeddings=128, max_position_embeddings=512, rope_scaling=rope)
    else:
        config = read(max_position_embeddings=128, rope_scaling=rope)
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, "cpu", seq_len=context)
    config = replace(config, max_positions=context)
    np.testing.assert_allclose(inverse_frequencies(config), expected, rtol=2e-6)
    assert attention_factor(config) == pytest.approx(factor)


def test_mistral_windows():
    assert read("Mistral", sliding_window=4096).window == 4096
    assert read("Mistral", sliding_window=None).window is None
    assert read("Mistral").window == 4096, "transformers' default, which the first release relied on"


def test_qwen2_as_published_has_a_window_that_is_off():
    config = read("Qwen2", use_sliding_window=False, sliding_window=32768, max_window_layers=2)
    assert (config.window, config.window_layers) == (None, ())
    assert (config.qkv_bias, config.output_bias) == (True, False)


def test_qwen2_windows_from_a_layer_up_or_by_type():
    by_first = read("Qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=3)
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    by_type = read("Qwen2", use_sliding_window=True, sliding_window=64, layer_types=types)
    assert (by_first.window, by_first.window_layers) == (64, (False, False, False, True))
    assert (by_type.window, by_type.window_layers) == (64, (False, True, False, True))


def test_a_window_over_all_layers_or_none_names_no_layers():
    everywhere = read("Qwen3", use_sliding_window=True, sliding_window=64, max_window_layers=0)
    nowhere = read("Qwen3", use_sliding_window=True, sliding_window=64, max_window_layers=28)
    assert (everywhere.window, everywhere.window_layers) == (64, ())
    assert (nowhere.window, nowhere.window_layers) == (None, ())


def test_qwen3():
    config = read("Qwen3", head_dim=128, attention_bias=False)
    assert (config.qk_norm, config.head_dim, config.qkv_bias) == ("head", 128, False)
    assert read("Qwen3").head_dim == 128, "transformers' default, not the quotient"


def test_smollm3_marks_the_layers_that_rotate():
    assert read("SmolLM3").rope_layers == (True, True, True, False)
    assert read("SmolLM3", no_rope_layers=[1, 0, 1, 0]).rope_layers == (True, False, True, False)
    assert read("SmolLM3", no_rope_layers=[1, 1, 1, 1]).rope_layers == ()
    assert read("SmolLM3").tied_embeddings, "transformers' default"


def test_smollm3_slides_over_the_layers_that_do_not_rotate():
    config = read("SmolLM3", use_sliding_window=True, sliding_window=16, max_window_layers=28)
    assert (config.window, config.window_layers) == (16, (False, False, False, True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5"),
        ({"attention_multiplier": 0.1}, r"attention_multiplier = 0\.1"),
        ({"sliding_window": 5}, "sliding_window = 5"),
        ({"quantization_config": {"bits": 4}}, "quant_method is missing.*GGUF"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map.*own code"),
        ({"num_attention_heads": 30}, "hidden_size = 2048 is not a multiple of num_attention_heads = 30"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads = 5"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "twist": 1}}, "rope_scaling: twist = 1"),
        ({"rope_scaling": {"rope_type": "linear", "type": "llama3", "factor": 2.0}}, "one name is expected"),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": LLAMA3_ROPE, "rope_parameters": LLAMA3_ROPE}, "both rope_scaling and rope_parameters"),
    ],
)  # fmt: skip
def test_refusals_name_key_and_value(change: dict[str, Any], message: str):
    with pytest.raises(UnsupportedModel, match=message):
        read(**change)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Qwen2", {"layer_types": ["full_attention"]}, "one entry for each of the 4 layers"),
        ("Qwen2", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ("Qwen2", {"mlp_bias": True}, "mlp_bias = True"),
        ("Mistral", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("SmolLM3", {"no_rope_layers": [1, 2, 1, 0]}, "only 0 and 1"),
        ("StableLm", {"qk_layernorm": True}, "qk_layernorm = True is not supported for StableLM"),
    ],
)
def test_refusals_of_families(name: str, change: dict[str, Any], message: str):
    with pytest.raises(UnsupportedModel, match=message):
        read(name, **change)


def test_a_key_another_family_reads_is_harmless_when_null():
    assert read(sliding_window=None, layer_types=None).window is None


def gemma3(**changes: Any) -> ModelConfig:
    config = {
        **LLAMA,
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 64,
        "sliding_window": 16,
        **changes,
    }
    return config_from_hf({key: value for key, value in config.items() if key != "hidden_act"})


def test_gemma3_has_two_rotations_in_both_spellings():
    old = gemma3(
        rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling={"rope_type": "linear", "factor": 8.0}
    )
    new = gemma3(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    )
    assert old == new
    assert (new.rope_theta, new.rope_local_theta, new.rope_linear_factor) == (1e6, 1e4, 8.0)
    assert [new.layer_rotates_locally(layer) for layer in range(4)] == [True] * 4
    six = gemma3(num_hidden_layers=6)
    assert six.window_layers == (True,) * 5 + (False,)
    scaled = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(UnsupportedModel, match=r"'linear' is not supported in layers with a window"):
        gemma3(rope_parameters={"full_attention": {}, "sliding_attention": scaled})


DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "auto_map": {"AutoConfig": "x.Y"}, "ep_size": 1,
    "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096},
    "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax",
    "norm_topk_prob": False, "q_lora_rank": None, "routed_scaling_factor": 1.0, "num_hidden_layers": 27, "hidden_size": 2048,
    "intermediate_size": 10944, "num_attention_heads": 16, "num_key_value_heads": 16, "first_k_dense_replace": 1, "aux_loss_alpha": 0.001, "seq_aux": True,
    "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                     "original_max_position_embeddings": 4096},
    "num_nextn_predict_layers": None, "vocab_size": 102400,
}  # fmt: skip


def test_deepseek_as_published():
    """Scores are multiplied by yarn's factor for queries and for keys: 1.8738 / sqrt(192), as the authors' own code has it."""
    config = config_from_hf(DEEPSEEK)
    assert (config.heads, config.kv_heads, config.head_dim, config.value_dim) == (128, 1, 576, 512)
    assert config.attention_scale == pytest.approx(0.1352338, rel=1e-6)
    assert config.experts is not None
    assert (config.experts.groups, config.experts.chosen_groups, config.experts.group_best) == (8, 4, 2)
    assert [config.layer_experts(layer) is None for layer in range(4)] == [True, True, True, False]
    lite = config_from_hf({**DEEPSEEK, **V2_LITE})
    assert lite.latent is not None
    assert (lite.latent.query_rank, lite.rotary_dim, lite.rope_interleaved) == (0, 64, True)
    assert lite.attention_scale == pytest.approx(0.1147214, rel=1e-6)
    assert lite.experts is not None
    assert (lite.experts.groups, lite.experts.shared_ffn_size, lite.experts.normalized) == (1, 2816, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_method": "greedy"}, "topk_method = 'greedy': supported: noaux_tc"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax': supported: sigmoid"),
        ({**V2_LITE, "norm_topk_prob": True}, "norm_topk_prob = True: supported: False"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
    ],
)
def test_what_deepseeks_experts_are_not_chosen_by(change: dict[str, Any], message: str):
    with pytest.raises(UnsupportedModel, match=message):
        config_from_hf({**DEEPSEEK, **change})


def test_unknown_architecture_lists_the_known():
    with pytest.raises(
        UnsupportedModel, match=r"\['T5Model'\].*LlamaForCausalLM, MPTForCausalLM, MistralForCausalLM"
    ):
        read("T5Model", architectures=["T5Model"])
    with pytest.raises(UnsupportedModel, match="architectures = None"):
        family_for({})


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, (2,)),
        ({}, (2,)),
        ({"eos_token_id": None}, (2,)),
        ({"eos_token_id": 0}, (0,)),
        ({"eos_token_id": [7, 9]}, (7, 9)),
    ],
)
def test_end_of_text_ids(generation: dict[str, Any] | None, expected: tuple[int, ...]):
    assert config_from_hf(LLAMA, generation).eos_ids == expected


def test_end_of_text_ids_may_be_a_list_in_the_configuration_or_none():
    assert read(eos_token_id=[128001, 128009]).eos_ids == (128001, 128009)
    assert read(eos_token_id=None).eos_ids == ()


def test_families_offer_what_the_registry_promises():
    for family in ARCHITECTURES.values():
        assert family.WEIGHTS
        assert family.IGNORED_TENSORS


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_what_transformers_writes_is_read(kind: str, tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoConfig

    path = tiny_model(kind, tmp_path_factory.getbasetemp() / "tiny")
    config, theirs = read_config(path), AutoConfig.from_pretrained(path)
    assert config.family == kind.split("-")[0]
    assert config.layers == theirs.num_hidden_layers
    if config.latent is None:
        assert config.kv_heads == getattr(theirs, "num_key_value_heads", config.kv_heads)
    assert config.tied_embeddings == theirs.tie_word_embeddings
    if config.rope_theta is not None:
        assert config.rope_theta == getattr(theirs, "rope_theta", 10000.0)
    types = getattr(theirs, "layer_types", None)
    if types:
        expected = [theirs.sliding_window if kind == "sliding_attention" else None for kind in types]
        assert [config.layer_window(layer) for layer in range(config.layers)] == expected


def test_the_page_of_models_is_current():
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert page.read_text() == markdown(), "run: python -m xlane.models.catalogue > docs/models.md"


def test_santacoder_is_gpt_bigcode_in_another_layout(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    """As its authors' code stores it, which transformers no longer runs; what the other layout says is held against it."""
    plain = tiny_model("gpt_bigcode", tmp_path_factory.getbasetemp() / "tiny")
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in hf_tensors(plain).items():
        parts = {name: tensor}
        if ".c_attn." in name:
            parts = {
                name.replace("c_attn", "q_attn"): tensor[:64],
                name.replace("c_attn", "kv_attn"): tensor[64:],
            }
        turned = re.search(r"(c_attn|c_proj|c_fc)\.weight", name)
        tensors |= {part: np.ascontiguousarray(x.T if turned else x) for part, x in parts.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    said = json.loads((plain / "config.json").read_text())
    del said["multi_query"]
    said |= {
        "architectures": ["GPT2LMHeadCustomModel"],
        "model_type": "gpt2",
        "attention_head_type": "multiquery",
    }
    (tmp_path / "config.json").write_text(json.dumps(said))
    ours, theirs = open_model(tmp_path), open_model(plain)
    assert replace(ours.config, family="gpt_bigcode") == theirs.config
    specs = DecoderGraph.of(ours.config, "float32").specs
    assert ours.source is not None
    assert theirs.source is not None
    ours.source.check(specs)
    for spec in specs:
        index = tuple(slice(size // 2, size) for size in spec.shape)
        for part in (index, tuple(slice(0, size) for size in spec.shape)):
            np.testing.assert_array_equal(ours.source.read(spec, part), theirs.source.read(spec, part))
    with pytest.raises(UnsupportedModel, match="attention_head_type = 'multihead': supported: multiquery"):
        config_from_hf(said | {"attention_head_type": "multihead"})


def test_every_architecture_is_tried():
    tried = {"santacoder"} | {kind.split("-")[0] for kind in TINY_KINDS}
    known = {inspect.getmodule(family.config_from_hf) for family in ARCHITECTURES.values()}
    assert {module.__name__.rsplit(".", 1)[1] for module in known if module} == tried


def test_a_directory_without_a_readable_configuration(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"config\.json is missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UnsupportedModel, match="no JSON object"):
        read_config(tmp_path)
