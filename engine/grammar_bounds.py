"""How large a grammar may be: the one place that front and engine ask, before llguidance sees it. Knows texts; no tokens.

llguidance bounds its own work, but its compiler follows a chain of rules or `$ref`s by recursion, some 10 kB of stack a link,
and where the stack ends the process does (measured: at 200 `$ref`s through objects with 2 MB, at 700 rules). So chains are
measured here and refused while they are short, and compiling is the work of threads with a stack for many times as much.
"""

import json
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from .errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLParserLimits

MAX_GRAMMAR_BYTES = 1 << 20
"""Longest grammar taken."""
MAX_LINKS = 500
"""Most rules that lead from one to the next, and most `$ref`s."""
MAX_OPTIONAL = 1_900
"""Most optional properties of one object: any of them may be next, which is what `_ROW_ITEMS` bounds."""
_ROW_ITEMS = 8_000
"""Most ways to go on that llguidance follows at once (its default is 2,000: 500 optional properties)."""
_STACK_BYTES = 1 << 28
"""Of a compiling thread; what is not touched takes no memory."""
_RULE = re.compile(r"^[ \t]*[?!]?([A-Za-z_][\w.-]*?)(?:\[[^\]\n]*\])?(?:\.-?\d+)?[ \t]*:", re.MULTILINE)
_WORD = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|(@?[A-Za-z_][\w-]*)')


def grammar_limits() -> "LLParserLimits":
    """llguidance's bounds on its own work, which grows with the square of a grammar's size (this is a second or two); its
    messages come without its insides."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_grammar_size=50_000, max_items_in_row=_ROW_ITEMS, verbose_errors=False)


def compilers(threads: int, name: str) -> ThreadPoolExecutor:
    """Threads to compile grammars on. All of them run from now on."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    before = threading.stack_size(_STACK_BYTES)
    try:
        together = threading.Barrier(threads)
        for running in [pool.submit(together.wait) for _ in range(threads)]:
            running.result()
    finally:
        threading.stack_size(before)
    return pool


def check_grammar(grammar: str) -> None:
    """Raises InvalidRequest for a grammar that llguidance must not be asked to read: what is too large, its value, its bound."""
    if (size := len(grammar.encode(errors="replace"))) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"the grammar has {size} bytes; at most {MAX_GRAMMAR_BYTES} are taken")
    if (references := grammar.count("$ref")) > MAX_LINKS:
        raise InvalidRequest(f"the grammar has {references} `$ref`s; at most {MAX_LINKS} are taken")
    try:
        parts = _parts(grammar)
        for schema in (part for part in parts.values() if not isinstance(part, str)):
            _check_objects(schema)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the grammar cannot be used: it is neither Lark nor JSON: {error}") from None
    rules = {name: part for name, part in parts.items() if isinstance(part, str)}
    if sum(len(_RULE.findall(part)) for part in rules.values()) > MAX_LINKS:
        links = longest_chain(_references(rules))
        if links > MAX_LINKS:
            raise InvalidRequest(
                f"the grammar has a chain of {links} rules, each of which names the next; at most {MAX_LINKS} are taken"
            )


def _parts(grammar: str) -> dict[str, Any]:
    """The grammars by name: a text for Lark, anything else for a schema."""
    if not grammar.lstrip().startswith("{"):
        return {"": grammar}
    value = json.loads(grammar)
    listed = value.get("grammars")
    found: dict[str, Any] = {}
    for i, part in enumerate(listed if isinstance(listed, list) else [value]):
        if isinstance(part, Mapping):
            found[str(part.get("name", i))] = part.get("lark_grammar", part.get("json_schema", part))
    return found


def _check_objects(schema: Any) -> None:
    """No object of a schema has too many properties that may be left out."""
    if isinstance(schema, Mapping):
        properties, required = schema.get("properties"), schema.get("required")
        if isinstance(properties, Mapping):
            optional = len(properties) - (len(required) if isinstance(required, list) else 0)
            if optional > MAX_OPTIONAL:
                raise InvalidRequest(
                    f"an object of the schema has {optional} optional properties; at most {MAX_OPTIONAL} are taken"
                )
    inner = schema.values() if isinstance(schema, Mapping) else schema if isinstance(schema, list) else ()
    for value in inner:
        _check_objects(value)


def _references(parts: Mapping[str, str]) -> dict[str, set[str]]:
    """Rule → the rules it names, over all grammars."""
    found: dict[str, set[str]] = {}
    for part, text in parts.items():
        heads = list(_RULE.finditer(text))
        ends = [*(head.start() for head in heads[1:]), len(text)]
        for head, end in zip(heads, ends, strict=False):
            named = {word for word in _WORD.findall(text[head.end() : end]) if word}
            edges = found.setdefault(f"{part}:{head[1]}", set())
            edges |= {f"{word[1:]}:start" if word.startswith("@") else f"{part}:{word}" for word in named}
    return {rule: {other for other in edges if other in found} for rule, edges in found.items()}


def longest_chain(edges: Mapping[str, set[str]]) -> int:
    """At least as many nodes as the longest path that visits none twice: nodes that reach each other count all (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    length: dict[str, int] = {}
    """Of the longest chain from each node that is done with."""
    stack: list[str] = []
    for root in edges:
        work: list[tuple[str, Iterator[str]]] = [] if root in index else [(root, iter(edges[root]))]
        while work:
            node, left = work[-1]
            if node not in index:
                index[node] = low[node] = len(index)
                stack.append(node)
            following = next(left, None)
            if following is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    together = [stack.pop()]
                    while together[-1] != node:
                        together.append(stack.pop())
                    behind = (length.get(other, 0) for one in together for other in edges[one])
                    size = len(together) + max(behind, default=0)
                    length |= dict.fromkeys(together, size)
            elif following not in index:
                work.append((following, iter(edges[following])))
            elif following not in length:
                low[node] = min(low[node], index[following])
    return max(length.values(), default=0)
