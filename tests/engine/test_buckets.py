"""The sizes programs are compiled for."""

import pytest

from xlane.engine.buckets import decode_rows, prefill_tokens


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


@pytest.mark.parametrize("lanes", range(1, 70))
def test_every_number_of_rows_fits_a_program_less_than_twice_its_size(lanes: int) -> None:
    sizes = decode_rows(lanes, 1)
    for rows in range(1, lanes + 1):
        chosen = next(size for size in sizes if size >= rows)
        assert chosen < 2 * rows
