"""What a load asks for: exact lengths, shared beginnings, and requests from a file."""

import asyncio
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.support.paced_server import PacedServer, serving
from xlane.server.bench import load_of, measure
from xlane.server.bench_api import APIS
from xlane.server.bench_client import Endpoint
from xlane.server.bench_prompts import Prompt, Prompts, Wanted, choose, read_workload
from xlane.server.options import UsageError

ENTRIES = [
    {"prompt_tokens": 30, "output_tokens": 3},
    {"prompt": "one two three", "output_tokens": 4},
    {"id": "x", "conversations": [
        {"from": "human", "value": "a b"}, {"from": "gpt", "value": "c d e"}, {"from": "human", "value": "f"},
    ]},
]  # fmt: skip


def made(*wanted: Wanted, shared_prefix: int = 0, seed: int = 1, tokenizes: bool = True) -> list[Prompt]:
    async def go() -> list[Prompt]:
        paced = PacedServer()
        paced.tokenizes = tokenizes
        async with serving(paced) as url:
            prompts = Prompts(Endpoint.parse(url, None), APIS["openai"], shared_prefix, seed)
            return [await prompts.make(each) for each in wanted]

    return asyncio.run(go())


def words(count: int, output: int = 5) -> Wanted:
    return Wanted(prompt_tokens=count, output_tokens=output)


def test_lengths_are_as_the_server_counts():
    # Its words are two tokens each.
    assert [len(p.text.split()) for p in made(words(40), words(2), words(300))] == [20, 1, 150]


def test_prompts_share_a_prefix_only_if_told():
    one, two = (p.text.split() for p in made(words(40), words(60), shared_prefix=20))
    assert (len(one), len(two)) == (20, 30)
    assert one[:10] == two[:10]
    assert one[10:] != two[10:20]
    one, two = (p.text.split() for p in made(words(40), words(40)))
    assert one[:10] != two[:10]


def test_a_seed_gives_the_same_prompts_again():
    assert (
        made(words(40), words(30), seed=7)
        == made(words(40), words(30), seed=7)
        != made(words(40), words(30), seed=8)
    )


def test_a_word_is_a_token_where_nobody_counts():
    assert [len(p.text.split()) for p in made(words(40), tokenizes=False, shared_prefix=8)] == [40]


@pytest.mark.parametrize("lines", [True, False])
def test_a_file_of_requests(tmp_path: Path, lines: bool):
    path = tmp_path / "requests"
    path.write_text("\n\n".join(map(json.dumps, ENTRIES)) if lines else json.dumps(ENTRIES))
    lengths, text, conversation = made(*read_workload(str(path)))
    assert (len(lengths.text.split()), lengths.output_tokens) == (15, 3)
    assert (text.text, text.output_tokens) == ("one two three", 4)
    # As many tokens as the known answer has, by the server's count.
    assert (conversation.text, conversation.output_tokens) == ("a b", 6)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds no request"),
        ('{"prompt_tokens": 3}', "entry 1: expected prompt_tokens and output_tokens"),
        ('{"prompt_tokens": 3, "output_tokens": 2}\n{"prompt_tokens": 0, "output_tokens": 2}', "entry 2"),
        ('{"conversations": [{"value": "a"}]}', "entry 1"),
        ('{"prompt": "", "output_tokens": 2}', "entry 1"),
        ("[3]", "entry 1"),
        ("{", "Expecting property name"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_by_entry(tmp_path: Path, text: str, why: str):
    path = tmp_path / "requests.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=why):
        read_workload(str(path))


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="No such file"):
        read_workload(str(tmp_path / "none"))


def test_entries_are_all_chosen_before_one_comes_again():
    entries = [words(count) for count in range(1, 9)]
    taken = list(islice(choose(entries, 5), 16))
    assert Counter(taken) == dict.fromkeys(entries, 2)
    assert taken[:8] != entries
    assert taken == list(islice(choose(entries, 5), 16))


def test_a_run_over_a_file(tmp_path: Path):
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, ENTRIES)))
    options: dict[str, Any] = {"api": "openai", "workload": str(path), "requests": 6, "warmup": 0}
    paced = PacedServer()

    async def go() -> Any:
        async with serving(paced) as url:
            return await measure(load_of({"url": url, "concurrency": (2,), **options}), pytest.fail)

    (result,) = asyncio.run(go())
    assert (result.failed, result.short) == (0, 0)
    assert (result.output_tokens, result.prompt_tokens) == (
        round((3 + 4 + 6) / 3, 1),
        round((30 + 6 + 4) / 3, 1),
    )
