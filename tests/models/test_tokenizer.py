"""The text side of a model: offsets, streams that equal batch decoding, and directories as they lie about."""

import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from xlane.models.detokenize import ByteStream, WindowStream, token_table
from xlane.models.errors import TokenizerError
from xlane.models.gguf_tokenizer import tokenizer_from_gguf
from xlane.models.tokenizer import TextTokenizer, TokenizerFiles

from .test_gguf_tokenizer import TEXTS, bytes_only, sentencepiece

EVERY_PLANE = "".join(
    chr(code)
    for plane in range(17)
    for code in range(plane << 16, (plane + 1) << 16, 509)
    if not 0xD800 <= code < 0xE000
)


@pytest.fixture(scope="module")
def spm() -> Tokenizer:
    return tokenizer_from_gguf(sentencepiece(), "m")


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return tokenizer_from_gguf(bytes_only("gpt-2"), "m")


def streamed(
    tokenizer: TextTokenizer, ids: Sequence[int], prompt: Sequence[int] = (), skip: bool = True
) -> str:
    stream = tokenizer.stream(prompt, skip)
    return "".join([*(stream.push(token_id) for token_id in ids), stream.finish()])


# --- facts about the demo


def test_what_the_demo_says_about_itself(demo: TextTokenizer):
    assert (demo.bos_token, demo.eos_token, demo.eos_ids) == ("<|im_start|>", "<|im_end|>", (2, 0))
    assert (demo.vocab_size, demo.max_context) == (49152, 8192)
    assert demo.is_special(2)
    assert not demo.is_special(100)
    assert demo.token_text(2) == "<|im_end|>"
    assert demo.token_text(demo.encode("Hello world")[1]) == " world"


@pytest.mark.parametrize("text", [text for text in TEXTS if "<|" not in text])
def test_offsets_are_bytes_of_the_text(demo: TextTokenizer, text: str):
    spans, raw = demo.encode_offsets(text), text.encode()
    assert [span.id for span in spans] == demo.encode(text)
    end = 0
    for span in spans:
        assert span.start <= end <= span.stop  # no byte is left out; tokens of one character share its bytes
        raw[span.start : span.stop].decode()
        end = span.stop
    assert end == len(raw)


def test_a_special_token_that_is_added_has_no_place_in_the_text(spm: Tokenizer):
    tokenizer = TextTokenizer(TokenizerFiles(spm))
    assert tokenizer.encode_offsets("ab ab")[0] == (1, 0, 0)
    assert tokenizer.encode_offsets("ab ab", add_special_tokens=False)[0].id != 1
    assert tokenizer.encode("ab", add_special_tokens=False) == tokenizer.encode("ab")[1:]


def test_a_lone_surrogate_is_refused(demo: TextTokenizer):
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        demo.encode("a\ud800b")
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        demo.encode_offsets("a\ud800b")


def test_threads_share_a_tokenizer(demo: TextTokenizer):
    expected, seen = demo.encode(EVERY_PLANE), list[bool]()
    text = demo.decode(expected)

    def work() -> None:
        ids = demo.encode(EVERY_PLANE)
        seen.append(ids == expected and streamed(demo, ids) == text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 4


# --- streams


@pytest.mark.parametrize("text", [*TEXTS, EVERY_PLANE])
def test_the_demos_streams_are_its_texts(demo: TextTokenizer, text: str):
    ids = demo.encode(text)
    shown = demo.decode(ids, skip_special_tokens=False)
    assert streamed(demo, ids, skip=False) == shown
    assert streamed(demo, ids) == demo.decode(ids)
    # Its vocabulary lacks the first bytes of the planes nobody writes in.
    assert shown == text or text is EVERY_PLANE


@pytest.mark.parametrize("text", ["a", " a", "ab  abc é日🙂", EVERY_PLANE])
def test_complete_vocabularies_stream_every_text(spm: Tokenizer, byte_level: Tokenizer, text: str):
    for backend in (spm, byte_level):
        tokenizer = TextTokenizer(TokenizerFiles(backend))
        ids = tokenizer.encode(text)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids) == text


def test_a_character_is_never_said_in_halves(demo: TextTokenizer):
    text = "日本🙂𝔘é👩‍👩‍👧"
    stream = demo.stream()
    pieces = [stream.push(token_id) for token_id in demo.encode(text)]
    assert "" in pieces
    assert "".join(pieces) == text
    assert stream.finish() == ""


def test_an_incomplete_end_is_flushed(demo: TextTokenizer):
    ids = demo.encode("\U0010fffd")[:-1]
    stream = demo.stream()
    assert "".join(stream.push(token_id) for token_id in ids) == ""
    assert stream.finish() == "\ufffd" == demo.decode(ids)


@given(ids=st.lists(st.integers(0, 258), max_size=40), skip=st.booleans())
def test_any_bytes_stream_as_they_decode(ids: list[int], skip: bool):
    tokenizer = TextTokenizer(TokenizerFiles(_BYTES))
    assert streamed(tokenizer, ids, skip=skip) == tokenizer.decode(ids, skip_special_tokens=skip)


_BYTES = tokenizer_from_gguf(bytes_only("gpt-2"), "m")


def test_a_special_token_shows_only_where_it_is_asked_for(demo: TextTokenizer):
    ids = demo.encode("a<|im_end|>b")
    assert streamed(demo, ids) == "ab"
    assert streamed(demo, ids, skip=False) == "a<|im_end|>b"


