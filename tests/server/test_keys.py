"""Keys: whose they are, what each may do and has done, and which routes ask for one."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from xlane.server import files, keys
from xlane.server.app import create_app, routes
from xlane.server.auth import GUARDED
from xlane.server.backend import Backend
from xlane.server.config import ServerConfig
from xlane.server.errors import Busy, RateLimited
from xlane.server.front import Permits
from xlane.server.keys import Account, Keys, Limits, key_of, read_keys
from xlane.server.options import UsageError
from xlane.server.ui import routes as ui

from ..support.byte_tokenizer import ByteTokenizer
from ..support.fake_engine import FakeEngine

FILE = """\
# name key limits
alice  a-key
bob    b-key  requests_per_min=2 tokens_per_min=1000 concurrency=1
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "keys"
    file.write_text(FILE)
    return str(file)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(path: str, engine: FakeEngine) -> Iterator[TestClient]:
    backend = Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    with TestClient(create_app(backend, ServerConfig(api_key_file=path))) as client:
        yield client


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [monotonic()]
    for module in (keys, files):
        monkeypatch.setattr(module, "monotonic", lambda: now_s[0])
    return now_s


def ask(client: TestClient, key: str | bytes, **fields: Any) -> Any:
    raw = key if isinstance(key, bytes) else key.encode()
    body = {"prompt": "abcd", "max_tokens": 3, "temperature": 0, **fields}
    return client.post("/v1/completions", json=body, headers={"authorization": b"Bearer " + raw})


OPEN = {
    "/", "/health", "/ping", "/v1/health", "/v2/health/live", "/v2/health/ready",  # is it there
    "/metrics",  # what it does
    "/info", "/v1/models", "/models", "/v1/models/{model:path}", "/models/{model:path}", "/v2",  # what it serves
    "/v2/models/{model:path}", "/v2/models/{model:path}/ready", "/v2/models/{model:path}/versions/{version}",
    "/v2/models/{model:path}/versions/{version}/ready",
    "/docs", "/api-doc/openapi.json",  # how it is asked
    "/ui", *(f"/ui/{name}" for name in (ui.STYLE, *ui.SCRIPTS)),  # a page that asks with the key its reader types
    "/my-health",
}  # fmt: skip
"""GET routes that ask for no key, as in TGI. None takes work, and none changes anything."""


def test_every_route_asks_for_a_key_or_is_listed_here(client: TestClient, path: str):
    config = ServerConfig(api_key_file=path, predict_route="/my-predict", health_route="/my-health")
    seen: set[str] = set()
    with TestClient(create_app(Backend(), config)) as client:
        for route in routes(config):
            assert isinstance(route, Route)
            at = route.path.replace("{model:path}", "m").replace("{version}", "1")
            for method in (route.methods or set()) - {"HEAD"}:
                answer = client.request(method, at)
                if method == "GET" and route.path in GUARDED:
                    assert answer.status_code == 401
                elif method == "GET":
                    assert answer.status_code != 401
                    seen.add(route.path)
                else:
                    assert (method, answer.status_code) == ("POST", 401), route.path
                    assert answer.headers["www-authenticate"] == "Bearer"
    assert seen == OPEN


@pytest.mark.parametrize(
    ("method", "at"),
    [("GET", f"/ui{there}") for there in ("//lanes", "/lanes/", "/%6canes", "/lanes?x=/health")]
    + [
        ("POST", at)
        for at in ("//v1/completions", "/v1/completions/", "/v1/%63ompletions", "/v1//completions?a=/health")
    ],
)
def test_another_spelling_of_a_path_opens_no_door(client: TestClient, method: str, at: str):
    answer = client.request(
        method, f"http://testserver{at}", json={"prompt": "a"} if method == "POST" else None
    )
    assert answer.status_code == 401


@pytest.mark.parametrize("bearer", ["", "a-ke", "a-key2", "A-KEY", "x" * 20_000, b"\xff\xfe", "b-key a-key"])
def test_a_wrong_key_is_401_and_never_shown(client: TestClient, bearer: str | bytes):
    answer = ask(client, bearer)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "key2" not in answer.text


