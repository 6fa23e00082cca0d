"""Write a model folder without weights, of a real model's shape, to serve with `--load-format dummy` where no hub is at hand.

    python -m tests.bench.dummy_model 8b FOLDER
    xlane serve --model-id FOLDER --load-format dummy

The tokenizer knows every byte and fills the rest of the vocabulary with words, so that each id decodes to some text.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 8192, "vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
SHAPES = {
    "8b": _LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
    "1b": _LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
}  # fmt: skip
"""Llama 3.1 8B and Llama 3.2 1B."""


def write_model(shape: str, folder: Path) -> None:
    """Everything of a checkpoint but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape]
    alphabet = sorted(ByteLevel.alphabet())
    words = [f"Ġw{number}" for number in range(config["vocab_size"] - len(alphabet))]
    vocab = {token: index for index, token in enumerate([*alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


if __name__ == "__main__":
    write_model(sys.argv[1], Path(sys.argv[2]))
