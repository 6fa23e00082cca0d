"""Writes demo_greedy.json: what transformers (float32, torch) answers greedily with the demo model's weights.

    python -m tests.e2e.make_demo_greedy

The weights come from the same GGUF file, the arithmetic, cache and decoding loop are transformers' own. Takes minutes, so
its result is kept; `test_demo.py` computes a part of it anew each time.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xlane.models.demo import default_cache_dir, demo_model
from xlane.models.gguf import GgufFile, GgufTensors, config_from_gguf
from xlane.models.tokenizer import TextTokenizer

PATH = Path(__file__).with_name("demo_greedy.json")
TOKENS = 64

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain photosynthesis to a child.",
    "List three uses of a paper clip.",
    "What is 12 plus 30?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "Tell me a joke about computers.",
)
TEXTS = (
    "Once upon a time, in a village by the river,",
    "def fibonacci(n):\n    ",
    "The three laws of motion are",
    "In 1969, the first humans",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8,",
    "The recipe needs flour, sugar and",
    "El perro y el gato",
    "import numpy as np\n",
    "The main difference between a virus and a bacterium is",
    "Q: What is the largest planet?\nA:",
    "a",
)


AROUND = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def prompts(tokenizer: TextTokenizer) -> list[list[int]]:
    """Token ids of every prompt: questions through the chat template, texts as they are."""
    chats = (
        tokenizer.apply_chat([{"role": "user", "content": question}], None, True, False)
        for question in QUESTIONS
    )
    return [tokenizer.encode(chat, add_special_tokens=False) for chat in chats] + [
        tokenizer.encode(text) for text in TEXTS
    ]


def reference_model(path: Path) -> Any:
    """The demo model as transformers' LlamaForCausalLM in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    file = GgufFile(path)
    config = LlamaConfig(
        **{k: v for k, v in config_from_gguf(file).items() if k not in ("architectures", "model_type")}
    )
    model = LlamaForCausalLM(config)
    tensors = GgufTensors(file)
    state = {
        _hf_name(name): torch.from_numpy(tensors.read_rows(name, 0, tensors.shape(name)[0]).copy())
        for name in tensors.names()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    model.tie_weights()
    return model.eval()


def _hf_name(name: str) -> str:
    """What transformers calls a tensor of a Llama."""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    return f"model.layers.{found[1]}.{IN_LAYER[found[2]]}.weight" if found else AROUND[name]


def greedy(model: Any, ids: Sequence[int], tokens: int) -> list[int]:
    """The likeliest next tokens, one after another; end of text does not stop it."""
    import torch

    text, cache, out = torch.tensor([list(ids)]), None, []
    with torch.no_grad():
        for _ in range(tokens):
            result = model(input_ids=text, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            out.append(int(result.logits[0, -1].argmax()))
            text = torch.tensor([out[-1:]])
    return out


def main() -> None:
    path = demo_model(default_cache_dir())
    model = reference_model(path)
    cases = [
        {"prompt": ids, "output": greedy(model, ids, TOKENS)}
        for ids in prompts(TextTokenizer.from_path(path))
    ]
    PATH.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()
