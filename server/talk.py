"""`xlane chat`: a conversation with a running server in a terminal. Knows `/v1/chat/completions` as any client does."""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, TextIO

from .remote import Remote, RemoteError

OK, CANNOT = 0, 1
HELP = """/new             forget the conversation
/system TEXT     what the model is told before it; no text takes that away
/model NAME      who answers, where the server has several
/set NAME VALUE  a parameter of each request: temperature, top_p, max_tokens, seed; no value takes it away
/help            this
/exit            leave; Ctrl-D too. Ctrl-C stops an answer"""
PARAMETERS: Mapping[str, Callable[[str], float]] = {
    "temperature": float, "top_p": float, "max_tokens": int, "seed": int,
}  # fmt: skip


class Talk:
    """One conversation."""

    def __init__(self, remote: Remote, out: TextIO, system: str = "") -> None:
        self._remote, self._out, self._system = remote, out, system
        self._said: list[dict[str, str]] = []
        self._parameters: dict[str, float] = {}
        self._model: str | None = None

    def take(self, line: str) -> bool:
        """One line of the person's; False if it was the last."""
        if line.strip() in ("/exit", "/quit"):
            return False
        if line.startswith("/"):
            self._tell(self._command(*line[1:].split(maxsplit=1)))
        elif line.strip():
            self._answer(line)
        return True

    def _command(self, name: str = "help", rest: str = "") -> str:
        if name == "new":
            self._said.clear()
            return "A new conversation."
        if name == "system":
            self._system = rest.strip()
            return "The model is told that first." if rest else "The model is told nothing first."
        if name == "model":
            self._model = rest.strip() or None
            return f"{self._model or 'The server’s first model'} answers from now on."
        if name == "set":
            return self._set(*rest.split())
        return HELP if name == "help" else f"There is no command /{name}.\n{HELP}"

    def _set(self, name: str = "", value: str = "", *more: str) -> str:
        if name not in PARAMETERS or more:
            return f"/set takes one of {', '.join(PARAMETERS)}, and a number."
        self._parameters.pop(name, None)
        try:
            if value:
                self._parameters[name] = PARAMETERS[name](value)
        except ValueError:
            return f"{name}={value} is no number of that kind."
        return f"{name} is {value or 'the server’s own choice'}."

    def _answer(self, text: str) -> None:
        first = [{"role": "system", "content": self._system}] if self._system else []
        messages = [*self._said, {"role": "user", "content": text}]
        body = {
            **self._parameters, "model": self._model, "messages": [*first, *messages], "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        parts: list[str] = []
        started, tokens = time.perf_counter(), 0
        try:
            with closing(self._remote.stream("/v1/chat/completions", body, self._tell)) as events:
                for event in events:
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                    for choice in event["choices"]:
                        if piece := choice["delta"].get("content"):
                            parts.append(piece)
                            self._out.write(piece)
                            self._out.flush()
            speed = f"{tokens} tokens in {time.perf_counter() - started:.1f} s"
        except KeyboardInterrupt:
            speed = "stopped"
        except RemoteError as error:
            self._tell(f"error: {error}")
            if not parts:
                return
            speed = "broken off"
        self._tell(f"\n[{speed}]")
        self._said = [*messages, {"role": "assistant", "content": "".join(parts)}]

    def _tell(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()


def chat(options: Mapping[str, Any], read: Callable[[str], str] = input, out: TextIO | None = None) -> int:
    """Talk until the person leaves; 1 if there is nobody to talk to. Raises UsageError."""
    remote = Remote(options["url"], options.get("api_key"))
    to = sys.stdout if out is None else out
    try:
        models = ", ".join(model["id"] for model in remote.get("/v1/models")["data"])
    except RemoteError as error:
        to.write(f"error: {error}\n")
        return CANNOT
    try:
        import readline  # noqa: F401  input() has history and editing once this is loaded
    except ImportError:
        pass  # there is none on some systems
    talk = Talk(remote, to, options.get("system") or "")
    to.write(f"{models} at {remote.url}; /help lists what else can be typed\n")
    while True:
        try:
            if not talk.take(read("> ")):
                return OK
        except EOFError:
            to.write("\n")
            return OK
        except KeyboardInterrupt:
            to.write("\n/exit leaves\n")
