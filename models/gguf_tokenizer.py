"""A `tokenizers.Tokenizer` from the vocabulary inside a GGUF file, so that text is cut as the original model cuts it.

Two kinds: `gpt2` (byte-level BPE with merges, cut into words by a named rule first) and `llama` (SentencePiece: pieces
with scores, bytes for the rest). Knows no files and no chat templates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .errors import TokenizerError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Values of tokenizer.ggml.token_type; control tokens are special, user-defined ones are text that is never cut."""

SPACE = "▁"
"""How SentencePiece writes a space."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_SEED = (
    rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_SUFFIXES}?|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_SUFFIXES}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Letters with two cases, but for some alphabets.
_CASED = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C88}\x{2D00}-\x{2D2D}\x{A790}-\x{AB68}"
    r"\x{10570}-\x{105BC}\x{16E40}-\x{16E7F}\x{1D400}-\x{1D7CB}\x{1DF00}-\x{1DF1E}]]"
)
_ASIAN = "[一-龥ࠀ-一가-\ud7ff]+"
_DEEPSEEK3 = (
    r"[!\x22#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SINGLE_DIGITS = (r"\p{N}", "")

_WORDS: dict[str, tuple[str, ...] | None] = {
    "gpt-2": None,  # ByteLevel's own rule
    "phi-2": None,
    "mpt": None,
    "olmo": None,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "command-r": _SINGLE_DIGITS,
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "falcon3": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "stablelm2": (_QWEN2,),
    "seed-coder": (_SEED,),
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
    "bloom": (r" ?[^(\s|.,!?…。，、।۔،)]+",),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "deepseek-llm": (
        r"[\r\n]", rf"\s?{_CASED}+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", _ASIAN, r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}  # fmt: skip
"""tokenizer.ggml.pre -> expressions that cut a text into words, one after the other; "" is ByteLevel's own rule."""
_LIKE_LLAMA3 = {"llama-bpe", "llama3", "llama-v3", "falcon3"}
_WHOLE_WORDS = {*_LIKE_LLAMA3, "tekken"}
"""A word that is a token is taken as it is, whatever the merges say."""
_BEGINS = {*_LIKE_LLAMA3, "tekken"}
"""A text begins with the bos token unless the file says otherwise."""


_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<|end_of_text|>", "<EOT>", "_<EOT>",
)  # fmt: skip
"""Tokens that end a text or a turn, whatever a file says of them: many name one of several, as llama.cpp's own reader knows."""


def end_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end a text, a turn or a message: those under the keys made for them, then those known by name."""
    named = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    return tuple(dict.fromkeys([*(i for i in named if i is not None), *_known_ends(tokens)]))


def _known_ends(tokens: Sequence[str]) -> list[int]:
    found = {token: number for number, token in enumerate(tokens) if token in _ENDS}
    if found.keys() >= {"<|return|>", "<|call|>"}:
        found.pop("<|end|>", None)  # of a message: others follow in the same turn (gpt-oss)
    return [found[token] for token in _ENDS if token in found]


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """Build the tokenizer that a file's metadata describes.

    Args:
        metadata: of the GGUF file.
        where: the file's name, for messages.

    Raises:
        TokenizerError: if it is of a kind that is not understood, or incomplete.
    """
    vocabulary = _Vocabulary(metadata, where)
    kind = vocabulary.get("model")
    if kind == "gpt2":
        tokenizer, begins = _byte_level(vocabulary)
    elif kind == "llama":
        tokenizer, begins = _sentencepiece(vocabulary)
    else:
        raise vocabulary.refused(f"tokenizer model {kind!r} is not supported; supported: gpt2, llama")
    _add_named_tokens(tokenizer, vocabulary)
    _frame(tokenizer, vocabulary, begins)
    return tokenizer


class _Vocabulary:
    """The `tokenizer.ggml.` part of the metadata."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata, self._where = metadata, where
        tokens = self.get("tokens")
        if not tokens:
            raise self.refused("tokenizer.ggml.tokens is missing; the file holds no tokenizer")
        self.tokens: list[str] = tokens
        self.types: list[int] = [*self.list_of("token_type", [1] * len(tokens))]
        for number in _known_ends(tokens):
            self.types[number] = (
                _CONTROL  # files that call it text would show it, and take it from what users write
            )
        self.ids = {token: number for number, token in enumerate(tokens)}
        if len(self.ids) != len(tokens):
            raise self.refused("tokenizer.ggml.tokens holds a token twice")

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def list_of(self, key: str, default: list[Any] | None = None) -> list[Any]:
        """A list with one entry a token."""
        values = self.get(key, default)
        if values is None or len(values) != len(self.tokens):
            raise self.refused(f"tokenizer.ggml.{key} is missing or does not fit the number of tokens")
        return values

    @property
    def takes_spaces(self) -> bool:
        """Whether marks take the white space behind them: as Phi-3's do, which a GGUF file cannot say."""
        phi = self._metadata.get("general.architecture") in ("phi3", "phimoe")
        return phi and self.get("model") == "llama"

    def token(self, name: str) -> str | None:
        """The text of the token whose id is under `name`."""
        number = self.get(f"{name}_token_id")
        if number is not None and not 0 <= number < len(self.tokens):
            raise self.refused(f"tokenizer.ggml.{name}_token_id = {number} is not a token")
        return None if number is None else self.tokens[number]

    def refused(self, why: str) -> TokenizerError:
        return TokenizerError(f"{self._where}: {why}")


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    name = vocabulary.get("pre", "default")
    if name not in _WORDS:
        raise vocabulary.refused(f"pre-tokenizer {name!r} is not supported; supported: {', '.join(_WORDS)}")
    merges = vocabulary.get("merges")
    if merges is None:
        raise vocabulary.refused("tokenizer.ggml.merges is missing")
    # A merge is two tokens with a space between; neither holds one, but the first may begin with one.
    pairs = [tuple(merge.rsplit(" ", 1)) for merge in merges]
    try:
        bpe = models.BPE(vocab=vocabulary.ids, merges=pairs, ignore_merges=name in _WHOLE_WORDS)
    except Exception as error:  # tokenizers raises plain Exception for a merge of unknown tokens
        raise vocabulary.refused(f"tokenizer.ggml.merges does not fit the tokens: {error}") from error
    tokenizer = Tokenizer(bpe)
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _word_cutter(_WORDS[name])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, name in _BEGINS


