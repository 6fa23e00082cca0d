"""Keys of a Hugging Face config.json that need not be read: those without effect, and those with one harmless value.

Data. A key in neither list, that its family does not read, is refused if transformers reads it, or if it changes other families'
networks.
"""

from collections.abc import Mapping
from typing import Any

# Keys that say nothing about the network, whatever their value.
IGNORABLE = frozenset(
    {
        # where it came from
        "_name_or_path",
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "transformers.js_config",
        # training and use of the library
        "use_cache",
        "initializer_range",
        "attention_dropout",
        "embd_pdrop",
        "resid_pdrop",
        "attn_pdrop",
        "embedding_dropout",
        "residual_dropout",
        "hidden_dropout",
        "classifier_dropout",
        "attention_probs_dropout_prob",
        "hidden_dropout_prob",
        "layerdrop",
        "dropout",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        # text
        "tokenizer_class",
        "vocab_file",
        "tokenizer_name",
        "model_max_length",
        "prefix",
        "finetuning_task",
        "task_specific_params",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "_num_labels",
        "custom_pipelines",
        # what the library hands back
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "torchscript",
        "chunk_size_feed_forward",
        "pretraining_tp",
        "max_sequence_length",
        "gradient_checkpointing",
        "_attn_implementation",
        "_attn_implementation_autoset",
        # marks left by tools
        "unsloth_fixed",
        "unsloth_version",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        # sampling defaults of old releases
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "num_beams",
        "num_beam_groups",
        "num_return_sequences",
        "diversity_penalty",
        "early_stopping",
        "max_length",
        "min_length",
        "max_new_tokens",
        "bad_words_ids",
        "begin_suppress_tokens",
        "suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "exponential_decay_length_penalty",
        "output_scores",
        "return_dict_in_generate",
        "remove_invalid_values",
    }
)

# Keys that would change the network, with the one value that does not. Null is always harmless.
HARMLESS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rope_interleaved": False,
    "use_mrope": False,
    "use_qk_norm": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "apply_residual_connection_post_layernorm": False,
    "partial_rotary_factor": 1.0,
    "use_bidirectional_attention": False,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "use_bfloat16": False,
    "tf_legacy_loss": False,
}

# Keys that change other families' networks. Where one is beside a family that knows nothing of it somebody meant something.
MEANINGFUL = frozenset(
    {
        "sliding_window",
        "layer_types",
        "attention_multiplier",
        "embedding_multiplier",
        "residual_multiplier",
        "logits_scaling",
        "logit_scale",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "alibi",
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "kv_lora_rank",
        "auto_map",
        *HARMLESS,
    }
)
