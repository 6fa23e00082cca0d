"""The budget of prompt tokens beside streams, with times by hand."""

import pytest

from xlane.engine.pace import LATELY, SURE, WINDOW, Pace
from xlane.engine.turn import Size

ROWS_AND_TOKENS = [(rows, 0) for rows in (1, 2, 4, 8, 16)] + [(0, tokens) for tokens in (16, 32, 64, 128)]
ROWS_AND_TOKENS += [(1, 16), (4, 16), (16, 16), (16, 32), (16, 64)]
SIZES = tuple(sorted((Size(*size) for size in ROWS_AND_TOKENS), key=sum))
"""Beside lanes 16, 32 or 64 tokens, the larger ones in programs made for all 16 lanes."""


def observed(pace: Pace, took_ms: dict[tuple[int, int], float]) -> Pace:
    for size, milliseconds in took_ms.items():
        pace.observe(Size(*size), milliseconds / 1e3)
    return pace


def test_nobody_waits_so_all_is_computed() -> None:
    assert Pace(SIZES).prompt_tokens(0) == 128
    assert Pace(SIZES, 0.001).prompt_tokens(0) == 128


def test_the_smallest_piece_while_nothing_is_known() -> None:
    for pace in (Pace(SIZES), Pace(SIZES, 1.0)):
        assert {pace.prompt_tokens(rows) for rows in range(1, 17)} == {16}


@pytest.mark.parametrize(
    ("target_ms", "tokens"), [(10.0, 16), (60.0, 16), (95.0, 32), (119.0, 32), (120.0, 64), (900.0, 64)]
)
def test_the_largest_that_keeps_to_the_target(target_ms: float, tokens: int) -> None:
    took_ms = {(16, 0): 40.0, (16, 16): 60.0, (16, 32): 80.0, (16, 64): 120.0}
    pace = observed(Pace(SIZES, target_ms / 1e3), took_ms)
    assert pace.prompt_tokens(16) == tokens
    assert pace.prompt_tokens(9) == tokens


def test_what_was_never_launched_takes_at_most_in_proportion() -> None:
    """32 tokens beside 16 lanes are half as much again as 16 tokens beside them: 90 ms at most."""
    assert observed(Pace(SIZES, 0.089), {(16, 16): 60.0}).prompt_tokens(16) == 16
    assert observed(Pace(SIZES, 0.091), {(16, 16): 60.0}).prompt_tokens(16) == 32


def test_a_slow_launch_does_not_shut_a_size_out_and_several_do_for_a_while() -> None:
    pace = observed(Pace(SIZES, 0.091), {(16, 16): 60.0, (16, 32): 5000.0})
    assert pace.prompt_tokens(16) == 32
    for _ in range(SURE - 1):
        pace.observe(Size(16, 32), 0.110)
    assert pace.prompt_tokens(16) == 16
    for _ in range(LATELY):
        pace.observe(Size(16, 16), 0.060)
    assert pace.prompt_tokens(16) == 32


def test_what_decoding_alone_took_is_not_forgotten() -> None:
    pace = observed(Pace(SIZES), {(16, 0): 40.0})
    for _ in range(LATELY):
        pace.observe(Size(16, 16), 0.060)
    assert pace.prompt_tokens(16) == 16
    for _ in range(WINDOW):
        pace.observe(Size(16, 16), 0.050)
    assert pace.prompt_tokens(16) == 32  # 75 of 80 ms


def test_far_into_a_prompt_costs_are_others() -> None:
    """Behind 4,096 tokens 16 take as long as 64 do at the beginning, and what was seen there says nothing."""
    pace = observed(Pace(SIZES), {(16, 0): 40.0, (16, 16): 50.0, (16, 32): 60.0, (16, 64): 75.0})
    assert pace.prompt_tokens(16) == 64
    assert pace.prompt_tokens(16, behind=4096) == 16
    pace.observe(Size(16, 16), 0.075, 4096)
    assert pace.prompt_tokens(16, behind=4200) == 16
    assert pace.prompt_tokens(16, behind=511) == 64
    pace.observe(Size(16, 16), 0.050, 1024)
    assert pace.prompt_tokens(16, behind=2047) == 32
    assert pace.prompt_tokens(16, behind=2048) == pace.prompt_tokens(16, behind=1023) == 16


def test_without_a_target_a_turn_takes_twice_its_quiet_time() -> None:
    took_ms = {(16, 16): 60.0, (16, 32): 79.0, (16, 64): 120.0}
    assert observed(Pace(SIZES), took_ms).prompt_tokens(16) == 16
    assert observed(Pace(SIZES), {(16, 0): 40.0, **took_ms}).prompt_tokens(16) == 32
    assert observed(Pace(SIZES), {(16, 0): 60.0, **took_ms}).prompt_tokens(16) == 64
    # For each prompt that could be computed: 40, 80 and 120 ms are allowed.
    quiet = observed(Pace(SIZES), {(16, 0): 20.0, **took_ms})
    assert [quiet.prompt_tokens(16, prompts) for prompts in (1, 2, 3)] == [16, 32, 64]
    # What is quiet for eight lanes is told from what eight lanes take.
    assert observed(Pace(SIZES), {(16, 0): 60.0, (8, 0): 39.0, **took_ms}).prompt_tokens(8) == 16


def test_where_prompts_never_cease_the_quiet_time_is_at_least_that_of_less_work() -> None:
    took_ms = {(16, 16): 60.0, (16, 32): 75.0}
    # 16 of 32 rows: 30 ms at least, so 60 ms are allowed.
    assert observed(Pace(SIZES), took_ms).prompt_tokens(16) == 16
    assert observed(Pace(SIZES), {(4, 0): 38.0, **took_ms}).prompt_tokens(16) == 32
    assert observed(Pace(SIZES), {(4, 0): 38.0, **took_ms}).prompt_tokens(2) == 16
    assert observed(Pace(SIZES), {(16, 16): 60.0, (16, 32): 60.0, (16, 64): 60.0}).prompt_tokens(16) == 64


def test_the_last_launches_count_and_one_slow_one_does_not() -> None:
    pace = observed(Pace(SIZES, 0.1), {(16, 16): 60.0})
    for _ in range(WINDOW):
        pace.observe(Size(16, 32), 0.099)
    assert pace.prompt_tokens(16) == 32
    pace.observe(Size(16, 32), 9.0)
    assert pace.prompt_tokens(16) == 32
    for _ in range(WINDOW):
        pace.observe(Size(16, 32), 0.150)
        pace.observe(Size(16, 16), 0.080)
    assert pace.prompt_tokens(16) == 16


def test_few_lanes_go_in_a_program_of_many_if_there_is_the_time() -> None:
    took_ms = {(1, 0): 10.0, (1, 16): 15.0, (16, 32): 25.0, (16, 64): 40.0}
    assert observed(Pace(SIZES), took_ms).prompt_tokens(1) == 16
    assert observed(Pace(SIZES, 0.030), took_ms).prompt_tokens(1) == 32
    assert observed(Pace(SIZES, 9.0), took_ms).prompt_tokens(1) == 64


def test_a_larger_piece_that_takes_hardly_longer_is_taken_whatever_the_target() -> None:
    took_ms = {(16, 16): 80.0, (16, 32): 91.0, (16, 64): 120.0}
    assert observed(Pace(SIZES, 0.05), took_ms).prompt_tokens(16) == 32
    assert observed(Pace(SIZES, 0.05), {**took_ms, (16, 32): 93.0}).prompt_tokens(16) == 16
