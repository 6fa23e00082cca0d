"""One repository of the Hub over the network: list, fetch, try again, and say in plain words why it did not work.

Speaks only through huggingface_hub, 0.36 or 1.x. Knows no model formats.
"""

import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import get_session  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from .errors import HubError

ATTEMPTS = 5
"""Tries of one call before a broken connection is an error."""
PARALLEL_FILES = 4
POLL_S = 0.25
"""Pause between two looks at how much has arrived."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
_T = TypeVar("_T")


class Unreachable(HubError):
    """The Hub did not answer: the one failure that an earlier download can stand in for."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository."""

    name: str
    size: int
    blob: str
    """Its name in the cache: the SHA-256 of a large file, the git id of a small one."""


@dataclass(frozen=True, slots=True)
class Hub:
    """One revision of one repository."""

    repo: str
    revision: str
    token: str | None
    cache_dir: Path | None
    retry_wait_s: float

    @property
    def folder(self) -> Path:
        """The repository's place in the cache."""
        return Path(self.cache_dir or constants.HF_HUB_CACHE) / f"models--{self.repo.replace('/', '--')}"

    @property
    def offline(self) -> bool:
        """Whether HF_HUB_OFFLINE forbids the network."""
        return constants.HF_HUB_OFFLINE

    def not_cached(self) -> HubError:
        """Offline, and the files are not here."""
        return HubError(
            f"{self.repo} (revision {self.revision}) is not completely in {self.folder}, and HF_HUB_OFFLINE forbids "
            "fetching it: unset HF_HUB_OFFLINE, or download the model where there is a network and keep its cache"
        )

    def silent(self) -> Unreachable:
        """The Hub does not answer, and the files are not here."""
        return Unreachable(
            f"{self.repo} is not completely in {self.folder}, and {constants.ENDPOINT} does not answer"
        )

    def list_files(self, patient: bool) -> tuple[str, list[HubFile]]:
        """The commit of the revision and its files. `patient` tries again when the Hub does not answer."""
        api = huggingface_hub.HfApi(token=self.token)

        def ask() -> huggingface_hub.hf_api.ModelInfo:
            return api.model_info(self.repo, revision=self.revision, files_metadata=True, timeout=10)

        info = self._try(ask, ATTEMPTS if patient else 1)
        if info.sha is None:
            raise HubError(f"{self.repo}: {constants.ENDPOINT} named no commit for revision {self.revision}")
        files = []
        for file in info.siblings or []:
            blob = file.lfs.sha256 if file.lfs else file.blob_id
            files.append(HubFile(file.rfilename, file.size or 0, blob or ""))
        return info.sha, files

    def fetch(
        self, sha: str, files: Sequence[HubFile], progress: Callable[[int, int], None] | None
    ) -> list[Path]:
        """Bring files of one commit into the cache; what is there already is not fetched again."""

        def fetch(file: HubFile) -> Path:
            return Path(self._try(lambda: self._download(sha, file.name), ATTEMPTS))

        with self._reporting(files, progress), ThreadPoolExecutor(PARALLEL_FILES, "fetch") as pool:
            # Large files first, so that they do not wait for each other at the end.
            order = sorted(files, key=lambda file: -file.size)
            fetching = {file.name: pool.submit(fetch, file) for file in order}
            try:
                return [fetching[file.name].result() for file in files]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _download(self, sha: str, name: str) -> str:
        return str(
            huggingface_hub.hf_hub_download(
                self.repo, name, revision=sha, token=self.token, cache_dir=self.cache_dir
            )
        )

    def _try(self, call: Callable[[], _T], attempts: int) -> _T:
        """Call, again after a pause while the failure is one that passes. What has arrived of a file is kept."""
        for attempt in range(attempts):
            try:
                return call()
            except Exception as raised:
                error = _cause(raised)
                if not _passes(error):
                    raise self._explain(error) from error
                if attempt == attempts - 1:
                    raise self._unreachable(error) from error
            time.sleep(self.retry_wait_s * 2**attempt)
        raise AssertionError("unreachable")

    def _unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(
            f"{self.repo} could not be fetched from {constants.ENDPOINT}: {_first_line(_root(error))}. Check the network, proxy "
            "and HF_ENDPOINT; what has arrived is kept, and the next start goes on from there"
        )

    def _explain(self, error: Exception) -> HubError:
        where, status = f"{constants.ENDPOINT}/{self.repo}", _status(error)
        if isinstance(error, errors.GatedRepoError):
            return HubError(f"{self.repo} is gated: ask for access at {where}, then {self._token_advice()}")
        if isinstance(error, errors.RepositoryNotFoundError):
            return HubError(
                f"{where} does not exist, or is private: check the name, or {self._token_advice()}"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return HubError(
                f"{self.repo} has no revision {self.revision!r}: see {where}/tree/main for what there is"
            )
        if status in (401, 403):
            return HubError(f"{where} answered {status}, no permission: {self._token_advice()}")
        if isinstance(error, errors.HFValidationError):
            return HubError(f"{self.repo!r} cannot be a Hub repository: {_first_line(error)}")
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return HubError(f"{self.repo} cannot be kept in {self.folder}: {error.strerror}")
        return HubError(f"{self.repo} could not be fetched from {constants.ENDPOINT}: {_first_line(error)}")

    def _token_advice(self) -> str:
        if self.token or huggingface_hub.get_token():
            return "use a token that may read it (the one in use may not)"
        return "give a token that may read it (HF_TOKEN)"

    @contextmanager
    def _reporting(
        self, files: Sequence[HubFile], progress: Callable[[int, int], None] | None
    ) -> Iterator[None]:
        """Call `progress` from a thread of its own while the body runs, and once more when it is done."""
        if progress is None:
            yield
            return
        total, finished, had_bars = (
            sum(file.size for file in files),
            threading.Event(),
            not are_progress_bars_disabled(),
        )

        def watch() -> None:
            while not finished.wait(POLL_S):
                progress(sum(self._arrived(file) for file in files), total)

        watcher = threading.Thread(target=watch, name="fetch-progress", daemon=True)
        disable_progress_bars()
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()
            if had_bars:
                enable_progress_bars()
        progress(total, total)

    def _arrived(self, file: HubFile) -> int:
        """Bytes of a file that are in the cache, finished or not: all versions name both after the blob."""
        if not file.blob:
            return 0
        sizes = [0]
        for path in (self.folder / "blobs").glob(f"{file.blob}*"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:  # renamed just now, counted at the next look
                continue
        return min(max(sizes), file.size)


def _status(error: Exception) -> int | None:
    response = error.response if isinstance(error, errors.HfHubHTTPError) else None
    return None if response is None else response.status_code


def _cause(error: Exception) -> Exception:
    """huggingface_hub says "not in the cache" when a request failed; what it failed with is behind that."""
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return error.__cause__
    return error


def _passes(error: Exception) -> bool:
    """Whether trying again may help: the connection broke or was not made, or the Hub is overloaded."""
    if isinstance(error, errors.HfHubHTTPError):
        status = _status(error)
        return status in (408, 429) or (status or 0) >= 500
    if isinstance(error, OSError):  # requests' errors among them
        return error.errno not in _NO_ROOM
    return isinstance(error, _transport_errors())


def _transport_errors() -> tuple[type[Exception], ...]:
    """What a broken connection raises that is no OSError: from version 1 on, huggingface_hub speaks through httpx."""
    if int(huggingface_hub.__version__.split(".")[0]) < 1:
        return ()
    import httpx

    return (httpx.TransportError,)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def sign_of_life(timeout_s: float) -> str:
    """Why the endpoint does not answer within `timeout_s`; empty if it does, whatever it answers."""
    failed = [f"nothing came within {timeout_s:g} s"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=timeout_s)
            failed[0] = ""
        except Exception as error:
            failed[0] = _first_line(_root(error))

    # A name may be looked up for longer than any timeout of a connection.
    asking = threading.Thread(target=ask, name="hub-sign-of-life", daemon=True)
    asking.start()
    asking.join(timeout_s)
    return failed[0]


def _root(error: BaseException) -> BaseException:
    """What began it: the words of the layers above say where it came through."""
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return error
