"""Thinking parted from answers: by hand, and on /v1/chat/completions, whichever of model and template opens it."""

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from xlane.models.tokenizer import TextTokenizer, TokenizerFiles
from xlane.server.config import ServerConfig
from xlane.server.detokenize import Detokenizer
from xlane.server.generate import Done, Ending, Progress, TextToken
from xlane.server.reasoning import Markers, Splitter, find_markers, visible

from ..support.byte_tokenizer import BOS, ByteTokenizer, ThinkingTokenizer
from .conftest import Rig

THINK = Markers("<think>", "</think>")
TEXTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "é"]), max_size=12
)


def progress_of(pieces: list[str]) -> list[Progress]:
    """One token a piece, and an end."""
    found: list[Progress] = []
    start = 0
    for i, piece in enumerate(pieces):
        token = TextToken(i, piece, False, start, -1.0, ())
        start += len(piece)
        done = None
        if i == len(pieces) - 1:
            done = Done(Ending.EOS, "".join(pieces), len(pieces), 0, None, 0.0)
        found.append(Progress(0, (token,), piece, done))
    return found


def split(
    pieces: list[str], *, opened: bool = False, markers: Markers | None = THINK
) -> tuple[str, str, int]:
    """Thinking, answer, and how many tokens are thinking."""
    splitter = Splitter(markers, opened=opened)
    parts = [splitter.of(progress) for progress in progress_of(pieces)]
    return (
        "".join(part.reasoning for part in parts),
        "".join(part.text for part in parts),
        splitter.reasoning_tokens,
    )


@pytest.mark.parametrize(
    ("pieces", "opened", "expected"),
    [
        (["<think>", "\n", "why", "\n", "</think>", "\n\n", "so"], False, ("why", "so", 5)),
        ([" \n<th", "ink>why</th", "ink>so"], False, ("why", "so", 3)),
        (["why", "</think>", "so"], True, ("why", "so", 2)),
        (["a <think>b</think> c"], False, ("", "a <think>b</think> c", 0)),
        (["<thin", "g>"], False, ("", "<thing>", 0)),
        (["<think>", "a </", "b> c"], False, ("a </b> c", "", 3)),
        (["a", " </thi"], True, ("a </thi", "", 2)),
        (["<think>", "</think>", "so"], False, ("", "so", 2)),
        (["<think>a</think>b<think>c</think>d"], False, ("a", "b<think>c</think>d", 1)),
        (["</think>", " \n "], True, ("", "", 1)),
        (["<think"], False, ("", "<think", 0)),
    ],
)
def test_by_hand(pieces: list[str], opened: bool, expected: tuple[str, str, int]):
    assert split(pieces, opened=opened) == expected


@settings(max_examples=300, deadline=None)
@given(TEXTS.filter(bool), st.booleans(), st.data())
def test_how_a_text_is_cut_does_not_matter(pieces: list[str], opened: bool, data: st.DataObject):
    text = "".join(pieces)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    cut = [text[a:b] for a, b in pairwise(cuts)]
    assert split(cut, opened=opened)[:2] == split([text], opened=opened)[:2]


def test_without_markers_everything_is_answer():
    assert split([" <think>", "a</think> "], markers=None) == ("", " <think>a</think> ", 0)


def test_the_span_of_the_answer():
    pieces = ["<think>", "why", "</think>", "\n", "so", " ", "on"]
    splitter = Splitter(THINK)
    tokens = [token for progress in progress_of(pieces) for token in progress.tokens]
    for progress in progress_of(pieces):
        splitter.of(progress)
    assert [token.text for token in visible(tokens, splitter.span)] == ["so", " ", "on"]


class Special(ByteTokenizer):
    """Markers that are tokens, and special ones."""

    words: ClassVar[Mapping[int, str]] = {300: "<think>", 301: "</think>"}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        known = [i for i, word in self.words.items() if word == text]
        return known or super().encode(text, add_special_tokens)

    def token_text(self, token_id: int) -> str:
        return self.words.get(token_id) or super().token_text(token_id)

    def is_special(self, token_id: int) -> bool:
        return token_id in self.words or super().is_special(token_id)


def test_which_models_think():
    assert find_markers(ByteTokenizer()) is None
    assert find_markers(ThinkingTokenizer()) == THINK
    assert find_markers(Special()) == Markers("<think>", "</think>", frozenset({300, 301}))


def test_special_tokens_whose_text_is_wanted():
    text = Detokenizer(Special(), kept_ids=frozenset({300, 301}))
    for token in (300, 97, 301, 98, BOS):
        text.push(token)
    assert text.take() + text.finish() == "<think>a</think>b"


