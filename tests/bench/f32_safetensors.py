"""A float32 GGUF file as a directory that transformers serves: it reads GGUF, but its server does not serve it.

    ENVIRONMENT/bin/python tests/bench/f32_safetensors.py F32.gguf DIRECTORY

Run it in the environment that serves, which needs `transformers[serving]`, torch, accelerate and gguf; nothing of ours.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def write_directory(source: Path, target: Path) -> None:
    """Weights as they are, configuration and tokenizer as transformers reads them from the file."""
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # Read, the weights are plain; transformers 5 would still refuse to write, or later to serve, what came out of GGUF.
    del model.hf_quantizer, model.quantization_method, model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)


if __name__ == "__main__":
    write_directory(Path(sys.argv[1]), Path(sys.argv[2]))
