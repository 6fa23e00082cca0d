"""Answers parsed into text and calls: each format by hand, and cut into pieces at every place."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xlane.server.tool_formats import (
    GLM,
    HERMES,
    LFM,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMED,
    PLAIN,
    PYTHON,
    QWEN_CODER,
    SEED,
    ToolFormat,
)
from xlane.server.tool_parser import CallArguments, CallStart, ToolParser

TYPED = {
    "type": "object",
    "properties": {
        "s": {"type": "string"}, "n": {"type": "integer"}, "x": {"type": "number"}, "b": {"type": "boolean"},
        "o": {"type": "object"}, "l": {"type": "array"}, "m": {"type": ["string", "null"]},
        "u": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/word"}]}, "e": {"enum": ["1", "2"]},
    },
    "$defs": {"word": {"type": "string"}},
}  # fmt: skip
TOOLS: dict[str, dict[str, Any]] = {"f": {}, "get_weather": {}, "a.b/c": {}, "t": TYPED}
FORMATS = {
    "hermes": HERMES, "plain": PLAIN, "llama": LLAMA, "mistral": MISTRAL, "named": MISTRAL_NAMED, "python": PYTHON,
    "lfm": LFM, "coder": QWEN_CODER, "seed": SEED, "glm": GLM,
}  # fmt: skip


def parse(form: ToolFormat, pieces: list[str], *, cut: bool = True) -> list[Any]:
    """Texts, and (name, arguments) for calls, in order; ids and indexes are checked on the way."""
    parser = ToolParser(form, TOOLS)
    found: list[Any] = []
    ids: set[str] = set()
    for i, piece in enumerate(pieces):
        for part in parser.push(piece, end=i == len(pieces) - 1, cut=cut):
            match part:
                case str():
                    assert part
                    if found and isinstance(found[-1], str):
                        part = found.pop() + part
                    found.append(part)
                case CallStart():
                    assert part.index == len(ids)
                    ids.add(part.id)
                    assert len(ids) == part.index + 1
                    found.append((part.name, ""))
                case CallArguments():
                    assert part.index == len(ids) - 1
                    name, text = found.pop()
                    found.append((name, text + part.text))
    assert parser.calls == len(ids)
    return found


CALL = '{"name": "f", "arguments": {"a": [1, "}"]}}'


def coder(name: str, **arguments: str) -> str:
    """A call as Qwen3-Coder's template writes it."""
    lines = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{lines}</function>\n</tool_call>"


def glm(name: str, **arguments: str) -> str:
    """A call as GLM 4.5's template writes it."""
    lines = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in arguments.items()
    )
    return f"<tool_call>{name}\n{lines}</tool_call>"


