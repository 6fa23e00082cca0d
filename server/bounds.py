"""The bounds that few want to move: `--limit NAME=VALUE` does, for all of them.

Knows their names, what they may be and what they are of; what they are when nobody moves them is `ServerConfig`'s.
"""

from typing import Any

from .options import Flag, Kind


def _bound(name: str, help: str, kind: Kind = "int", at_least: float = 1, **rest: Any) -> Flag:
    return Flag(name, f"server.{name}", help, kind, at_least=at_least, **rest)


def _seconds(name: str, help: str) -> Flag:
    return _bound(name, help, "float", 0.001)


BOUNDS = (
    _bound("bodies_limit", "Most bytes of request bodies held at a time; more are answered with 429."),
    _bound("url_limit", "Longest path and query of a request, bytes."),
    _bound("header_limit", "Most bytes of a request's headers together."),
    _bound("header_count_limit", "Most header lines of a request."),
    _seconds("header_timeout_s", "Seconds a client has to send a whole request head."),
    _seconds("body_timeout_s", "Seconds a client has to send a request's body after its head."),
    _bound("keep_alive_timeout_s", "Seconds an idle connection is kept."),
    _bound("max_connections", "Most open connections, idle ones included."),
    _bound("max_choices", "Most sequences per prompt of one OpenAI request (`n`, `best_of`)."),
    _bound("max_best_of", "Most sequences of one request to TGI's routes (`best_of`)."),
    _bound("max_stop_sequences", "Most stop strings of a request.", at_least=0),
    _bound("max_stop_chars", "Longest stop string, characters."),
    _bound("max_top_n_tokens", "Most alternatives per token on TGI's routes.", at_least=0, at_most=20),
    _bound("max_client_batch_size", "Most prompts of a completion."),
    _bound("max_token_bytes", "Longest text one token may stand for, UTF-8 bytes: what a prompt's length is judged by."),
    _bound(
        "max_grammar_bytes", "Largest grammar of a request, the schemas of its tools included.", at_most=1 << 20
    ),
    _seconds("model_wait_s", "Seconds a request that does not stream waits for its model to be loaded (--more-models)."),
    _seconds("model_turn_s", "Seconds a model that is always in use keeps its place while another one waits for it."),
    _seconds("template_timeout_s", "Seconds of a processor that the rendering of one chat template may take."),
    _bound("template_memory_bytes", "Bytes of memory that it may take, beside the messages."),
    _seconds("grammar_timeout_s", "Seconds a request waits for its grammar to be checked."),
    _seconds("sse_keep_alive_s", "Seconds of silence after which a stream gets a comment, so that proxies keep it."),
    _seconds("write_timeout_s", "Seconds a client may leave its answer unread before it is cut off."),
)  # fmt: skip

OF_TGI = ("max_best_of", "max_stop_sequences", "max_top_n_tokens", "max_client_batch_size")
"""Those that TGI has an option for."""
