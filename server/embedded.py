"""JSON that others made → a part of an answer of ours. Knows what orjson, which writes all answers, cannot write; no API."""

import json
from typing import Any

import orjson


def embedded(value: Any) -> orjson.Fragment:
    """A JSON value as part of an answer: orjson itself writes no number over 64 bits, no half of a surrogate pair and nothing
    nested deeper than 254 levels. Raises ValueError, RecursionError where it is no JSON, or too deep for any reader."""
    try:
        return orjson.Fragment(orjson.dumps(value))
    except orjson.JSONEncodeError:
        return orjson.Fragment(json.dumps(value, allow_nan=False))