ARGUMENTS = '{"a": [1, "}"]}'


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", [("f", ARGUMENTS)]),
        ("hermes", f"Let me see.\n\n<tool_call>\n{CALL}\n</tool_call>\n", ["Let me see.", ("f", ARGUMENTS)]),
        ("hermes", f"<tool_call>{CALL}</tool_call> <tool_call>{CALL}</tool_call> so", [("f", ARGUMENTS)] * 2 + ["so"]),
        ("hermes", f"<tool_call>[{CALL}, {CALL}]</tool_call>", [("f", ARGUMENTS)] * 2),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"id": 7, "name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", '{"a": 1}')]),
        ("hermes", r'<tool_call>{"name": "f", "arguments": "{\"a\": \"\ud83d\"}"}</tool_call>', [("f", r'{"a": "\ud83d"}')]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}, "x": [{}]}</tool_call>', [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>', [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "un', [("f", '{"a": "un')]),
        ("hermes", '<tool_call>{"name": "f", "argu', ['<tool_call>{"name": "f", "argu']),
        ("hermes", '<tool_call>{"name": "g", "arguments": {}}</tool_call>', ['<tool_call>{"name": "g", "arguments": {}}</tool_call>']),
        ("hermes", '<tool_call>{"name": "f", "arguments": 3}</tool_call>', ['<tool_call>{"name": "f", "arguments": 3}</tool_call>']),
        ("hermes", "the <tool_call> mark and <tool", ["the <tool_call> mark and <tool"]),
        ("hermes", "a <tool_call></tool_call> b", ["a <tool_call></tool_call> b"]),
        ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>", [("f", ARGUMENTS)]),
        ("hermes", " \n", [" \n"]),
        ("hermes", "a <" + " " * 200 + "b", ["a <" + " " * 200 + "b"]),
        ("hermes", '{"name": "f", "arguments": {}}', ['{"name": "f", "arguments": {}}']),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [}}}</tool_call>x', [("f", '{"a": ['), "}}}</tool_call>x"]),
        ("llama", '{"name": "f", "parameters": {"a": "é"}}', [("f", '{"a": "é"}')]),
        ("llama", ' <|python_tag|>{"name": "f", "parameters": {}}', [("f", "{}")]),
        ("llama", '{"name": "f", "parameters": {}}; {"name": "a.b/c", "parameters": {}}', [("f", "{}"), ("a.b/c", "{}")]),
        ("llama", 'so {"name": "f", "parameters": {}}', ['so {"name": "f", "parameters": {}}']),
        ("llama", '\n{"name": "g"}', ['\n{"name": "g"}']),
        ("llama", "  {", ["  {"]),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]', [("f", '{"a": 1}')]),
        ("mistral", f"a[TOOL_CALLS][{CALL},{CALL}]", ["a", ("f", ARGUMENTS), ("f", ARGUMENTS)]),
        ("mistral", "[TOOL_CALLS] none", ["[TOOL_CALLS] none"]),
        ("named", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather{"b": {}}', [("f", '{"a": 1}'), ("get_weather", '{"b": {}}')]),
        ("named", '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}', [("f", '{"a": 1}')]),
        ("named", f"[TOOL_CALLS] [{CALL}]", [("f", ARGUMENTS)]),
        ("named", '[TOOL_CALLS]g[ARGS]{"a": 1}', ['[TOOL_CALLS]g[ARGS]{"a": 1}']),
        ("python", "[f(a=1, b='x]', c=[True, None, -2.5], d={\"k\": false})]", [("f", '{"a": 1, "b": "x]", "c": [true, null, -2.5], "d": {"k": false}}')]),
        ("python", "[f(), get_weather(**{\"a b\": 1})]", [("f", "{}"), ("get_weather", '{"a b": 1}')]),
        ("python", "[f(1)]", ["[f(1)]"]),
        ("python", "[f(a=open('x'))]", ["[f(a=open('x'))]"]),
        ("python", "[1, 2]", ["[1, 2]"]),
        ("python", "see [f(a=1)]", ["see [f(a=1)]"]),
        ("lfm", "ok <|tool_call_start|>[f(a=1)]<|tool_call_end|>done", ["ok", ("f", '{"a": 1}'), "done"]),
        ("coder", f"See.\n{coder('f', a='1')}\n{coder('t', s='2')}\nso", ["See.", ("f", '{"a": 1}'), ("t", '{"s": "2"}'), "so"]),
        ("coder", coder("f"), [("f", "{}")]),
        ("coder", coder("t", s=' "a"\n<b>\\</c>\n\n'), [("t", '{"s": " \\"a\\"\\n<b>\\\\</c>\\n\\n"}')]),
        ("coder", "<function=t><parameter=n>7</parameter><parameter=b>True</parameter></function> ok", [("t", '{"n": 7, "b": true}'), "ok"]),
        ("coder", f"<tool_call>\n{CALL}\n</tool_call>", [("f", ARGUMENTS)]),
        ("coder", coder("t", s="un").partition("un\n")[0] + "un", [("t", '{"s": "un')]),
        ("coder", coder("g", a="1"), [coder("g", a="1")]),
        ("coder", "call <function=f> or <tool_call>", ["call <function=f> or <tool_call>"]),
        ("coder", "<function=f>\n<b>", ["<function=f>\n<b>"]),
        ("coder", "<function=f>\n<parameter=a>1</parameter>\n<b>x", [("f", '{"a": 1}'), "<b>x"]),
        ("coder", coder("f", a="1").replace("</function>\n", ""), [("f", '{"a": 1}')]),
        ("coder", f"{coder('f').replace('</function>', '')} so", [("f", "{}"), "so"]),
        ("coder", "<function=f><parameter=a>1</parameter><function=t></function>", [("f", '{"a": 1}'), ("t", "{}")]),
        ("glm", "<tool_call>t<arg_key>s</arg_key>a<arg_key>", [("t", '{"s": ""}'), "a<arg_key>"]),
        ("seed", coder("f", a="1").replace("tool_call", "seed:tool_call"), [("f", '{"a": 1}')]),
        ("glm", f"See.\n{glm('f', a='1')}\n{glm('t', s='2')}\nso", ["See.", ("f", '{"a": 1}'), ("t", '{"s": "2"}'), "so"]),
        ("glm", "<tool_call>f</tool_call> ok", [("f", "{}"), "ok"]),
        ("glm", "<tool_call>t<arg_key>s</arg_key><arg_value>a\n</arg_value><arg_key>n</arg_key> <arg_value> 1 </arg_value></tool_call>", [("t", '{"s": "a\\n", "n": 1}')]),
        ("glm", "<tool_call>ls <arg_key>s</arg_key>", ["<tool_call>ls <arg_key>s</arg_key>"]),
        ("glm", "<tool_call>f<b>", ["<tool_call>f<b>"]),
        ("glm", f"<tool_call>{CALL}</tool_call>", [("f", ARGUMENTS)]),
        ("glm", "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>[1,", [("f", '{"a": ')]),
    ],
)  # fmt: skip
def test_by_hand_whole_and_character_by_character(form: str, text: str, expected: list[Any]):
    assert parse(FORMATS[form], [text]) == expected
    assert parse(FORMATS[form], list(text)) == expected


