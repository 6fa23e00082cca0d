"""Bounds of grammars: chains are measured as they are, what is within the bounds is followed, and nothing ends the process."""

import json
import random
import subprocess
import sys

import pytest
from llguidance import LLMatcher

from tests.support.guided import MODEL_VOCAB, byte_level
from xlane.engine import InvalidRequest, SamplingParams, check_grammar
from xlane.engine.grammar import Grammars
from xlane.engine.grammar_bounds import MAX_LINKS, MAX_OPTIONAL, longest_chain
from xlane.models.guidance import guidance_tokenizer

TEXT = byte_level()


def chain(links: int) -> str:
    rules = "".join(f'r{i}: "x" r{i + 1} | r{i + 1}\n' for i in range(links))
    return LLMatcher.grammar_from_lark(f'start: r0\n{rules}r{links}: "a"\n')


def references(links: int) -> str:
    inner = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(links)
    }
    schema = {"$defs": {**inner, f"d{links}": {"type": "integer"}}, "$ref": "#/$defs/d0"}
    return json.dumps({"grammars": [{"json_schema": schema}]})


def optional(count: int) -> str:
    properties = {f"p{i}": {"type": "integer"} for i in range(count)}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return LLMatcher.grammar_from_json_schema(schema)


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (chain(MAX_LINKS), f"a chain of {MAX_LINKS + 2} rules"),
        (chain(20_000), "a chain of 20002 rules"),
        (references(MAX_LINKS), f"{MAX_LINKS + 1} `$ref`s"),
        (optional(MAX_OPTIONAL + 1), f"{MAX_OPTIONAL + 1} optional properties; at most {MAX_OPTIONAL}"),
        ("{" * 100_000, "neither Lark nor JSON"),
        ("[" * 10, "[["),
        ('{"grammars": [' + "[" * 100_000, "neither Lark nor JSON"),
    ],
)  # fmt: skip
def test_what_is_beyond_a_bound_is_refused_with_both_numbers(grammar: str, words: str):
    grammars = Grammars(lambda: guidance_tokenizer(TEXT, MODEL_VOCAB), MODEL_VOCAB)
    with pytest.raises(InvalidRequest) as refused:
        grammars.guide(grammar, (), SamplingParams(max_tokens=5))
    grammars.close()
    assert words in str(refused.value)


def test_what_is_within_the_bounds_is_followed():
    grammars = Grammars(lambda: guidance_tokenizer(TEXT, MODEL_VOCAB), MODEL_VOCAB)
    many = "".join(f'r{i}: "a{i}" e\n' for i in range(5_000))
    wide = LLMatcher.grammar_from_lark(f'start: {" | ".join(f"r{i}" for i in range(5_000))}\n{many}e: "b"\n')
    for grammar, text in (
        (chain(MAX_LINKS - 2), "xa"),
        (references(MAX_LINKS - 1), '{"a"'),
        (optional(700), '{"p699":1'),
        (optional(MAX_OPTIONAL), '{"p0":1,"p7'),
        (wide, "a4999b"),
    ):
        guide = grammars.guide(grammar, (), SamplingParams(max_tokens=50))
        for token in TEXT.encode(text, add_special_tokens=False):
            guide.follow([token])
            guide.compute()
    grammars.close()


def test_a_compiling_thread_has_a_stack_for_many_times_the_bound():
    """Without one llguidance ends the process, so another one looks."""
    code = (
        "import sys\nfrom llguidance import LLMatcher\nfrom xlane.engine import compilers\n"
        "for text in sys.stdin.read().split(chr(0)):\n"
        "    compilers(1, 'x').submit(LLMatcher.validate_grammar, text).result()\n"
        "print('alive')"
    )
    texts = "\0".join((chain(10 * MAX_LINKS), references(8 * MAX_LINKS)))
    ran = subprocess.run(
        [sys.executable, "-c", code], input=texts, text=True, capture_output=True, check=False
    )
    assert ran.stdout.strip() == "alive", ran.stderr


def brute(edges: dict[str, set[str]]) -> int:
    def longest(node: str, seen: frozenset[str]) -> int:
        return 1 + max((longest(n, seen | {n}) for n in edges[node] if n not in seen), default=0)

    return max((longest(node, frozenset((node,))) for node in edges), default=0)


@pytest.mark.parametrize("seed", range(60))
def test_a_chain_is_never_taken_for_shorter_than_it_is(seed: int):
    rng = random.Random(seed)
    names = [chr(97 + i) for i in range(rng.randint(0, 7))]
    edges = {name: {other for other in names if rng.random() < 0.3} for name in names}
    measured, true = longest_chain(edges), brute(edges)
    assert true <= measured <= len(names)
    if not any(name in edges[name] or _cyclic(edges, name) for name in names):
        assert measured == true


def _cyclic(edges: dict[str, set[str]], start: str) -> bool:
    seen, left = set[str](), list(edges[start])
    while left:
        node = left.pop()
        if node == start:
            return True
        if node not in seen:
            seen.add(node)
            left += edges[node]
    return False


def test_names_in_texts_and_patterns_are_not_followed():
    rules = "".join(f'r{i}: "r{i + 1}" /r{i + 1}/\n' for i in range(2 * MAX_LINKS))
    check_grammar(f'start: r0\n{rules}r{2 * MAX_LINKS}: "a"\n')