def test_a_tokenizer_and_a_template_as_models_have_them():
    backend = Tokenizer(BPE({char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<think>", "</think>"])
    template = (
        "{{ messages[0].content }}[assistant]"
        "{{ '<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '<think>\\n' }}"
    )
    tokenizer = TextTokenizer(TokenizerFiles(backend, {"default": template}))
    markers = find_markers(tokenizer)
    assert markers is not None
    text = Detokenizer(tokenizer, kept_ids=markers.special_ids)
    for token in tokenizer.encode("<think>é</think>ü", add_special_tokens=False):
        text.push(token)
    assert text.take() + text.finish() == "<think>é</think>ü"
    for thinks in (True, False):
        prompt = tokenizer.apply_chat([{"role": "user", "content": "a"}], enable_thinking=thinks)
        assert markers.left_open(prompt, "") == thinks


def test_where_a_prompt_leaves_thinking_open():
    assert THINK.left_open("…<think>\n", "")
    assert not THINK.left_open("…<think>\n\n</think>\n\n", "")
    assert THINK.left_open("…<think>half a thou", "<think>half a thou")
    assert not THINK.left_open("user: what is <think>? assistant:", "")


@pytest.fixture(params=["the template opens it", "the model opens it"])
def opens(request: pytest.FixtureRequest) -> bool:
    return request.param == "the template opens it"


class TestChat:
    @pytest.fixture
    def tokenizer(self, opens: bool) -> ByteTokenizer:
        return ThinkingTokenizer(opens)

    @pytest.fixture
    def thinks(self, rig: Rig, opens: bool) -> Rig:
        rig.engine.reply = ("" if opens else "<think>\n") + "why?\n</think>\n\nso."
        return rig

    def test_answer(self, thinks: Rig):
        answer = thinks.chat(max_tokens=50).json()
        message = answer["choices"][0]["message"]
        assert message["content"] == "so."
        assert message["reasoning"] == message["reasoning_content"] == "why?"
        reply = thinks.engine.reply or ""
        assert answer["usage"]["completion_tokens_details"] == {
            "reasoning_tokens": reply.index("</think>") + len("</think>")
        }

    def test_stream(self, thinks: Rig):
        fields = {"max_tokens": 50, "stream": True, "stream_options": {"include_usage": True}}
        deltas, usage = streamed(thinks.chat(**fields))
        assert "".join(delta.get("content", "") for delta in deltas) == "so."
        for name in ("reasoning", "reasoning_content"):
            assert "".join(delta.get(name, "") for delta in deltas) == "why?"
        order = ["content" if "content" in delta else "reasoning" for delta in deltas if len(delta) > 2]
        assert order == sorted(order, reverse=True)
        assert usage == thinks.chat(max_tokens=50).json()["usage"]

    def test_it_can_be_left_out(self, thinks: Rig):
        message = thinks.chat(max_tokens=50, include_reasoning=False).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "so.", "refusal": None}
        deltas, _ = streamed(thinks.chat(max_tokens=50, include_reasoning=False, stream=True))
        assert not any("reasoning" in delta for delta in deltas)
        assert "".join(delta.get("content", "") for delta in deltas) == "so."

    def test_an_end_amid_thoughts(self, thinks: Rig):
        choice = thinks.chat(max_tokens=10).json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] == ""
        assert choice["message"]["reasoning"].startswith("wh")
        deltas, _ = streamed(thinks.chat(max_tokens=10, stream=True))
        assert [delta["content"] for delta in deltas if "content" in delta] == [""]

    def test_logprobs_are_the_answers(self, thinks: Rig):
        fields: dict[str, Any] = {"max_tokens": 50, "logprobs": True, "temperature": 0}
        content = thinks.chat(**fields).json()["choices"][0]["logprobs"]["content"]
        assert "".join(entry["token"] for entry in content) == "so."
        chunks = [
            choice["logprobs"]["content"]
            for piece in events(thinks.chat(**fields, stream=True))
            for choice in piece["choices"]
            if choice["logprobs"]
        ]
        assert [entry for entries in chunks for entry in entries] == content

    def test_templates_can_be_asked_not_to_think(self, rig: Rig):
        rig.engine.reply = "so."
        message = rig.chat(max_tokens=50, chat_template_kwargs={"enable_thinking": False}).json()["choices"][
            0
        ]["message"]
        assert (message["content"], message["reasoning"]) == ("so.", None)


class TestSwitchedOff:
    @pytest.fixture
    def config(self) -> ServerConfig:
        return ServerConfig(reasoning_parser="none")

    @pytest.fixture
    def tokenizer(self) -> ByteTokenizer:
        return ThinkingTokenizer(False)

    def test_thinking_stays_in_the_text(self, rig: Rig):
        rig.engine.reply = "<think>a</think>b"
        message = rig.chat(max_tokens=50).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "<think>a</think>b", "refusal": None}


def events(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    *lines, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def streamed(response: Any) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The deltas and the usage of a stream."""
    pieces = events(response)
    usage = pieces[-1]["usage"]
    return [choice["delta"] for piece in pieces for choice in piece["choices"]], usage