@pytest.mark.parametrize(
    ("key", "written", "expected"),
    [
        ("s", "5", "5"), ("s", "null", "null"), ("s", "", ""), ("n", "5", 5), ("n", " 5\n", 5), ("n", "five", "five"),
        ("x", "5", 5), ("x", "-2.5", -2.5), ("x", "NaN", "NaN"), ("b", "true", True), ("b", "False", False),
        ("b", "null", None), ("o", '{"a": [1]}', {"a": [1]}), ("o", "{'a': None, 'b': 'it'}", {"a": None, "b": "it"}),
        ("l", "[1, 2]", [1, 2]), ("l", "(1, 2)", [1, 2]), ("l", "open('x')", "open('x')"),
        ("l", r"['\ud83d\ude00 \xe9']", ["😀 é"]), ("l", r"['\ud83d']", ["\ud83d"]), ("s", r"'\ud83d'", r"'\ud83d'"), ("m", "null", None),
        ("m", "None", None), ("m", "5", "5"), ("m", "no", "no"), ("u", "5", 5), ("u", "5.5", "5.5"), ("u", "a", "a"),
        ("e", "1", "1"), ("other", "5", 5), ("other", "a b", "a b"), ("other", '"a"', '"a"'),
    ],
)  # fmt: skip
def test_a_value_in_tags_is_what_its_schema_says(key: str, written: str, expected: Any):
    for form, text in ((QWEN_CODER, coder("t", **{key: written})), (GLM, glm("t", **{key: written}))):
        [(_, arguments)] = parse(form, [text])
        assert json.loads(arguments.encode()) == {key: expected}
        assert type(json.loads(arguments)[key]) is type(expected)


