"""Chat templates that do harm: each is broken off at its limit, and neither this process nor the next chat notices."""

import gc
import os
import signal
import threading

import pytest

from xlane.models.chat import ChatTemplates
from xlane.models.errors import TemplateTooCostly, TokenizerError
from xlane.models.template_processes import TemplateLimits

MESSAGES = [{"role": "user", "content": "a"}]
FEW = TemplateLimits(cpu_s=0.3, memory_bytes=64_000_000)
WORDS = "{{ messages[0].content }}"
OUT_OF_MEMORY = "the chat template takes more than 64 MB of memory for these messages"
OUT_OF_TIME = "the chat template takes longer than 0.3 s for these messages"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"
GROW = "{% set n = namespace(x=BEGIN) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"
COSTLY = {
    "a constant, when it is compiled": ("{{ 'a' * 10**9 }}", OUT_OF_MEMORY),
    "a text, repeated": ("{{ messages[0].content * 10**9 }}", OUT_OF_MEMORY),
    "a text that grows": (GROW.replace("BEGIN", "messages[0].content"), OUT_OF_MEMORY),
    "a list that grows": (GROW.replace("BEGIN", "messages"), OUT_OF_MEMORY),
    "a width": ("{{ '%1000000000d' | format(messages | length) }}", OUT_OF_MEMORY),
    "a width of a method": ("{{ '{:1000000000d}'.format(messages | length) }}", OUT_OF_MEMORY),
    "a filter": ("{{ messages[0].content | center(10**9) }}", OUT_OF_MEMORY),
    "what is told": (LOOP.replace("BODY", "{{ messages[0].content * 99999 }}"), OUT_OF_MEMORY),
    "a number, in one step": ("{{ 10 ** (messages | length * 10**8) }}", OUT_OF_TIME),
    "loops": (LOOP.replace("BODY", ""), OUT_OF_TIME),
}  # fmt: skip


@pytest.mark.parametrize("way", COSTLY)
def test_what_takes_too_much_is_broken_off(way: str):
    template, why = COSTLY[way]
    with pytest.raises(TemplateTooCostly) as caught:
        ChatTemplates({"default": template}, {}).render(MESSAGES, limits=FEW)
    assert (str(caught.value), caught.value.took) == (why, "memory" if "memory" in why else "time")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% if %}", "the chat template cannot be read: Expected an expression"),
        ("{{ messages[0].content * 10**9 }}", "the chat template takes more than 256 MB"),
        ("{{ raise_exception('a system message, please') }}", ""),
        (WORDS, ""),
    ],
)
def test_one_that_is_of_no_use_is_warned_of_when_it_is_loaded(
    template: str, why: str, caplog: pytest.LogCaptureFixture
):
    ChatTemplates({"default": template}, {}).warm()
    told = [record.message for record in caplog.records]
    assert [line.startswith(f"chats will be refused, texts will not: {why}") for line in told] == [
        True
    ] * bool(why)


def test_variables_are_looked_for_within_limits_too():
    chat = ChatTemplates({"default": "{{ mood }}" * 5_000}, {})
    with pytest.raises(TemplateTooCostly, match=r"longer than 0\.01 s"):
        chat.variables(limits=TemplateLimits(cpu_s=0.01))
    assert chat.variables() == {"mood"}


def test_what_is_refused_or_broken_off_leaves_nothing_behind():
    """The same process goes on after a refusal; after an end, another one."""
    chat = ChatTemplates({"default": "{{ messages[0].content * messages[0].times }}"}, {})

    def render(times: int) -> str:
        return chat.render([{"content": "ab", "times": times}], limits=FEW)

    assert render(2) == "abab"
    first = pid(chat)
    with pytest.raises(TokenizerError, match="index-sized"):
        render(10**30)
    assert render(3) == "ababab"
    assert pid(chat) == first
    with pytest.raises(TemplateTooCostly):
        render(10**9)
    assert not alive(first)
    assert render(1) == "ab"
    (process,) = chat._processes._idle
    process.kill()
    process.wait()
    assert render(2) == "abab"


def test_time_that_passes_without_it_is_not_the_templates():
    """A machine that is busy with others, or stood still, makes no chat a bad one."""
    chat = ChatTemplates({"default": WORDS}, {})
    chat.warm()
    os.kill(pid(chat), signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (pid(chat), signal.SIGCONT)).start()
    assert chat.render(MESSAGES, limits=TemplateLimits(cpu_s=0.1)) == "a"


def test_its_process_ends_with_it():
    chat = ChatTemplates({"default": WORDS}, {})
    chat.warm()
    process = pid(chat)
    assert alive(process)
    del chat
    gc.collect()
    assert not alive(process)


def test_what_is_no_json_is_refused():
    with pytest.raises(TokenizerError, match="takes what JSON can say: Object of type set"):
        ChatTemplates({"default": WORDS}, {}).render(MESSAGES, mood={"glad"})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "refused the messages"),
        ("{{ messages[0].content + 1 }}", "refused the messages"),
        ("{{ messages[99].content.x }}", "refused the messages"),
        ("{{ ''.__class__.__mro__ }}", "refused the messages"),
    ],
)
def test_what_a_template_refuses_is_said_in_its_words(template: str, message: str):
    chat = ChatTemplates({"default": template}, {})
    chat.warm()
    with pytest.raises(TokenizerError, match=message):
        chat.render(MESSAGES)


def pid(chat: ChatTemplates) -> int:
    """The process that it has, when it has nothing to do."""
    (process,) = chat._processes._idle
    return process.pid


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
