"""Who may ask for work, and how much: keys by name, each with its limits, and what each has used.

A file has one key a line, NAME KEY [LIMIT=NUMBER …] [weight=NUMBER] [admin], and is read again when it changes. Keys are kept as digests; neither
they nor anything made from them but the name is ever logged or shown. Knows no HTTP.
"""

import hashlib
import hmac
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from time import monotonic

from .errors import RateLimited
from .files import Watched
from .options import UsageError

MAX_KEYS = 1_000
"""Every key is compared with what was sent, and every name is a label of the metrics."""
WEIGHT, ADMIN = "weight", "admin"
MAX_WEIGHT = 1_000
MINUTE_S = 60.0
DEFAULT = "default"
"""The name of --api-key."""
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_logger = logging.getLogger("xlane.keys")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one key may do; infinity is no limit."""

    requests_per_min: float = math.inf
    tokens_per_min: float = math.inf
    """Prompt and output. Known only once they are made, so what is too much is made up for by waiting."""
    concurrency: float = math.inf
    """Requests at once."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key."""

    name: str
    digest: bytes
    limits: Limits = Limits()
    salt: str = ""
    """Keeps its cached prompts apart from other keys', whose requests cannot know it."""
    weight: int = 1
    """Its share beside other keys while both wait, up to MAX_WEIGHT."""
    admin: bool = False
    """Whether it may change what is served."""


def key_of(
    name: str,
    text: str,
    limits: Limits = Limits(),
    *,
    apart: bool = False,
    weight: int = 1,
    admin: bool = False,
) -> Key:
    """A key from its text. `apart`: whether there are others to be kept apart from."""
    digest = _digest(text.encode())
    salt = hashlib.sha256(b"cache" + digest).hexdigest() if apart else ""
    return Key(name, digest, limits, salt, weight, admin)


