"""A repository of the Hub to a model on this machine: which of its files are needed, and what an earlier call left of them.

How bytes travel and fail is `hub_fetch.py`'s; what a model on this machine looks like, `hub.py`'s.
"""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from .checkpoint import INDEX
from .errors import HubError
from .hub import ADAPTER_FILES, Progress, ResolvedModel, model_at, shard_files, weights_file
from .hub_fetch import Hub, HubFile, Unreachable

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
WHOLE, DESCRIBED = "refs", "described"
"""Folders of notes, one a revision: all of it is here, or all but its weights. The first is huggingface_hub's own."""


def from_hub(
    hub: Hub, file: str | None, progress: Progress | None, *, weights: bool = True, ask: bool = True
) -> ResolvedModel:
    """The model of a repository, or one GGUF `file` of it, fetched unless all of it is here: of safetensors only what
    describes them, without `weights`. The Hub is asked only if it is to be. Raises HubError."""
    cached = _cached(hub, file) or (None if weights else _described(hub))
    listed = _listed(hub, kept=cached is not None, ask=ask)
    if cached is not None and listed is None:
        return cached
    assert listed is not None, "or it is refused"
    sha, files = listed
    wanted = [_named(file, files, hub)] if file else _wanted(files, hub, sha, weights)
    hub.fetch(sha, wanted, progress)
    if not weights and not wanted[-1].name.endswith(".gguf"):
        return ResolvedModel(_keep(hub, sha, DESCRIBED), sha, "safetensors")
    snapshot = _keep(hub, sha)
    return model_at(snapshot / file if file else snapshot, sha)


def adapter_from_hub(hub: Hub) -> Path:
    """The folder of a repository's adapter, fetched unless all of it is here. Raises HubError."""
    kept = _snapshot(hub)
    if kept is not None and not all((kept / name).is_file() for name in ADAPTER_FILES):
        kept = None
    listed = _listed(hub, kept=kept is not None)
    if kept is not None and listed is None:
        return kept
    assert listed is not None, "or it is refused"
    sha, files = listed
    hub.fetch(sha, [_named(name, files, hub) for name in ADAPTER_FILES], None)
    return _keep(hub, sha)


def _listed(hub: Hub, *, kept: bool, ask: bool = True) -> tuple[str, list[HubFile]] | None:
    """The commit and its files; None where the Hub is not asked or does not answer, and what is kept will do. Raises HubError."""
    if not kept and hub.offline:
        raise hub.not_cached()
    if not kept and not ask:
        raise hub.silent()
    if hub.offline or not ask:
        return None
    try:
        return hub.list_files(patient=not kept)
    except Unreachable:
        # A server must start without the network when it started with it before.
        if not kept:
            raise
        return None


def _keep(hub: Hub, sha: str, notes: str = WHOLE) -> Path:
    """Note that a revision is here -> its folder. Last of all: offline, it is found through this file, so that it must never
    name half a model."""
    ref = hub.folder / notes / hub.revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(sha)
    return hub.folder / "snapshots" / sha


def _snapshot(hub: Hub) -> Path | None:
    """The folder of a revision, if an earlier call noted that it is here."""
    sha = hub.revision
    if not re.fullmatch("[0-9a-f]{40}", sha):
        ref = hub.folder / WHOLE / hub.revision
        if not ref.is_file():
            return None
        sha = ref.read_text().strip()
    return hub.folder / "snapshots" / sha


def _cached(hub: Hub, file: str | None) -> ResolvedModel | None:
    """What an earlier call left, if it is complete."""
    snapshot = _snapshot(hub)
    if snapshot is None:
        return None
    try:
        return model_at(snapshot / file if file else snapshot, snapshot.name)
    except HubError:
        return None


def _described(hub: Hub) -> ResolvedModel | None:
    """What an earlier call left that fetched no weights, if it is complete."""
    note = hub.folder / DESCRIBED / hub.revision
    if not note.is_file():
        return None
    snapshot = hub.folder / "snapshots" / note.read_text().strip()
    there = (snapshot / "config.json").is_file()
    return ResolvedModel(snapshot, snapshot.name, "safetensors") if there else None


def _wanted(files: Sequence[HubFile], hub: Hub, sha: str, weights: bool) -> list[HubFile]:
    """The files of a repository that serving it needs; a GGUF file has its description in it."""
    start = weights_file([file.name for file in files], hub.repo)
    if start.endswith(".gguf"):
        return [_named(start, files, hub)]
    names = ["config.json", start] if weights else ["config.json"]
    if weights and start == INDEX:
        index = hub.fetch(sha, [_named(INDEX, files, hub)], None)[0]
        names += shard_files(index)
    small = [file.name for file in files if any(fnmatchcase(file.name, pattern) for pattern in SMALL_FILES)]
    flat = [name for name in small if "/" not in name or name.startswith("additional_chat_templates/")]
    return [_named(name, files, hub) for name in dict.fromkeys([*flat, *names])]


def _named(name: str, files: Sequence[HubFile], hub: Hub) -> HubFile:
    for file in files:
        if file.name == name:
            return file
    raise HubError(f"{hub.repo} has no file {name} at revision {hub.revision}")
