"""Time-outs and measurements go by a clock that nobody sets: who asks for the time of day is listed, and what for."""

import ast

from .test_untrusted import SOURCES, name_of

TIME_OF_DAY = {
    "time": {"time", "time_ns", "localtime", "gmtime", "ctime"},
    "datetime": {"now", "utcnow", "today"},
}
MAY_ASK = {
    "engine/process.py": "when something became of an engine, for whoever reads that",
    "models/template_sandbox.py": "chat templates, of the date",
    "server/bench.py": "a seed that is another one each time",
    "server/logs.py": "when a line was written",
    "server/openai_chunks.py": "`created`",
    "server/openai_chat.py": "`created`",
    "server/openai_completions.py": "`created`",
    "server/responses_shapes.py": "`created_at`, `completed_at`",
    "server/tls.py": "how much longer a certificate is valid",
    "server/tracing.py": "when a request arrived; its stages are counted from there",
}


def asks(tree: ast.AST) -> bool:
    """Whether it calls for the time of day."""
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.attr in TIME_OF_DAY.get(node.func.value.id, ())
        for node in ast.walk(tree)
    )


def test_only_who_is_listed_asks_for_the_time_of_day():
    assert {name_of(path) for path in SOURCES if asks(ast.parse(path.read_text()))} == set(MAY_ASK)
    assert asks(ast.parse("time.time_ns()"))
    assert not asks(ast.parse("time.monotonic()"))