def _word_cutter(rules: tuple[str, ...] | None) -> pre_tokenizers.PreTokenizer:
    own = rules is None or "" in rules
    cuts = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in rules or () if rule]
    return pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)],
    )


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    unknown = next((t for t, kind in zip(vocabulary.tokens, vocabulary.types) if kind == _UNKNOWN), None)
    bpe = models.BPE(
        vocab=vocabulary.ids,
        merges=merges_of_scores(vocabulary.tokens, vocabulary.list_of("scores")),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    leading = vocabulary.get("add_space_prefix", True)
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    undo: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if leading:
        steps.insert(0, normalizers.Prepend(SPACE))
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer, True


def merges_of_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours that make the best piece first: as merges, the best piece's come first."""
    ids = {token: number for number, token in enumerate(tokens)}
    merges: list[tuple[float, int, int]] = []
    for token, score in zip(tokens, scores):
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-score, left, right))
    merges.sort()
    return [(tokens[left], tokens[right]) for _, left, right in merges]


def _add_named_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Tokens that are looked for in the text before it is cut; those of control are special."""
    named = {_CONTROL: list[AddedToken](), _USER_DEFINED: list[AddedToken]()}
    takes_spaces = vocabulary.takes_spaces
    for token, kind in zip(vocabulary.tokens, vocabulary.types):
        if kind in named:
            rstrip = takes_spaces and token not in ("<unk>", "<s>", "<|endoftext|>")
            named[kind].append(AddedToken(token, special=kind == _CONTROL, normalized=False, rstrip=rstrip))
    if unknown := vocabulary.token("unknown"):
        named[_CONTROL].append(AddedToken(unknown, special=True, normalized=False))
    tokenizer.add_special_tokens(named[_CONTROL])
    tokenizer.add_tokens(named[_USER_DEFINED])


def _frame(tokenizer: Tokenizer, vocabulary: _Vocabulary, begins: bool) -> None:
    """Put bos and eos round a text as the file asks."""
    first = vocabulary.token("bos") if vocabulary.get("add_bos_token", begins) else None
    last = vocabulary.token("eos") if vocabulary.get("add_eos_token", False) else None
    if first is None and last is None:
        return
    frame = processors.TemplateProcessing(
        single=[*([first] if first else []), "$A", *([last] if last else [])],
        special_tokens=[(token, vocabulary.ids[token]) for token in (first, last) if token],
    )
    tokenizer.post_processor = (
        processors.Sequence([tokenizer.post_processor, frame]) if tokenizer.post_processor else frame
    )
