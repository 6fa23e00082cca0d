"""Adapters as PEFT writes them, with random numbers, and checkpoints into which they are merged by the definition."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.support.tiny import hf_tensors

NOTHING = (
    "alora_invocation_tokens", "arrow_config", "auto_mapping", "corda_config", "eva_config", "exclude_modules", "layer_replication",
    "layers_pattern", "layers_to_transform", "megatron_config", "modules_to_save", "revision", "target_parameters",
    "trainable_token_indices",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.18.1", "base_model_name_or_path": "x", "target_modules": ["any"],
    "bias": "none", "alpha_pattern": {}, "rank_pattern": {}, "loftq_config": {}, "lora_dropout": 0.05, "megatron_core": "megatron.core",
    "qalora_group_size": 16, "inference_mode": True, "init_lora_weights": True,
    **dict.fromkeys(("ensure_weight_tying", "fan_in_fan_out", "lora_bias", "use_dora", "use_qalora", "use_rslora"), False),
    **dict.fromkeys(NOTHING),
}  # fmt: skip
"""As PEFT 0.18 writes them, whatever is asked for."""

INPUTS_FIRST = re.compile(r"c_attn|c_proj|c_fc")
"""GPT-2's linear maps."""


def lora(plain: Path, to: Path, rank: int, targets: str, seed: int = 0, **said: Any) -> tuple[Path, Path]:
    """An adapter for the linear maps that match `targets`, and a copy of the checkpoint with it merged."""
    adapter, merged = to / f"adapter-{seed}", to / f"merged-{seed}"
    adapter.mkdir(parents=True)
    shutil.copytree(plain, merged, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = {**DEFAULTS, "r": rank, "lora_alpha": 3.0} | said
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    rng, tensors = np.random.default_rng(seed), hf_tensors(plain)
    stored: dict[str, np.ndarray] = {}
    for name, weight in tensors.items():
        if weight.ndim != 2 or not re.search(targets, name):
            continue
        turned = INPUTS_FIRST.search(name) is not None and "gpt2" in plain.name
        outputs, inputs = weight.shape[::-1] if turned else weight.shape
        a = rng.standard_normal((rank, inputs), dtype=np.float32) / np.float32(inputs**0.5)
        b = rng.standard_normal((outputs, rank), dtype=np.float32)
        module = "base_model.model." + name.removesuffix(".weight")
        stored |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        change = (scale * (b.astype(np.float64) @ a)).astype(np.float32)
        tensors[name] = weight + (change.T if turned else change)
    save_file(stored, adapter / "adapter_model.safetensors")
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter, merged


def changed(adapter: Path, to: Path, change: Callable[[dict[str, np.ndarray]], None], **said: Any) -> Path:
    """A copy of an adapter with other tensors or options."""
    from safetensors.numpy import load_file

    shutil.copytree(adapter, to)
    tensors = load_file(to / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, to / "adapter_model.safetensors")
    config = json.loads((to / "adapter_config.json").read_text()) | said
    (to / "adapter_config.json").write_text(json.dumps(config))
    return to
