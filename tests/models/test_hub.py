"""Fetching models: local paths, and a stub of the Hub on loopback. huggingface_hub reads its environment once, so each
download runs in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.stub_hub import SHA, TOKEN, Repo, StubHub, stub_hub
from xlane.models.errors import HubError
from xlane.models.hub import resolve

CHILD = """
import json, sys
from xlane.models.errors import HubError
from xlane.models import hub_fetch
from xlane.models.hub import resolve, resolve_adapter
options, seen = json.loads(sys.argv[1]), []
hub_fetch.ATTEMPTS = options.pop("attempts", hub_fetch.ATTEMPTS)
if options.pop("progress"):
    options["progress"] = lambda done, total: seen.append((done, total))
try:
    if (adapter := options.pop("adapter", None)) is not None:
        print(json.dumps({"path": str(resolve_adapter(adapter, options["cache_dir"], 0.05))}))
        sys.exit()
    found = resolve(**options, retry_wait_s=0.05)
    print(json.dumps({"path": str(found.path), "sha": found.sha, "kind": found.kind, "progress": seen}))
except HubError as error:
    print(json.dumps({"error": str(error), "type": type(error).__name__}))
"""
BIG = bytes(range(256)) * 4096  # 1 MiB
INDEX = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "part-1.safetensors"}}
NEEDED = {
    "config.json": b"{}",
    "generation_config.json": b"{ }",
    "tokenizer.json": b"[1]",
    "tokenizer_config.json": b"[2]",
    "chat_template.jinja": b"[3]",
    "model.safetensors": BIG,
}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": BIG}
USELESS = {
    "README.md": b"#",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"again",
    "onnx/model.onnx": b"onnx",
    "onnx/tokenizer.json": b"copy",
}


@pytest.fixture
def hub() -> Iterator[StubHub]:
    repos = {
        "org/plain": Repo({**NEEDED, **USELESS}, revisions=("main", "v1", "refs/pr/7", SHA)),
        "org/sharded": Repo(
            {
                "config.json": b"{}",
                "model.safetensors.index.json": json.dumps(INDEX).encode(),
                "part-1.safetensors": b"1" * 1000,
                "part-2.safetensors": b"2" * 1000,
                "part-3.safetensors": b"3",
            }
        ),
        "org/pickles": Repo({"config.json": b"{}", "pytorch_model.bin": b"x"}),
        "org/private": Repo(NEEDED, private=True),
        "org/adapter": Repo({**ADAPTER, **USELESS}, revisions=("main", "v1", SHA)),
        "org/gated": Repo(NEEDED, gated=True),
        "org/gguf": Repo({"m-Q4_0.gguf": b"4" * 100, "m-Q8_0.gguf": b"8" * 100}),
        "org/one-gguf": Repo({"config.json": b"{}", "m-Q8_0.gguf": b"8" * 100}),
    }
    with stub_hub(repos) as running:
        yield running


def fetch(
    url: str, cache: Path, model_id: str, *, offline: bool = False, progress: bool = False, **options: Any
) -> Any:
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HOME": str(cache),
    }
    environment.pop("HF_TOKEN", None)
    arguments = json.dumps({"model_id": model_id, "cache_dir": str(cache), "progress": progress, **options})
    run = subprocess.run(
        [sys.executable, "-c", CHILD, arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def files(path: str) -> set[str]:
    return {file.relative_to(path).as_posix() for file in Path(path).rglob("*") if not file.is_dir()}


def test_only_what_serving_needs_is_fetched_once_and_found_again_offline(hub: StubHub, tmp_path: Path):
    found = fetch(hub.url, tmp_path, "org/plain", progress=True)
    assert (found["sha"], found["kind"]) == (SHA, "safetensors")
    assert files(found["path"]) == set(NEEDED)
    assert Path(found["path"], "model.safetensors").read_bytes() == BIG
    total = sum(len(content) for content in NEEDED.values())
    assert found["progress"] == sorted(found["progress"])
    assert found["progress"][-1] == [total, total]

    hub.requests.clear()
    again = fetch(hub.url, tmp_path, "org/plain")
    assert again["path"] == found["path"]
    assert [path for _, path, _ in hub.requests if "/resolve/" in path] == []

    hub.requests.clear()
    offline = fetch(hub.url, tmp_path, "org/plain", offline=True)
    assert (offline["path"], offline["sha"]) == (found["path"], SHA)
    assert hub.requests == []

    gone = fetch("http://127.0.0.1:9", tmp_path, "org/plain")
    assert gone["path"] == found["path"], "a server that started before starts without the network"


def test_of_an_adapter_two_files_are_fetched_once(hub: StubHub, tmp_path: Path):
    for revision in ("", "@v1"):
        found = fetch(hub.url, tmp_path, "", adapter="org/adapter" + revision)
        assert files(found["path"]) == set(ADAPTER)
    hub.requests.clear()
    assert fetch(hub.url, tmp_path, "", adapter="org/adapter@v1", offline=True) == found
    assert hub.requests == []
    assert "has no file adapter_config.json" in fetch(hub.url, tmp_path, "", adapter="org/plain")["error"]
    assert (
        "HF_HUB_OFFLINE forbids"
        in fetch(hub.url, tmp_path / "new", "", adapter="org/adapter", offline=True)["error"]
    )
    assert "no such directory" in fetch(hub.url, tmp_path, "", adapter=str(tmp_path / "none"))["error"]


def test_a_plan_needs_no_weights(hub: StubHub, tmp_path: Path):
    planned = fetch(hub.url, tmp_path, "org/plain", weights=False)
    assert files(planned["path"]) == set(NEEDED) - {"model.safetensors"}
    assert "does not answer" in fetch(hub.url, tmp_path, "org/plain", ask=False)["error"], (
        "half a model is none"
    )
    assert files(fetch(hub.url, tmp_path, "org/plain")["path"]) == set(NEEDED)
    hub.requests.clear()
    assert fetch(hub.url, tmp_path, "org/plain", ask=False)["sha"] == SHA
    assert hub.requests == []


@pytest.mark.parametrize("revision", [None, "v1", SHA])
def test_what_needs_no_weights_starts_again_without_the_hub(
    hub: StubHub, tmp_path: Path, revision: str | None
):
    def asked(url: str = hub.url, **options: Any) -> Any:
        return fetch(url, tmp_path, "org/plain", revision=revision, weights=False, **options)

    hub.cuts["tokenizer.json"] = 10**6
    assert "could not be fetched" in asked(attempts=1)["error"]
    assert "HF_HUB_OFFLINE" in asked(offline=True)["error"], "half of what describes it is none"
    hub.cuts.clear()
    found = asked()
    assert asked(offline=True) == asked("http://127.0.0.1:9") == asked(ask=False) == found
    Path(found["path"], "config.json").unlink()
    assert "HF_HUB_OFFLINE" in asked(offline=True)["error"]


def test_a_cut_connection_is_resumed(hub: StubHub, tmp_path: Path):
    # Large enough that whole pieces of huggingface_hub's 10 MB have arrived when it breaks.
    content = BIG * 24
    hub.repos["org/plain"] = Repo({**NEEDED, "model.safetensors": content})
    hub.cuts["model.safetensors"] = 2
    found = fetch(hub.url, tmp_path, "org/plain")
    assert Path(found["path"], "model.safetensors").read_bytes() == content
    first, *resumed = hub.downloads("model.safetensors")
    assert first is None
    assert all(range and not range.startswith("bytes=0-") for range in resumed), (
        "what had arrived is not asked for again"
    )


def test_a_connection_that_keeps_breaking_is_an_error_and_leaves_no_model(hub: StubHub, tmp_path: Path):
    hub.cuts["model.safetensors"] = 10**6
    error = fetch(hub.url, tmp_path, "org/plain", attempts=2)
    assert error["type"] == "Unreachable"
    assert "could not be fetched" in error["error"]
    offline = fetch(hub.url, tmp_path, "org/plain", offline=True)
    assert "HF_HUB_OFFLINE" in offline["error"]


def test_an_overloaded_hub_is_asked_again(hub: StubHub, tmp_path: Path):
    hub.failures = [503, 503]
    assert fetch(hub.url, tmp_path, "org/plain")["sha"] == SHA


def test_shards_are_those_of_the_index(hub: StubHub, tmp_path: Path):
    found = fetch(hub.url, tmp_path, "org/sharded")
    assert files(found["path"]) == {
        "config.json", "model.safetensors.index.json", "part-1.safetensors", "part-2.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("revision", ["v1", "refs/pr/7", SHA])
def test_revisions(hub: StubHub, tmp_path: Path, revision: str):
    assert fetch(hub.url, tmp_path, "org/plain", revision=revision)["sha"] == SHA
    assert fetch(hub.url, tmp_path, "org/plain", revision=revision, offline=True)["sha"] == SHA


@pytest.mark.parametrize(
    ("model_id", "options", "messages"),
    [
        ("org/absent", {}, ["org/absent does not exist, or is private", "HF_TOKEN"]),
        ("org/private", {}, ["org/private does not exist, or is private", "HF_TOKEN"]),
        ("org/private", {"token": "hf_wrong"}, ["answered 401", "the one in use may not"]),
        ("org/gated", {}, ["org/gated is gated", "ask for access at http"]),
        ("org/plain", {"revision": "v9"}, ["org/plain has no revision 'v9'"]),
        (
            "org/pickles",
            {},
            ["org/pickles has its weights as pickles only", "org/pickles pickles-safetensors"],
        ),
        ("org/gguf", {}, ["several GGUF files", "org/gguf/m-Q4_0.gguf", "m-Q8_0.gguf"]),
        ("org/gguf/none.gguf", {}, ["no file none.gguf"]),
        ("org/pl--ain", {}, ["cannot be a Hub repository"]),
    ],
)
def test_refusals_say_what_to_do(
    hub: StubHub, tmp_path: Path, model_id: str, options: Any, messages: list[str]
):
    error = fetch(hub.url, tmp_path, model_id, **options)["error"]
    for message in messages:
        assert message in error


def test_the_right_token_opens_what_is_private(hub: StubHub, tmp_path: Path):
    assert fetch(hub.url, tmp_path, "org/private", token=TOKEN)["sha"] == SHA


@pytest.mark.parametrize("model_id", ["org/gguf/m-Q8_0.gguf", "org/one-gguf"])
def test_gguf_files(hub: StubHub, tmp_path: Path, model_id: str):
    found = fetch(hub.url, tmp_path, model_id)
    assert (found["kind"], Path(found["path"]).name) == ("gguf", "m-Q8_0.gguf")
    assert Path(found["path"]).read_bytes() == b"8" * 100
    assert fetch(hub.url, tmp_path, model_id, offline=True)["path"] == found["path"]


def test_no_network_and_nothing_cached(tmp_path: Path):
    error = fetch("http://127.0.0.1:9", tmp_path, "org/plain")
    assert error["type"] == "Unreachable"
    assert "Check the network" in error["error"]


def write(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).write_text("{}")
    return directory


def test_local_directory_and_file(tmp_path: Path):
    write(tmp_path, "config.json", "model.safetensors")
    assert resolve(str(tmp_path)).kind == "safetensors"
    assert resolve(str(tmp_path)).sha is None
    write(tmp_path, "m.gguf")
    assert resolve(str(tmp_path / "m.gguf")).kind == "gguf"


def test_a_local_directory_without_weights_is_served_with_random_ones(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path), weights=False).path == tmp_path
    with pytest.raises(HubError, match="has no weights"):
        resolve(str(tmp_path))


def test_local_directory_with_one_gguf(tmp_path: Path):
    assert resolve(str(write(tmp_path, "m.gguf"))).path == tmp_path / "m.gguf"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has no weights"),
        (["config.json"], "has no weights"),
        (["model.safetensors"], r"lacks config\.json"),
        (["a.gguf", "b.gguf"], "several GGUF files"),
        (["config.json", "pytorch_model.bin"], "pickles only"),
        (["config.json", "model.safetensors.index.json"], "is no index"),
    ],
)
def test_local_directories_that_cannot_be_served(tmp_path: Path, names: list[str], message: str):
    with pytest.raises(HubError, match=message):
        resolve(str(write(tmp_path, *names)))


def test_a_local_index_with_a_missing_shard(tmp_path: Path):
    write(tmp_path, "config.json", "part-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    with pytest.raises(HubError, match=r"lacks part-2\.safetensors"):
        resolve(str(tmp_path))


def test_files_that_cannot_be_read_or_written_are_told_of(hub: StubHub, tmp_path: Path):
    write(tmp_path, "config.json")
    (tmp_path / "model.safetensors.index.json").mkdir()
    with pytest.raises(HubError, match=r"index\.json: Is a directory; give this user the right"):
        resolve(str(tmp_path))
    notes = tmp_path / "models--org--plain" / "refs"
    notes.parent.mkdir()
    notes.write_text("")  # no folder
    assert f"{notes}" in fetch(hub.url, tmp_path, "org/plain")["error"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_entered_is_told_of(tmp_path: Path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(HubError, match="Permission denied; give this user the right"):
        resolve(str(tmp_path / "closed" / "model"))


@pytest.mark.parametrize("model_id", ["/no/such/place", "./none", "none", "a/b/c", "model.gguf", "~/none"])
def test_what_is_neither_local_nor_a_repository(model_id: str):
    with pytest.raises(HubError, match=r"no such file or directory|neither a local path"):
        resolve(model_id)


def test_local_models_have_no_revisions(tmp_path: Path):
    with pytest.raises(HubError, match="leave out revision 'v1'"):
        resolve(str(tmp_path), revision="v1")
    with pytest.raises(HubError, match="no GGUF file"):
        resolve(str(write(tmp_path, "config.json") / "config.json"))
