"""A model id to a folder or file on this machine: local as it is, else fetched from the Hub into its usual cache.

Knows which files a model needs and how the cache is laid out; how bytes travel and fail is `hub_fetch.py`'s. Nothing is
read from the weights. HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and the saved login work as huggingface_hub defines them.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from .checkpoint import INDEX, PICKLES, SINGLE, pickle_advice, read_index
from .errors import CheckpointError, HubError
from .hub_fetch import Hub, HubFile, Unreachable

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*.model",
)
"""What besides the weights is fetched: configuration, tokenizer, chat template."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Where a model lies."""

    path: Path
    """A directory in Hugging Face's layout, or one GGUF file."""
    sha: str | None
    """The commit it was fetched at; None for local files."""
    kind: Literal["safetensors", "gguf"]


def resolve(
    model_id: str,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    *,
    weights: bool = True,
    retry_wait_s: float = 1.0,
) -> ResolvedModel:
    """Find a model, fetching what is missing.

    Args:
        model_id: a directory, a GGUF file, a Hub repository `owner/name`, or one GGUF file of it `owner/name/file.gguf`.
        revision: branch, tag, commit or `refs/pr/N`; the default branch if None. Not for local files.
        token: for private and gated repositories; None uses HF_TOKEN or the saved login.
        cache_dir: where fetched files are kept; None uses huggingface_hub's cache.
        progress: told about bytes while fetching; huggingface_hub's own bars are off meanwhile.
        weights: False takes a local directory that has none, too: it is served with random ones.
        retry_wait_s: pause before the first retry of a broken connection; doubles each time.

    Raises:
        HubError: nothing there, no permission, no network, or files that cannot be served.
    """
    local = Path(model_id).expanduser()
    if local.exists():
        if revision is not None:
            raise HubError(
                f"{model_id} is on this machine and has no revisions; leave out revision {revision!r}"
            )
        if not weights and (local / "config.json").is_file():
            return ResolvedModel(local, None, "safetensors")
        return _at(local, None)
    if local.is_absolute() or model_id.startswith((".", "~")) or "/" not in model_id:
        raise HubError(
            f"{model_id}: no such file or directory, and no Hub repository (those are named owner/name)"
        )
    repo, file = _split_gguf(model_id)
    hub = Hub(repo, revision or "main", token, Path(cache_dir) if cache_dir else None, retry_wait_s)
    return _from_hub(hub, file, progress)


def _split_gguf(model_id: str) -> tuple[str, str | None]:
    owner, name, *rest = model_id.split("/")
    if not rest:
        return model_id, None
    if not model_id.endswith(".gguf"):
        raise HubError(f"{model_id}: neither a local path nor a Hub repository (those are named owner/name)")
    return f"{owner}/{name}", "/".join(rest)


def _from_hub(hub: Hub, file: str | None, progress: Progress | None) -> ResolvedModel:
    cached = _cached(hub, file)
    if hub.offline:
        if cached is None:
            raise hub.not_cached()
        return cached
    try:
        sha, files = hub.list_files(patient=cached is None)
    except Unreachable:
        # A server must start without the network when it started with it before.
        if cached is None:
            raise
        return cached
    wanted = [_named(file, files, hub)] if file else _wanted(files, hub, sha)
    hub.fetch(sha, wanted, progress)
    # Written last: offline, a revision is found through this file, so it must never name half a model.
    ref = hub.folder / "refs" / hub.revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(sha)
    snapshot = hub.folder / "snapshots" / sha
    return _at(snapshot / file if file else snapshot, sha)


def _cached(hub: Hub, file: str | None) -> ResolvedModel | None:
    """What an earlier call left, if it is complete."""
    sha = hub.revision
    if not re.fullmatch("[0-9a-f]{40}", sha):
        ref = hub.folder / "refs" / hub.revision
        if not ref.is_file():
            return None
        sha = ref.read_text().strip()
    snapshot = hub.folder / "snapshots" / sha
    try:
        return _at(snapshot / file if file else snapshot, sha)
    except HubError:
        return None


def _at(path: Path, sha: str | None) -> ResolvedModel:
    """A model on this machine; raises HubError unless all files of its weights are there."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise HubError(f"{path} is no GGUF file; name the directory to serve safetensors")
        return ResolvedModel(path, sha, "gguf")
    if not path.is_dir():
        raise HubError(f"{path}: no such file or directory")
    names = [entry.name for entry in path.iterdir()]
    weights = _weights(names, str(path))
    if weights.endswith(".gguf"):
        return ResolvedModel(path / weights, sha, "gguf")
    shards = _shards(path / weights) if weights == INDEX else []
    absent = [name for name in ("config.json", *shards) if name not in names]
    if absent:
        raise HubError(f"{path} lacks {', '.join(absent[:5])}{' …' * (len(absent) > 5)}")
    return ResolvedModel(path, sha, "safetensors")


def _weights(names: Sequence[str], where: str) -> str:
    """The file that the weights start from: safetensors before their index before the only GGUF file."""
    for name in (SINGLE, INDEX):
        if name in names:
            return name
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        listed = ", ".join(ggufs[:12]) + " …" * (len(ggufs) > 12)
        raise HubError(
            f"{where} has several GGUF files; name one, as in {where}/{ggufs[0]}. There are: {listed}"
        )
    if any(name.endswith(PICKLES) for name in names):
        raise HubError(f"{where} {pickle_advice(where)}")
    raise HubError(f"{where} has no weights: neither {SINGLE}, {INDEX} nor a .gguf file")


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(read_index(index).values()))
    except (CheckpointError, json.JSONDecodeError) as error:
        raise HubError(str(error)) from None


def _wanted(files: Sequence[HubFile], hub: Hub, sha: str) -> list[HubFile]:
    """The files of a repository that serving it needs."""
    weights = _weights([file.name for file in files], hub.repo)
    if weights.endswith(".gguf"):
        return [_named(weights, files, hub)]
    names = ["config.json", weights]
    if weights == INDEX:
        index = hub.fetch(sha, [_named(INDEX, files, hub)], None)[0]
        names += _shards(index)
    small = [file.name for file in files if any(fnmatchcase(file.name, pattern) for pattern in SMALL_FILES)]
    flat = [name for name in small if "/" not in name or name.startswith("additional_chat_templates/")]
    return [_named(name, files, hub) for name in dict.fromkeys([*flat, *names])]


def _named(name: str, files: Sequence[HubFile], hub: Hub) -> HubFile:
    for file in files:
        if file.name == name:
            return file
    raise HubError(f"{hub.repo} has no file {name} at revision {hub.revision}")
