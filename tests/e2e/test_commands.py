"""Commands on a real engine and a tiny model, each in a process of its own, as a user runs them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.tiny import tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama-gqa-tied", tmp_path_factory.mktemp("models"))


def xlane(*arguments: str | Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xlane.server", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)


def test_plan_counts_by_hand(model: Path, one_device_env: dict[str, str]):
    done = xlane("plan", model, "--json", "--kernels", "xla", "--cache-dir", "none", env=one_device_env)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    # V=131 D=64 F=96 L=2 N=4 K=2 H=16, embeddings tied: embedding, then per layer norms, q k v o, gate up down; last norm.
    per_layer = 2 * 64 + 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    assert facts["parameters"] == 131 * 64 + 2 * per_layer + 64
    assert facts["weights_bytes"] == 4 * facts["parameters"]
    assert facts["KV_cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert facts["context_tokens"] == 256


def test_plan_needs_neither_the_chips_nor_the_weights(
    model: Path, tmp_path: Path, one_device_env: dict[str, str]
):
    shutil.copy(model / "config.json", tmp_path)
    done = xlane("plan", tmp_path, "--topology", "h200", "--json", env=one_device_env)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["device"], facts["dtype"]) == ("h200-1", "bfloat16")
    assert facts["KV_cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 2


def test_what_does_not_fit_is_one_line_and_code_3(model: Path, one_device_env: dict[str, str]):
    done = xlane("plan", model, "--max-total-tokens", "100000", env=one_device_env)
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert "--max-total-tokens" in done.stderr
    assert done.stderr.count("\n") == 1


def test_warmup_leaves_programs_and_a_manifest(model: Path, one_device_env: dict[str, str], tmp_path: Path):
    environ = {
        name: value for name, value in one_device_env.items() if not name.startswith("JAX_COMPILATION")
    }
    cache = tmp_path / "cache"
    few = ["--max-batch-size", "1", "--max-batch-prefill-tokens", "8"]
    done = xlane("warmup", model, "--cache-dir", cache, "--kernels", "xla", *few, env=environ)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(Path(done.stdout.strip()).read_text())
    assert [program["name"] for program in manifest["programs"]] == ["decode[1]", "mixed[1+4]", "mixed[1+8]"]
    assert list((cache / "programs").iterdir())