@pytest.mark.parametrize(
    "headers",
    [{"authorization": "Bearer a-key"}, {"authorization": "bearer  a-key"}, {"x-api-key": "a-key"},
     {"authorization": "Bearer wrong", "x-api-key": "a-key"}],
)  # fmt: skip
def test_a_right_key_is_taken_from_either_header(client: TestClient, headers: dict[str, str]):
    asked = {"messages": [{"role": "user", "content": "a"}]}
    answer = client.post("/v1/messages/count_tokens", json=asked, headers=headers)
    assert answer.status_code == 200


def test_all_keys_are_compared_whichever_is_right(path: str, monkeypatch: pytest.MonkeyPatch):
    compared: list[bytes] = []
    real = keys.hmac.compare_digest

    def count(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return real(one, other)

    monkeypatch.setattr(keys.hmac, "compare_digest", count)
    found = Keys("own", path)
    for key in (b"own", b"a-key", b"b-key", b"none", b""):
        compared.clear()
        account = found.find(key)
        assert (account is None) == (key in (b"none", b""))
        assert len(compared) == 3
        assert {len(digest) for digest in compared} == {32}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has 0 keys"),
        ("alice", "line 1: expected NAME KEY"),
        ("a/b s3cret", "line 1: expected NAME KEY"),
        (
            "\na s3cret speed=5",
            "line 2: speed is no limit; there are requests_per_min, tokens_per_min, concurrency, weight",
        ),
        ("a s3cret concurrency=0", "line 1: concurrency has to be a whole number of at least 1"),
        ("a s3cret\na other", "two keys have the same name"),
        ("a s3cret\nb s3cret", "two keys have the same key"),
        ("\n".join(f"n{i} k{i}" for i in range(1001)), "has 1001 keys; expected 1 to 1000"),
    ],
)
def test_a_file_that_is_wrong_is_told_of_without_its_keys(tmp_path: Path, text: str, words: str):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(UsageError) as told:
        read_keys(str(file))
    assert words in str(told.value)
    assert "s3cret" not in str(told.value)
    with pytest.raises(UsageError, match="No such file"):
        read_keys(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="--api-key is empty"):
        Keys("", None)


def test_a_new_file_is_read_while_serving_and_a_broken_one_is_not(
    client: TestClient, path: str, clock: list[float], caplog: pytest.LogCaptureFixture
):
    assert ask(client, "a-key").status_code == 200
    Path(path).write_text("carol c-key\nalice a-key")
    assert ask(client, "c-key").status_code == 401, "it is looked at once a second"
    clock[0] += 1.5
    assert [ask(client, key).status_code for key in ("c-key", "a-key", "b-key")] == [200, 200, 401]
    assert 'xlane_key_requests_total{key="alice"} 2.0' in client.get("/metrics").text
    Path(path).write_text("carol")
    clock[0] += 1.5
    assert ask(client, "c-key").status_code == 200
    assert "the keys stay as they were" in caplog.text
    assert "c-key" not in caplog.text


def test_the_limits_of_a_key_are_its_own(client: TestClient, clock: list[float]):
    assert [ask(client, "b-key").status_code for _ in range(3)] == [200, 200, 429]
    refused = ask(client, "b-key")
    assert refused.json()["error"]["message"] == "The key 'bob' has reached its requests_per_min of 2"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert (refused.headers["retry-after"], refused.headers["x-should-retry"]) == ("30", "true")
    assert ask(client, "a-key").status_code == 200
    clock[0] += 30
    assert ask(client, "b-key").status_code == 200


def test_tokens_are_counted_when_they_are_made_and_paid_back_in_time(clock: list[float]):
    account = Account(key_of("k", "x", Limits(tokens_per_min=100)))
    with account.request():
        account.used(150, 10)
    with pytest.raises(RateLimited, match="tokens_per_min of 100") as refused, account.request():
        pass
    assert refused.value.retry_after_s == pytest.approx(36.0)
    clock[0] += 36.1
    with account.request():
        pass
    clock[0] += 3600
    with account.request():
        account.used(99, 0)
    with account.request():
        pass  # An hour brings no more than a minute's.
    assert (account.requests, account.prompt_tokens, account.generated_tokens) == (4, 249, 10)
    assert account.refused == {"tokens_per_min": 1, "requests_per_min": 0, "concurrency": 0}