def read_keys(path: str) -> tuple[Key, ...]:
    """The keys of a file. Raises UsageError, which names the line and never the key."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--api-key-file {path}: {getattr(error, 'strerror', None) or 'is no text'}"
        ) from None
    keys = [
        _parse(f"--api-key-file {path}, line {number}", line.split())
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    for what, values in (("name", [key.name for key in keys]), ("key", [key.digest for key in keys])):
        if len(set(values)) < len(values):
            raise UsageError(f"--api-key-file {path}: two keys have the same {what}")
    if not 0 < len(keys) <= MAX_KEYS:
        raise UsageError(
            f"--api-key-file {path}: has {len(keys)} keys; expected 1 to {MAX_KEYS}, as lines NAME KEY"
        )
    return tuple(keys)


def _parse(place: str, words: Sequence[str]) -> Key:
    name, *rest = words
    if not _NAME.fullmatch(name) or not rest:
        raise UsageError(
            f"{place}: expected NAME KEY [LIMIT=NUMBER …] [weight=NUMBER] [admin], the name of letters, digits, '.', '_' and '-'"
        )
    known = [*(field.name for field in fields(Limits)), WEIGHT]
    given: dict[str, float] = {}
    for word in rest[1:]:
        if word == ADMIN:
            continue
        limit, _, raw = word.partition("=")
        if limit not in known:
            raise UsageError(f"{place}: {limit[:40]} is no limit; there are {', '.join(known)}")
        if not raw.isdecimal() or not int(raw):
            raise UsageError(f"{place}: {limit} has to be a whole number of at least 1")
        given[limit] = float(raw)
    weight = int(given.pop(WEIGHT, 1))
    if weight > MAX_WEIGHT:
        raise UsageError(f"{place}: {WEIGHT} has to be at most {MAX_WEIGHT}")
    return key_of(name, rest[0], Limits(**given), apart=True, weight=weight, admin=ADMIN in rest[1:])


class Account:
    """What one key uses. Used from one event loop."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.running = 0
        self.requests = self.prompt_tokens = self.generated_tokens = 0
        self.refused = Counter(dict.fromkeys((field.name for field in fields(Limits)), 0))
        self._left = {
            "requests_per_min": key.limits.requests_per_min,
            "tokens_per_min": key.limits.tokens_per_min,
        }
        self._at = monotonic()

    def renew(self, key: Key) -> None:
        """Go on under this key, of the same name; what is left is no more than it allows."""
        self.key = key
        self._left = {name: min(left, getattr(key.limits, name)) for name, left in self._left.items()}

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request for as long as the block. Raises RateLimited."""
        self._fill()
        limits = self.key.limits
        if self.running >= limits.concurrency:
            self._refuse("concurrency", 1.0)
        for name, least in (("requests_per_min", 1.0), ("tokens_per_min", 0.0)):
            if (left := self._left[name]) < least or left <= 0.0:
                self._refuse(name, (least - left) * MINUTE_S / getattr(limits, name))
        self._left["requests_per_min"] -= 1.0
        self.requests += 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def used(self, prompt_tokens: int, generated_tokens: int) -> None:
        """Tokens were computed for it."""
        self.prompt_tokens += prompt_tokens
        self.generated_tokens += generated_tokens
        self._left["tokens_per_min"] -= prompt_tokens + generated_tokens

    def _fill(self) -> None:
        now, limits = monotonic(), self.key.limits
        share = (now - self._at) / MINUTE_S
        self._at = now
        for name, left in self._left.items():
            most: float = getattr(limits, name)
            self._left[name] = most if math.isinf(most) else min(most, left + most * share)

    def _refuse(self, limit: str, retry_after_s: float) -> None:
        self.refused[limit] += 1
        most = getattr(self.key.limits, limit)
        raise RateLimited(f"The key {self.key.name!r} has reached its {limit} of {most:g}", retry_after_s)


class Keys:
    """All keys there are now. Without any, everybody may ask."""

    def __init__(self, key: str | None, path: str | None) -> None:
        """Raises UsageError."""
        if key == "":
            raise UsageError("--api-key is empty; leave it out to ask for none")
        self._own = () if key is None else (key_of(DEFAULT, key, admin=True),)
        self._path = path
        self._watched = None if path is None else Watched([path])
        self.accounts: dict[str, Account] = {}
        """By the key's name."""
        self._take(() if path is None else read_keys(path))

    def __bool__(self) -> bool:
        return bool(self._own) or self._path is not None

    def find(self, presented: bytes) -> Account | None:
        """The account this key opens; takes as long for every key, right or wrong."""
        self._read_again()
        digest, found = _digest(presented), None
        for account in self.accounts.values():
            if hmac.compare_digest(account.key.digest, digest):
                found = account
        return found

    def _read_again(self) -> None:
        if self._watched is None or self._path is None or not self._watched.changed():
            return
        try:
            keys = read_keys(self._path)
            self._take(keys)
            _logger.info("%d keys were read anew from %s", len(keys), self._path)
        except UsageError as error:
            _logger.error("the keys stay as they were: %s", error)

    def _take(self, keys: Sequence[Key]) -> None:
        """Names that are still there go on where they are."""
        if self._own and any(key.name == DEFAULT for key in keys):
            raise UsageError(f"--api-key-file {self._path}: the name {DEFAULT!r} is that of --api-key")
        before, self.accounts = self.accounts, {}
        for key in (*self._own, *keys):
            account = before.get(key.name)
            if account is None:
                account = Account(key)
            else:
                account.renew(key)
            self.accounts[key.name] = account


ACCOUNT: ContextVar[Account | None] = ContextVar("xlane_account", default=None)
"""Of the HTTP request now handled; None if no key was asked for."""


def own_salt() -> str:
    """What keeps the cached prompts of the request now handled apart, if it brings no salt itself."""
    account = ACCOUNT.get()
    return "" if account is None else account.key.salt


def own_share() -> tuple[str, int]:
    """The owner of the request now handled, and its weight. All that come without a key are one."""
    account = ACCOUNT.get()
    return ("", 1) if account is None else (account.key.name, account.key.weight)


def _digest(key: bytes) -> bytes:
    # Digests have one length, so comparing them tells nothing of the key's.
    return hashlib.sha256(key).digest()
