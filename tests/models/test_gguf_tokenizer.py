"""Tokenizers out of GGUF metadata: the demo's against one assembled by hand, SentencePiece against a naive encoder."""

import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from xlane.models.errors import TokenizerError
from xlane.models.gguf_file import GgufFile
from xlane.models.gguf_tokenizer import end_ids, tokenizer_from_gguf

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand\ttabs\r\n\r\nlines \n",
    "I'll say: it's 1234567890 o'clock; WE'RE 3.14159 × ½ ² Ⅷ",
    "naïve café, ÅÄÖ, straße, Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย",
    "日本語と中文한국어",
    "👩‍👩‍👧 🏳️‍🌈 🇸🇪 𝔘𝔫𝔦 \U0010fffd \ufffd \u200b\u00a0",
    "def f(x):\n    return {'a': x**2}  # ok\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name>",
    "e\u0301 a\u0308 ffi ﬁ",
]


@pytest.fixture(scope="module")
def metadata(demo_gguf: Path) -> dict[str, Any]:
    return GgufFile(demo_gguf).metadata


@pytest.fixture(scope="module")
def demo(metadata: dict[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(metadata, "demo")


@pytest.fixture(scope="module")
def by_hand(metadata: dict[str, Any]) -> Tokenizer:
    """As SmolLM2's own tokenizer.json is put together."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, metadata["tokenizer.ggml.token_type"]) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_the_demo_cuts_texts_as_its_original_does(demo: Tokenizer, by_hand: Tokenizer, text: str):
    ours, theirs = demo.encode(text), by_hand.encode(text)
    assert ours.ids == theirs.ids
    assert ours.offsets == theirs.offsets
    assert demo.decode(ours.ids, skip_special_tokens=False) == text


def test_the_demos_special_tokens_are_the_originals(demo: Tokenizer, by_hand: Tokenizer):
    assert demo.get_vocab_size() == by_hand.get_vocab_size() == 49152
    theirs = by_hand.get_added_tokens_decoder()
    assert {i: (t.content, t.special) for i, t in demo.get_added_tokens_decoder().items()} == {
        i: (t.content, t.special) for i, t in theirs.items()
    }


def test_the_demo_is_built_in_time(metadata: dict[str, Any]):
    began = time.perf_counter()
    tokenizer_from_gguf(metadata, "demo")
    assert time.perf_counter() - began < 5  # 0.13 s on a quiet core


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "We've 123  x\n", ["We", "'ve", " 123", " ", " x", "\n"]),
        ("smollm", "We've 12  x\n", ["We", "'ve", " ", "1", "2", " ", " x", "\n"]),
        ("llama-bpe", "WE'VE 12345  x!!\n\n y", ["WE", "'VE", " ", "123", "45", " ", " x", "!!\n\n", " y"]),
        ("smaug-bpe", "WE'VE 12345", ["WE", "'VE", " ", "123", "45"]),
        ("qwen2", "WE'VE 123\n", ["WE", "'VE", " ", "1", "2", "3", "\n"]),
        ("tekken", "HelloWorld a/b/\n 12", ["Hello", "World", " a", "/b", "/\n", " ", "1", "2"]),
        ("default", "a+b 1234", ["a", "+", "b", " ", "123", "4"]),
        ("command-r", "We've 12  x\n", ["We", "'ve", " ", "1", "2", " ", " x", "\n"]),
        ("gpt-4o", "HelloWorld's 1234 a/\n", ["Hello", "World's", " ", "123", "4", " a", "/\n"]),
        ("bloom", "We, too  12\n", ["We", ",", " too", " ", " 12", "\n"]),
        ("falcon", "a+b 1234", ["a", "+", "b", " ", "123", "4"]),
        ("deepseek-llm", "Ab ба12\n！ 中文x ա", ["Ab", " ба", "12", "\n", "！", " ", "中文", "x", " ա"]),
        ("deepseek-coder", "Ab 12\n! x ա", ["Ab", " ", "1", "2", "\n", "!", " x", " ա"]),
        ("deepseek-v3", "Ab's 1234 中文(x) \n", ["Ab", "'s", " ", "123", "4", " ", "中文", "(x", ")", " \n"]),
    ],
)
def test_words_are_cut_by_the_named_rule(pre: str, text: str, words: list[str]):
    tokenizer = tokenizer_from_gguf(bytes_only(pre), "m")
    assert tokenizer.pre_tokenizer is not None
    cut = [text[start:stop] for _, (start, stop) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == words


def bytes_only(pre: str, **more: Any) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer with the 256 bytes, one merge and two control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*alphabet, "ab", "<s>", "</s>"],
        "token_type": [1] * 257 + [3, 3],
        "merges": ["a b"],
        "bos_token_id": 257,
        "eos_token_id": 258,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


@pytest.mark.parametrize(
    ("pre", "more", "ids"),
    [
        ("gpt-2", {}, [256]),
        ("llama-bpe", {}, [257, 256]),
        ("llama-bpe", {"add_bos_token": False}, [256]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, [257, 256, 258]),
    ],
)
def test_a_text_is_framed_as_the_file_asks(pre: str, more: dict[str, Any], ids: list[int]):
    tokenizer = tokenizer_from_gguf(bytes_only(pre, **more), "m")
    assert tokenizer.encode("ab").ids == ids
    assert tokenizer.encode("ab", add_special_tokens=False).ids == [256]


def test_qwen_composes_characters():
    tokenizer = tokenizer_from_gguf(bytes_only("qwen2"), "m")
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("é").ids


def test_a_user_defined_token_is_found_in_text_and_is_not_special():
    tokens = bytes_only("gpt-2")["tokenizer.ggml.tokens"]
    keys = {"tokens": [*tokens, "<tool>"], "token_type": [1] * 257 + [3, 3, 4]}
    tokenizer = tokenizer_from_gguf(bytes_only("gpt-2", **keys), "m")
    assert tokenizer.encode("a<tool>").ids[1:] == [259]
    assert tokenizer.decode([259]) == "<tool>"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pre": "kimi-k2"}, "m: pre-tokenizer 'kimi-k2' is not supported"),
        ({"model": "bert"}, "m: tokenizer model 'bert'"),
        ({"tokens": None}, "the file holds no tokenizer"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["a zz"]}, "merges does not fit"),
        ({"token_type": [1]}, "token_type"),
        ({"bos_token_id": 999, "add_bos_token": True}, "bos_token_id = 999"),
    ],
)
def test_what_is_not_understood_is_refused(keys: dict[str, Any], message: str):
    with pytest.raises(TokenizerError, match=message):
        tokenizer_from_gguf(bytes_only(**{"pre": "gpt-2", **keys}), "m")


PIECES = ["▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁ab", "▁abc", "cab", "ca", "é", "éa"]


def sentencepiece(**more: Any) -> dict[str, Any]:
    """Metadata of a small SentencePiece vocabulary: unk, bos, eos, the bytes, pieces with falling scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    keys = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(rank) for rank in range(len(PIECES))],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def naive_sentencepiece(text: str) -> list[int]:
    """Join the two neighbours that make the best piece until none do; spell the rest in bytes."""
    scores = {piece: -rank for rank, piece in enumerate(PIECES)}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not joins:
            break
        at = -max(joins)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids: Sequence[list[int]] = [
        [259 + PIECES.index(part)] if part in scores else [3 + byte for byte in part.encode()]
        for part in parts
    ]
    return [number for group in ids for number in group]


def test_sentencepiece_joins_the_best_pieces_first():
    tokenizer, source = tokenizer_from_gguf(sentencepiece(), "m"), random.Random(0)
    for _ in range(300):
        text = "".join(source.choice("aabbccé 日🙂\n") for _ in range(source.randrange(1, 30)))
        ids = tokenizer.encode(text).ids
        assert ids == [1, *naive_sentencepiece(text)]
        assert tokenizer.decode(ids) == text


def test_sentencepiece_without_a_leading_space():
    tokenizer = tokenizer_from_gguf(sentencepiece(add_space_prefix=False, add_bos_token=False), "m")
    assert tokenizer.encode("abc").tokens == ["abc"]
    assert tokenizer.decode(tokenizer.encode(" abc").ids) == " abc"


def test_sentencepiece_needs_scores():
    with pytest.raises(TokenizerError, match="scores"):
        tokenizer_from_gguf(sentencepiece(scores=None), "m")


@pytest.mark.parametrize(
    ("more", "ends"),
    [
        ([], (258,)),
        (["<|end|>"], (258, 259)),
        (["<end_of_turn>", "<|endoftext|>"], (258, 259, 260)),
        (["<|end|>", "<|return|>", "<|call|>"], (258, 260, 261)),
        (["<|end|>", "<|call|>"], (258, 259, 260)),
    ],
)
def test_ends_are_known_by_name(more: list[str], ends: tuple[int, ...]):
    """Files name one end of several; of a message that others follow in the same turn it is none (gpt-oss)."""
    tokens = [*bytes_only("gpt-2")["tokenizer.ggml.tokens"], *more]
    metadata = bytes_only("gpt-2", tokens=tokens, token_type=[1] * 257 + [3, 3] + [4] * len(more))
    assert end_ids(metadata) == ends
    tokenizer = tokenizer_from_gguf(metadata, "m")
    shown = tokenizer.decode(list(range(259, len(tokens))))
    assert shown == "".join(token for number, token in enumerate(more, 259) if number not in ends)


@pytest.mark.parametrize("architecture", ["phi3", "llama"])
def test_marks_of_phi_3_take_the_white_space_behind_them(architecture: str):
    """What SentencePiece's files of its cannot say."""
    metadata = sentencepiece() | {"general.architecture": architecture}
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.tokens"] = [*tokens, "<|user|>", "<|end|>"]
    metadata["tokenizer.ggml.token_type"] = [*types, 3, 3]
    metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], 0.0, 0.0]
    tokenizer = tokenizer_from_gguf(metadata, "m")
    got = tokenizer.encode("<|user|>\n ab<|end|>\n", add_special_tokens=False).ids
    alone = [len(tokens), tokens.index("▁ab"), len(tokens) + 1]
    assert (got == alone) == (architecture == "phi3")