def test_so_many_requests_at_once(clock: list[float]):
    account = Account(key_of("k", "x", Limits(concurrency=1)))
    with account.request():
        with pytest.raises(RateLimited, match="concurrency of 1"), account.request():
            pass
        assert account.running == 1
    with pytest.raises(ValueError, match="fails"), account.request():
        raise ValueError("fails")
    assert account.running == 0
    account.renew(key_of("k", "x", Limits()))
    with account.request(), account.request():
        assert not math.isfinite(account.key.limits.concurrency)


def test_what_each_key_used_is_in_the_metrics(client: TestClient):
    ask(client, "a-key", n=2)
    ask(client, "a-key", stream=True)
    ask(client, "b-key")
    ask(client, "none")
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("xlane_key_")]
    assert set(lines) >= {
        'xlane_key_requests_total{key="alice"} 2.0',
        'xlane_key_tokens_total{key="alice",kind="prompt"} 15.0',  # <bos> and four letters, for each sequence
        'xlane_key_tokens_total{key="alice",kind="generated"} 9.0',
        'xlane_key_requests_total{key="bob"} 1.0',
        'xlane_key_running{key="alice"} 0.0',
    }
    assert not any("-key" in line for line in lines)


def test_keys_do_not_share_what_the_prefix_cache_holds(client: TestClient, engine: FakeEngine):
    for key, fields in (
        ("a-key", {}),
        ("b-key", {}),
        ("a-key", {}),
        ("a-key", {"cache_salt": "s"}),
        ("b-key", {"cache_salt": "s"}),
    ):
        ask(client, key, **fields)
    alice, bob, again, salted, salted_too = [request.cache_salt for request in engine.submitted]
    assert alice == again
    assert alice != bob
    assert "" not in (alice, bob)
    assert salted == salted_too == "s"


def test_one_key_alone_shares_with_nobody_anyway(engine: FakeEngine):
    backend = Backend()
    backend.ready(engine, ByteTokenizer(), engine.info_value)
    with TestClient(create_app(backend, ServerConfig(api_key="k"))) as client:
        assert ask(client, "k").status_code == 200
        assert 'xlane_key_requests_total{key="default"} 1.0' in client.get("/metrics").text
    assert engine.submitted[0].cache_salt == ""


def test_a_request_says_whose_it_is_and_what_that_weighs(client: TestClient, engine: FakeEngine, path: str):
    ask(client, "a-key")
    Path(path).write_text(FILE.replace("a-key", "a-key  weight=3"))
    assert [(key.name, key.weight) for key in read_keys(path)] == [("alice", 3), ("bob", 1)]
    client.app.state.front.keys._take(read_keys(path))  # type: ignore[attr-defined]
    ask(client, "a-key", n=2)
    ask(client, "b-key")
    said = [(request.owner, request.weight) for request in engine.submitted]
    assert said == [("alice", 1), ("alice", 3), ("alice", 3), ("bob", 1)]
    Path(path).write_text(FILE.replace("a-key", "a-key  weight=1001"))
    with pytest.raises(UsageError, match="line 2: weight has to be at most 1000"):
        read_keys(path)


def test_one_keys_flood_leaves_places_to_the_others(path: str):
    """Of 18 places a flood gets 16; who holds none yet gets one as long as there is any."""
    several, one = Keys(None, path), Keys("only", None)

    def flood(permits: Permits, account: Account | None, held: ExitStack) -> int:
        token, got = keys.ACCOUNT.set(account), 0
        with suppress(Busy):
            while True:
                held.enter_context(permits.take(1))
                got += 1
        keys.ACCOUNT.reset(token)
        return got

    alice, bob = several.accounts["alice"], several.accounts["bob"]
    with ExitStack() as held:
        permits = Permits(18, several)
        assert [flood(permits, who, held) for who in (alice, bob, alice)] == [16, 1, 0]
        assert [flood(Permits(18, one), who, held) for who in (one.accounts["default"], None)] == [18, 18]
        assert flood(Permits(18, None), alice, held) == 18
    assert permits.taken == 0
    assert flood(permits, bob, ExitStack()) == 16
