"""Chat templates applied as transformers does, one question a line of stdin, one answer after another on stdout.

Runs as a process of its own: whatever a template does ends with it. It asks the system to bound the time and the memory
that each takes, since nothing within Python can: one expression may take all there is of either. Knows Jinja; neither whose
template it is nor who asks.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .template_processes import MEMORY, OUT_OF_TIME, REFUSED, TEXT

Message = Mapping[str, Any]
KEPT_TEMPLATES = 8
MOST_WORDS = 1000
"""Of why not, characters."""
_GOES_ON = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks the end of a message that is gone on with; as transformers has it, for templates that cut spaces."""


class _Generation(Extension):
    """transformers' tag round what the assistant said."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


def render(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Message] | None,
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: Mapping[str, Any],
) -> str:
    """The text of a conversation. Raises whatever the template does."""
    documents = variables.get("documents")
    if documents is not None and not all(isinstance(document, dict) for document in documents):
        raise TypeError("documents are a list of objects with `title` and `text`")
    told = {"documents": None, **variables, "tools": tools, "add_generation_prompt": add_generation_prompt}
    if not continue_final_message:
        return _compiled(template).render(messages=messages, **told)
    *others, last = messages
    marked = [*others, {**last, "content": last["content"] + _GOES_ON}]
    text = _compiled(template).render(messages=marked, **told)
    at = text.rfind(_GOES_ON.strip())
    if at < 0 or last["content"].strip() not in text:
        raise ValueError("it does not show the last message as it is, so it cannot be gone on with")
    # A template that cuts the spaces after the mark would have cut those before it.
    return text[:at] if text.startswith(_GOES_ON, at) else text[:at].rstrip()


def variables(template: str) -> str:
    """Names that a template reads from outside, as JSON."""
    environment = _environment()
    return json.dumps(sorted(meta.find_undeclared_variables(environment.parse(template))))


@lru_cache(KEPT_TEMPLATES)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


_ASKED: Mapping[str, Callable[..., str]] = {"render": render, "variables": variables}


@contextmanager
def _bounded(cpu_s: float, memory_bytes: int) -> Iterator[None]:
    """MemoryError beyond so much more memory than is held now, and the end of the process after so much time of a processor.
    (Systems without Linux's /proc have no bound of memory.)"""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        bounds = [held + memory_bytes, *(bound for bound in before if bound != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_AS, (min(bounds), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _answer(question: dict[str, Any]) -> tuple[str, bytes]:
    """Kind and content."""
    work = _ASKED[question.pop("asked")]
    try:
        with _bounded(question.pop("cpu_s"), question.pop("memory_bytes")):
            return TEXT, work(**question).encode(errors="surrogatepass")
    except MemoryError:
        return MEMORY, b""
    except Exception as error:  # a template is a program of the model's author: anything can happen in it
        return REFUSED, str(error)[:MOST_WORDS].encode(errors="surrogatepass")


def main() -> None:
    """Answer until nobody asks any more, or something had to be broken off for want of memory."""
    signal.signal(OUT_OF_TIME, signal.SIG_DFL)
    kind = TEXT
    while kind != MEMORY and (line := sys.stdin.buffer.readline()):
        kind, content = _answer(json.loads(line))
        sys.stdout.buffer.write(json.dumps([kind, len(content)]).encode() + b"\n" + content)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
