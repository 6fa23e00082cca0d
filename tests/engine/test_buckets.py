"""The sizes programs are compiled for."""

import pytest

from xlane.engine.buckets import covering, decode_rows, launch_sizes, prefill_tokens
from xlane.engine.turn import Size


@pytest.mark.parametrize(
    ("lanes", "data", "sizes"),
    [
        (1, 1, (1,)),
        (4, 1, (1, 2, 4)),
        (6, 1, (1, 2, 4, 6)),
        (16, 4, (4, 8, 16)),
        (12, 3, (3, 6, 12)),
        (128, 1, (1, 2, 4, 8, 16, 32, 64, 128)),
    ],
)
def test_decode_rows(lanes: int, data: int, sizes: tuple[int, ...]) -> None:
    assert decode_rows(lanes, data) == sizes
    assert all(size % data == 0 for size in sizes)


@pytest.mark.parametrize(
    ("chunk", "smallest", "sizes"),
    [(128, 16, (16, 32, 64, 128)), (100, 16, (25, 50, 100)), (16, 16, (16,)), (5, 16, (5,)), (31, 16, (31,))],
)
def test_prefill_tokens(chunk: int, smallest: int, sizes: tuple[int, ...]) -> None:
    assert prefill_tokens(chunk, smallest) == sizes


@pytest.mark.parametrize(
    ("tokens", "most", "segments"),
    [
        (0, 8, 0),
        (1, 8, 1),
        (4, 8, 1),
        (7, 8, 1),
        (8, 8, 2),
        (31, 8, 7),
        (32, 8, 8),
        (2048, 8, 8),
        (128, 3, 3),
    ],
)
def test_segments_of_a_size(tokens: int, most: int, segments: int) -> None:
    assert Size(2, tokens).segments(most) == segments


def test_launch_sizes_by_hand() -> None:
    def names(*args: int) -> list[str]:
        return [size.name for size in launch_sizes(*args)]

    assert names(16, 1, 128, 8) == [
        "decode[1]", "decode[2]", "decode[4]", "decode[8]", "mixed[1+8]", "mixed[4+8]", "decode[16]", "mixed[1+16]",
        "mixed[16+8]", "prefill[32]", "mixed[16+32]", "prefill[64]", "prefill[128]", "mixed[16+128]",
    ]  # fmt: skip
    beside_all = [f"mixed[128+{tokens}]" for tokens in (64, 256, 1024, 2048)]
    assert [name for name in names(128, 1, 2048, 64) if name.startswith("mixed[128+")] == beside_all
    assert {*names(16, 1, 128, 8, 4)} == {
        *names(16, 1, 128, 8),
        *("mixed[1+4]", "mixed[4+4]", "mixed[8+4]", "mixed[16+4]"),
    }
    assert names(16, 1, 128, 8, 8) == names(16, 1, 128, 8)
    assert names(4, 1, 16, 8) == [
        "decode[1]",
        "decode[2]",
        "decode[4]",
        "mixed[1+8]",
        "mixed[4+8]",
        "mixed[1+16]",
        "mixed[4+16]",
    ]
    assert names(2, 2, 16, 8) == ["decode[2]", "mixed[2+8]", "mixed[2+16]"]
    assert names(1, 1, 8, 8) == ["decode[1]", "mixed[1+8]"]


@pytest.mark.parametrize(("lanes", "chunk"), [(1, 16), (3, 50), (16, 128), (128, 2048)])
def test_every_launch_fits_the_first_size_that_holds_it(lanes: int, chunk: int) -> None:
    sizes = launch_sizes(lanes, 1, chunk, 16)
    for rows in range(lanes + 1):
        most = max(size.tokens for size in sizes if size.holds(rows, size.tokens))
        for tokens in range(most + 1):
            fit = [
                s for s in sizes if s.rows >= rows and s.tokens >= tokens and bool(s.tokens) == bool(tokens)
            ]
            assert [size for size in sizes if size.holds(rows, tokens)] == fit
            assert fit or not (rows or tokens)
            assert fit == sorted(fit, key=sum)


@pytest.mark.parametrize("lanes", range(1, 70))
def test_every_number_of_rows_fits_a_program_less_than_twice_its_size(lanes: int) -> None:
    sizes = decode_rows(lanes, 1)
    for rows in range(1, lanes + 1):
        chosen = next(size for size in sizes if size >= rows)
        assert chosen < 2 * rows


@pytest.mark.parametrize(("lanes", "chunk"), [(4, 16), (16, 128), (1, 8), (3, 50)])
def test_whatever_is_launched_fits_one_that_covers_it(lanes: int, chunk: int) -> None:
    sizes = launch_sizes(lanes, 1, chunk, 8, 4)
    few = covering(sizes)
    for size in sizes:
        assert any((one.rows > 0) == (size.rows > 0) and one.holds(*size) for one in few)
    assert len(few) <= 4
