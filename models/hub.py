"""A model id to a folder or file on this machine: local as it is, else fetched from the Hub into its usual cache.

Knows what a model on this machine looks like; the Hub's repositories are `hub_repo.py`'s. Nothing is read from the weights.
HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and the saved login work as huggingface_hub defines them.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .checkpoint import INDEX, PICKLES, SINGLE, pickle_advice, read_index
from .errors import CheckpointError, HubError

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Where a model lies."""

    path: Path
    """A directory in Hugging Face's layout, or one GGUF file."""
    sha: str | None
    """The commit it was fetched at; None for local files."""
    kind: Literal["safetensors", "gguf"]


@contextmanager
def _explained() -> Iterator[None]:
    """What the file system refuses is a HubError too."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise HubError(f"{what}; give this user the right to use it, or choose another place") from error


@_explained()
def resolve(
    model_id: str,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    *,
    weights: bool = True,
    ask: bool = True,
    retry_wait_s: float = 1.0,
) -> ResolvedModel:
    """Find a model, fetching what is missing.

    Args:
        model_id: a directory, a GGUF file, a Hub repository `owner/name`, or one GGUF file of it `owner/name/file.gguf`.
        revision: branch, tag, commit or `refs/pr/N`; the default branch if None. Not for local files.
        token: for private and gated repositories; None uses HF_TOKEN or the saved login.
        cache_dir: where fetched files are kept; None uses huggingface_hub's cache.
        progress: told about bytes while fetching; huggingface_hub's own bars are off meanwhile.
        weights: False fetches none, and takes a local directory that has none: for a plan, or random ones.
        ask: False takes what is here, without a word to the Hub, which is known to be silent.
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
        return model_at(local, None)
    if local.is_absolute() or model_id.startswith((".", "~")) or "/" not in model_id:
        raise HubError(
            f"{model_id}: no such file or directory, and no Hub repository (those are named owner/name)"
        )
    repo, file = _split_gguf(model_id)
    # What is on this machine must not wait for the Hub's client to be imported.
    from .hub_fetch import Hub
    from .hub_repo import from_hub

    kept = Path(cache_dir) if cache_dir else None
    hub = Hub(repo, revision or "main", token, kept, retry_wait_s)
    return from_hub(hub, file, progress, weights=weights, ask=ask)


@dataclass(frozen=True, slots=True)
class HubState:
    """Whether the Hub can be asked."""

    endpoint: str
    cache_dir: str
    """Where it is kept what was fetched, unless told otherwise."""
    offline: bool
    """HF_HUB_OFFLINE forbids to ask."""
    error: str
    """Why it does not answer; empty if it does, or was not asked."""


def hub_state(timeout_s: float) -> HubState:
    """Ask the configured endpoint for a sign of life, for at most `timeout_s`."""
    from .hub_fetch import constants, sign_of_life

    offline = constants.HF_HUB_OFFLINE
    error = "" if offline else sign_of_life(timeout_s)
    return HubState(constants.ENDPOINT, constants.HF_HUB_CACHE, offline, error)


@_explained()
def resolve_adapter(adapter: str, cache_dir: str | Path | None = None, retry_wait_s: float = 1.0) -> Path:
    """The folder of an adapter: a directory, or a Hub repository `owner/name` or `owner/name@revision`, fetched if need be.

    Raises HubError.
    """
    local = Path(adapter).expanduser()
    if local.is_dir():
        return local.absolute()
    repo, _, revision = adapter.partition("@")
    if local.is_absolute() or repo.startswith((".", "~")) or repo.count("/") != 1:
        raise HubError(f"{adapter}: no such directory, and no Hub repository (those are named owner/name)")
    from .hub_fetch import Hub
    from .hub_repo import adapter_from_hub

    kept = Path(cache_dir) if cache_dir else None
    return adapter_from_hub(Hub(repo, revision or "main", None, kept, retry_wait_s))


def _split_gguf(model_id: str) -> tuple[str, str | None]:
    owner, name, *rest = model_id.split("/")
    if not rest:
        return model_id, None
    if not model_id.endswith(".gguf"):
        raise HubError(f"{model_id}: neither a local path nor a Hub repository (those are named owner/name)")
    return f"{owner}/{name}", "/".join(rest)


@_explained()
def model_at(path: Path, sha: str | None) -> ResolvedModel:
    """A model on this machine. Raises HubError unless all files of its weights are there."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise HubError(f"{path} is no GGUF file; name the directory to serve safetensors")
        return ResolvedModel(path, sha, "gguf")
    if not path.is_dir():
        raise HubError(f"{path}: no such file or directory")
    names = [entry.name for entry in path.iterdir()]
    weights = weights_file(names, str(path))
    if weights.endswith(".gguf"):
        return ResolvedModel(path / weights, sha, "gguf")
    shards = shard_files(path / weights) if weights == INDEX else []
    absent = [name for name in ("config.json", *shards) if name not in names]
    if absent:
        raise HubError(f"{path} lacks {', '.join(absent[:5])}{' …' * (len(absent) > 5)}")
    return ResolvedModel(path, sha, "safetensors")


def weights_file(names: Sequence[str], where: str) -> str:
    """The file that the weights start from: safetensors before their index before the only GGUF file. Raises HubError."""
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


def shard_files(index: Path) -> list[str]:
    """The files that an index names. Raises HubError."""
    try:
        return sorted(set(read_index(index).values()))
    except (CheckpointError, json.JSONDecodeError) as error:
        raise HubError(str(error)) from None
