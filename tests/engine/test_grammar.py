"""Guides and what compiles them, on real llguidance: masks against a language written out, bounds, ends, forced tokens."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from tests.support.guided import MODEL_VOCAB, byte_level, token_bytes
from xlane.engine import InvalidRequest, RequestFailed, SamplingParams, grammar
from xlane.engine.grammar import Grammars, Guide, bits
from xlane.models.errors import TokenizerError
from xlane.models.guidance import guidance_tokenizer

TEXT = byte_level()
BYTES = token_bytes(TEXT)
ENDS = TEXT.eos_ids
PLAIN = SamplingParams(max_tokens=50, stop_ids=ENDS)


def load() -> LLTokenizer:
    return guidance_tokenizer(TEXT, MODEL_VOCAB)


@pytest.fixture(scope="module")
def grammars():
    made = Grammars(load, MODEL_VOCAB)
    yield made
    made.close()


def regex(text: str) -> str:
    return LLMatcher.grammar_from_regex(text)


def guide_of(
    grammars: Grammars, text: str, sampling: SamplingParams = PLAIN, resumed: tuple[int, ...] = ()
) -> Guide:
    return grammars.guide(text, resumed, sampling)


def allowed(mask: np.ndarray) -> set[int]:
    return {token for token in range(mask.size * 32) if mask[token // 32] >> (token % 32) & 1}


def ids(text: str) -> list[int]:
    return TEXT.encode(text, add_special_tokens=False)


letters = st.text("abtrue12", min_size=1, max_size=7)


@settings(max_examples=150, deadline=None)
@given(st.lists(letters, min_size=1, max_size=5, unique=True), st.integers(0, 2**32))
def test_masks_are_those_of_the_language_written_out(words: list[str], seed: int) -> None:
    """A walk through a finite language: at each step exactly the tokens that keep some word within reach, and an end
    where a word is whole. Where only one byte can follow, the token the tokenizer would write is enough."""
    grammars = Grammars(load, MODEL_VOCAB)
    guide = guide_of(grammars, regex("|".join(words)))
    language, said = [word.encode() for word in words], b""
    rng = np.random.default_rng(seed)
    while True:
        left = [word.removeprefix(said) for word in language if word.startswith(said)]
        fitting = {token for token, piece in BYTES.items() if any(rest.startswith(piece) for rest in left)}
        expected = fitting | (set(ENDS) if said in language else set())
        got = allowed(guide.compute())
        if len({rest[:1] for rest in left}) == 1 and said not in language:
            assert got
            assert got <= expected
        else:
            assert got == expected
        token = int(rng.choice(sorted(got)))
        if token in ENDS:
            break
        guide.follow([token])
        said += BYTES[token]
    grammars.close()


@given(st.sets(st.integers(0, MODEL_VOCAB - 1)), st.sampled_from([MODEL_VOCAB, 320, 321]))
def test_bits_are_read_as_they_were_set(tokens: set[int], vocab: int) -> None:
    packed = bits(tokens, vocab)
    assert (packed.dtype, packed.size) == (np.int32, -(-vocab // 32))
    assert allowed(packed) == tokens


def test_tokens_beyond_the_model_are_never_allowed() -> None:
    """A tokenizer may know more tokens than the embedding holds."""
    small = Grammars(load, 70)
    guide = guide_of(small, regex("[ -~]+"), SamplingParams(max_tokens=5, stop_ids=ENDS))
    assert guide.compute().size == 3
    assert allowed(guide.compute()) == {
        token for token in range(70) if BYTES[token].isascii() and BYTES[token].decode().isprintable()
    }
    with pytest.raises(InvalidRequest, match="no token of this model fits"):
        guide_of(small, regex("[m-z]"))  # every letter of it is beyond
    small.close()


def test_a_least_length_holds_the_end_back_only_where_something_else_may_follow(grammars: Grammars) -> None:
    sampling = SamplingParams(max_tokens=9, stop_ids=(ENDS[1], 4), min_tokens=3)
    guide = guide_of(grammars, regex("a{1,4}"), sampling)
    (a,) = ids("a")
    seen = []
    for _ in range(4):
        guide.follow([a])
        seen.append(bool(allowed(guide.compute()) & set(ENDS)))
    assert seen == [False, False, True, True]
    guide = guide_of(grammars, regex("a"), sampling)
    guide.follow([a])
    assert allowed(guide.compute()) == set(ENDS)


def test_an_ignored_end_comes_only_where_the_grammar_ends(grammars: Grammars) -> None:
    guide = guide_of(grammars, regex("a{1,3}"), SamplingParams(max_tokens=9))
    (a,) = ids("a")
    seen = []
    for _ in range(3):
        guide.follow([a])
        seen.append(allowed(guide.compute()) & set(ENDS))
    assert seen == [set(), set(), set(ENDS)]
    assert guide.end_ids == set(ENDS)


def test_forced_tokens_are_those_the_tokenizer_would_write(grammars: Grammars) -> None:
    guide = guide_of(grammars, regex("x(true, abab|y)z"))
    guide.follow(ids("x"))
    assert guide.forced(20) == []  # two ways
    guide.follow(ids("t"))
    assert TEXT.decode(guide.forced(20), False) == "rue, ababz<eos>"


def test_no_more_are_forced_than_there_is_room_for_and_the_rest_comes_later(grammars: Grammars) -> None:
    guide = guide_of(grammars, regex("0123456789"))
    assert guide.forced(0) == []
    assert TEXT.decode(guide.forced(6)) == "0123456"  # 12 is one token
    assert allowed(guide.compute()) == set(ids("7"))
    assert TEXT.decode(guide.forced(3), False) == "789"
    assert guide.forced(5, may_end=False) == []
    assert allowed(guide.compute()) == set(ENDS)
    assert guide.forced(1) == [ENDS[0]]


def test_few_forced_tokens_are_left_to_the_mask_unless_the_output_ends_with_them(grammars: Grammars) -> None:
    guide = guide_of(grammars, regex("xyz[ab]c"))
    assert guide.forced(20) == []
    assert allowed(guide.compute()) == set(ids("x"))
    guide.follow(ids("xyzb"))
    assert TEXT.decode(guide.forced(20), False) == "c<eos>"


def test_a_request_for_log_probabilities_is_never_forced_ahead(grammars: Grammars) -> None:
    guide = guide_of(
        grammars, regex("0123456789"), SamplingParams(max_tokens=9, stop_ids=ENDS, logprobs=True)
    )
    assert guide.forced(20) == []


def test_the_end_that_is_appended_is_one_the_request_knows(grammars: Grammars) -> None:
    guide = guide_of(grammars, regex("a"), SamplingParams(max_tokens=9, stop_ids=(7, ENDS[1])))
    assert guide.forced(9)[-1] == ENDS[1]
    guide = guide_of(grammars, regex("a"), SamplingParams(max_tokens=9))
    assert guide.forced(9)[-1] == ENDS[0]


def test_resumed_tokens_are_gone_through_and_must_fit(grammars: Grammars) -> None:
    guide = guide_of(grammars, regex("a(b|c)d"), resumed=tuple(ids("ac")))
    assert allowed(guide.mask.result()) == set(ids("d"))
    with pytest.raises(InvalidRequest, match=r"token \d+ does not follow the grammar"):
        guide_of(grammars, regex("a(b|c)d"), resumed=tuple(ids("ad")))


def test_a_token_that_does_not_fit_fails(grammars: Grammars) -> None:
    guide = guide_of(grammars, regex("ab"))
    with pytest.raises(RequestFailed, match="does not follow"):
        guide.follow(ids("x"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "missing field `grammars`"),
        (regex("(a"), "unclosed group"),
        (LLMatcher.grammar_from_json_schema({"type": "foo"}), "Invalid type: foo"),
        (LLMatcher.grammar_from_json_schema({"type": "object", "unevaluatedProperties": 3}), "unevaluatedProperties"),
        (LLMatcher.grammar_from_lark("start: /a/ foo"), 'unknown name: "foo"'),
        (LLMatcher.grammar_from_json_schema({"enum": ["x" * (1 << 20)]}), "at most 1048576 are taken"),
        (LLMatcher.grammar_from_json_schema({"properties": {f"p{i}": {"type": "string"} for i in range(9000)}}), "9000 optional properties"),
    ],
)  # fmt: skip
def test_a_grammar_that_is_wrong_or_too_large_is_refused_with_the_reason(
    grammars: Grammars, text: str, words: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        guide_of(grammars, text)
    assert words in str(refused.value)
    assert "non-verbose" not in str(refused.value)


def test_a_grammar_that_grows_beyond_its_bounds_while_it_runs_fails(grammars: Grammars) -> None:
    guide = guide_of(grammars, regex("(((a{1,100}){1,100}){1,100}){1,100}"))
    with pytest.raises(RequestFailed, match="too many expressions"):  # noqa: PT012
        for _ in range(60):
            guide.follow(ids("a"))
            guide.compute()


def test_one_grammar_asked_for_by_many_is_compiled_once_and_the_last_used_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[str] = []

    def slowly(tokenizer: LLTokenizer, text: str, **options) -> LLMatcher:
        compiled.append(text)
        time.sleep(0.02)
        return LLMatcher(tokenizer, text, **options)

    monkeypatch.setattr(grammar, "LLMatcher", slowly)
    monkeypatch.setattr(grammar, "KEPT_GRAMMARS", 2)
    monkeypatch.setattr(grammar, "COMPILING", 1)
    made = Grammars(load, MODEL_VOCAB)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: guide_of(made, regex("a")), range(16)))
    assert compiled == [regex("a")]
    for text in ("b", "a", "c", "a", "b"):
        guide_of(made, regex(text))
    assert compiled == [regex(text) for text in "abcb"]
    made.close()


def test_the_tokenizer_is_made_once_at_the_first_grammar_and_one_that_cannot_be_is_named() -> None:
    calls: list[int] = []

    def count() -> LLTokenizer:
        calls.append(1)
        return load()

    def refuse() -> LLTokenizer:
        calls.append(1)
        raise TokenizerError("the tokenizer cannot be used with grammars: it has no bytes")

    made = Grammars(count, MODEL_VOCAB)
    assert calls == []
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: guide_of(made, regex("a")), range(8)))
    assert calls == [1]
    made.close()
    bad = Grammars(refuse, MODEL_VOCAB)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=r"this model takes no grammar: .* it has no bytes"):
            guide_of(bad, regex("a"))
    assert calls == [1, 1]
    bad.close()


def test_masks_of_many_guides_at_once_are_those_of_each_alone(grammars: Grammars) -> None:
    text = LLMatcher.grammar_from_json_schema(
        {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}
    )
    walks = [
        ids(walk) for walk in ('{"a": "x y z"}', '{"b": 12, "c": [1, 2]}', "{}", '{"a": "true", "b": -1}')
    ]
    alone = []
    for walk in walks:
        guide = guide_of(grammars, text)
        alone.append([])
        for token in walk:
            guide.follow([token])
            alone[-1].append(guide.compute())
    together = [guide_of(grammars, text) for _ in walks]
    for step in range(max(map(len, walks))):
        moved = [
            (guide, walk, masks) for guide, walk, masks in zip(together, walks, alone) if step < len(walk)
        ]
        for guide, walk, _ in moved:
            guide.follow([walk[step]])
            guide.prepare()
        for guide, _, masks in moved:
            np.testing.assert_array_equal(guide.mask.result(10), masks[step])


def test_compiling_leaves_the_interpreter_to_others(grammars: Grammars) -> None:
    """Another thread goes on while a large grammar is compiled, as an engine's loop must."""
    text = LLMatcher.grammar_from_json_schema(
        {"properties": {f"p{i}": {"type": "string"} for i in range(1500)}}
    )
    beats: list[float] = []
    done = threading.Event()

    def beat() -> None:
        while not done.is_set():
            beats.append(time.perf_counter())
            time.sleep(0.002)

    thread = threading.Thread(target=beat)
    thread.start()
    started = time.perf_counter()
    guide_of(grammars, text)
    ended = time.perf_counter()
    done.set()
    thread.join()
    during = [at for at in beats if started <= at <= ended]
    assert ended - started > 0.05
    assert len(during) > 0.2 * (ended - started) / 0.005