@pytest.mark.parametrize("form", ["coder", "seed", "glm"])
def test_a_call_in_tags_that_breaks_off_anywhere_has_arguments_in_json(form: str):
    values = {"s": 'a"\n', "l": "['x']"}
    written = glm("t", **values) if form == "glm" else coder("t", **values)
    text, close = written.replace("tool_call", FORMATS[form].close[2:-1]), FORMATS[form].close
    [(_, arguments)] = parse(FORMATS[form], [text])
    for at in range(len(text)):
        for more in ("", close, "\nso", "<b>", text):
            for part in parse(FORMATS[form], [*text[:at], *more, ""], cut=False):
                assert isinstance(part, str) or isinstance(json.loads(part[1]), dict), text[:at] + more
        # Cut off, they end where they end.
        for part in parse(FORMATS[form], [*text[:at], ""]):
            assert isinstance(part, str) or arguments.startswith(part[1])


def test_a_text_in_tags_is_told_as_it_comes():
    parser = ToolParser(QWEN_CODER, TOOLS)
    pieces = [parser.push(char) for char in coder("t", s="def f():\n    pass")]
    told = [piece.text for found in pieces for piece in found if isinstance(piece, CallArguments)]
    assert told[1:5] == ["d", "e", "f", " "]


WORDS = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|tool_call_start|>",
        "<|tool_call_end|>", '{"name": "f", ', '"arguments": ', '"parameters": {', '{"a": 1}', "}", "]", "[", "f(", "f",
        "a=1", ")", CALL, " ", "\n", ", ", "; ", '"', "\\", "é", " " * 70, "get_weather", "text", "[f(a='", "{", "()",
        "<function=f>", "<function=", "t>", "<parameter=", "<parameter=s>", "</parameter>", "</function>", "<arg_key>",
        "s</arg_key>", "<arg_value>", "</arg_value>", coder("t", s="1"), glm("t", s="1"), "<", ">",
    ]
)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.lists(WORDS, max_size=14), st.data())
def test_how_an_answer_is_cut_does_not_matter(form: str, words: list[str], data: st.DataObject):
    text = "".join(words)
    whole = parse(FORMATS[form], [text])
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(FORMATS[form], pieces) == whole
    assert parse(FORMATS[form], [*text, ""]) == whole


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.lists(WORDS, max_size=10))
@example("hermes", ["text", " " * 70, "<tool_call>"])
def test_an_answer_without_calls_is_text_to_the_last_character(form: str, words: list[str]):
    text = "".join(words)
    found = parse(FORMATS[form], [text])
    if all(isinstance(part, str) for part in found):
        assert "".join(found) == text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=4), st.booleans())
def test_any_arguments_come_out_as_they_went_in(arguments: dict[str, Any], ascii_only: bool):
    text = json.dumps(arguments, ensure_ascii=ascii_only)
    written = {
        "hermes": f'<tool_call>\n{{"name": "f", "arguments": {text}}}\n</tool_call>',
        "llama": f'{{"name": "f", "parameters": {text}}}',
        "mistral": f'[TOOL_CALLS] [{{"name": "f", "arguments": {text}}}]',
        "named": f"[TOOL_CALLS]f[ARGS]{text}",
        "python": f"[f(**{arguments!r})]",
    }
    for form, answer in written.items():
        [(name, found)] = parse(FORMATS[form], list(answer))
        assert name == "f"
        assert json.loads(found) == arguments


def test_hostile_answers_take_linear_time():
    for form in FORMATS.values():
        for text in (
            "<tool_call>" * 4_000,
            "[" * 20_000,
            "{" * 20_000,
            "[f(" * 7_000,
            " " * 50_000,
            "<" * 20_000,
            "<function=f><parameter=a>" + "\n</parameter" * 4_000,
            "<tool_call>f<arg_key>a</arg_key><arg_value>" + "<" * 20_000,
        ):
            parse(form, [text[i : i + 4] for i in range(0, len(text), 4)])


def test_ids_are_what_the_template_takes():
    [start, *_] = ToolParser(MISTRAL, TOOLS).push(f"[TOOL_CALLS][{CALL}]")
    assert isinstance(start, CallStart)
    assert len(start.id) == 9
    assert start.id.isalnum()