def test_a_stream_goes_on_where_the_prompt_ended(demo: TextTokenizer, spm: Tokenizer):
    llama = TextTokenizer(TokenizerFiles(spm))
    ids = llama.encode("ab abc")
    assert streamed(llama, ids[2:], ids[:2]) == " abc"  # the space belongs to the text
    assert streamed(llama, ids[1:], ids[:1]) == "ab abc"  # after bos alone a text begins
    face = demo.encode("🙂")
    assert streamed(demo, face[1:], [*demo.encode("x"), *face[:1]]) == "🙂"


def test_an_id_beyond_the_vocabulary_has_no_text(demo: TextTokenizer):
    assert streamed(demo, [49152, *demo.encode("a")]) == "a"


def word_piece() -> Tokenizer:
    tokens = ["[UNK]", "hel", "##lo", "world", "!", "##ing"]
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "b": 2, "▁a": 3}, merges=[("▁", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize("make", [word_piece, metaspace])
def test_other_decoders_stream_too(make: Callable[[], Tokenizer]):
    tokenizer, source = make(), random.Random(0)
    assert token_table(tokenizer) is None
    size = tokenizer.get_vocab_size()
    for _ in range(100):
        ids = [source.randrange(size) for _ in range(source.randrange(1, 12))]
        assert streamed(TextTokenizer(TokenizerFiles(tokenizer)), ids) == tokenizer.decode(ids)


def test_both_kinds_of_stream_say_the_same(byte_level: Tokenizer, spm: Tokenizer):
    for tokenizer in (byte_level, spm):
        table, none = token_table(tokenizer), frozenset[int]()
        assert table is not None
        ids = tokenizer.encode("ab abc é 日本 🙂 x", add_special_tokens=False).ids
        fast, slow = ByteStream(table, none), WindowStream(tokenizer, none)
        assert [fast.push(i) for i in ids] == [slow.push(i) for i in ids]


def test_endless_broken_bytes_are_not_held_back_for_ever(spm: Tokenizer):
    stream = WindowStream(spm, frozenset())
    said = "".join(stream.push(3 + 0xFF) for _ in range(200))
    assert set(said) == {"\ufffd"}
    assert len(said + stream.finish()) == 200


def test_an_unusual_replacement_is_not_taken_for_sentencepiece():
    tokenizer = Tokenizer(models.BPE())
    steps = [decoders.Replace("_", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    assert token_table(tokenizer) is None


# --- directories


def save(directory: Path, config: dict[str, Any] | None = None, **files: str) -> Path:
    """A model directory with a byte-level tokenizer; in names of files `__` stands for a dot, `___` for a slash."""
    tokenizer = tokenizer_from_gguf(bytes_only("gpt-2"), "m")
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        path = directory / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return directory


def test_a_directory_is_read_and_texts_are_neither_cut_nor_padded(tmp_path: Path):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "model_max_length": 2048}
    tokenizer = TextTokenizer.from_path(save(tmp_path, config))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_ids) == ("<s>", "</s>", (258,))
    assert tokenizer.max_context == 2048
    assert len(tokenizer.encode("x")) == 1
    assert len(tokenizer.encode("x" * 10)) == 10


def test_special_tokens_may_lie_in_their_own_file(tmp_path: Path):
    path = save(tmp_path, {"model_max_length": 1e30}, special_tokens_map__json='{"eos_token": "</s>"}')
    tokenizer = TextTokenizer.from_path(path)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.max_context) == ("</s>", None, None)


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (True, True)])
def test_llama_frames_a_text_as_its_configuration_says(tmp_path: Path, bos: bool, eos: bool):
    flags = {"add_bos_token": bos, "add_eos_token": eos, "tokenizer_class": "LlamaTokenizerFast"}
    path = save(tmp_path, {"bos_token": "<s>", "eos_token": "</s>", **flags})
    assert TextTokenizer.from_path(path).encode("ab") == [257] * bos + [256] + [258] * eos


def test_broken_files_are_named(tmp_path: Path):
    path = save(tmp_path, {"chat_template": 3})
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: chat_template"):
        TextTokenizer.from_path(path)
    (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: cannot be read"):
        TextTokenizer.from_path(path)
    (path / "tokenizer_config.json").unlink()
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read"):
        TextTokenizer.from_path(path)


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TokenizerError, match="no tokenizer can be read"):
        TextTokenizer.from_path(tmp_path)


def test_an_older_format_is_converted(tmp_path: Path):
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | {"ab": 256, "<|endoftext|>": 257}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    converted = TextTokenizer.from_path(tmp_path)
    assert converted.encode("ab") == [256]
    assert streamed(converted, converted.encode("ab é")) == "ab é"


def test_how_answers_are_to_be_read_is_what_the_files_declare(tmp_path: Path):
    declared = {"fields": {"content": {}}, "start_anchor": "A:"}
    path = save(tmp_path / "a", {"chat_template": "C", "response_template": declared})
    assert TextTokenizer.from_path(path).response_template == declared
    assert TextTokenizer.from_path(save(tmp_path / "b", {})).response_template is None
    other = tmp_path / "other.json"
    other.write_text('{"response_template": {"version": 1}}')
    tokenizer = TextTokenizer.from_path(path, config=other)
    assert (tokenizer.response_template, tokenizer.chat_template) == ({"version": 1}, "C")


def test_importing_is_light():
    code = "import sys, xlane.models.tokenizer; print({'jax', 'torch', 'transformers', 'gguf'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
