"""The table of chips, and what a topology's name means."""

from types import SimpleNamespace

import pytest

from xlane.tpu.chips import CHIPS, TopologyError, chip_of, find_topology


@pytest.mark.parametrize(
    ("name", "chip", "count"),
    [
        ("v6e", "v6e", 1),
        ("v6e-8", "v6e", 8),
        ("V5E-4", "v5e", 4),
        ("v5e-256", "v5e", 256),
        ("v5p-8", "v5p", 4),  # its names count cores
        ("v5p-128", "v5p", 64),
        ("h200", "h200", 1),
        ("h100-8", "h100", 8),
    ],
)
def test_a_name_says_which_chips_and_how_many(name: str, chip: str, count: int):
    found = find_topology(name)
    assert (found.chip.name, found.count) == (chip, count)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v7", r"no topology v7: known are v5e-256, .*h200-8"),
        ("", r"known are"),
        ("v6e-3", r"after v6e- comes one of 1, 4, 8, 16"),
        ("v5p-4", r"after v5p- comes one of 8, 16"),
        ("h200-16", r"after h200- comes one of 1, 2, 4, 8"),
        ("h200-", r"after h200- comes"),
        ("h200-x", r"after h200- comes"),
    ],
)
def test_what_is_no_topology_is_refused_with_those_there_are(name: str, message: str):
    with pytest.raises(TopologyError, match=message):
        find_topology(name)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("TPU v4", None),
        ("cpu", None),
    ],
)
def test_a_device_is_known_by_its_kind(kind: str, name: str | None):
    chip = chip_of(SimpleNamespace(device_kind=kind))
    assert (chip and chip.name) == name


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_no_row_has_a_slip_of_a_digit(chip):
    """What holds for every accelerator of these years: memory is read in 8 to 80 ms, and it takes 100 to 600 operations a
    byte before arithmetic is what bounds."""
    assert 0.008 < chip.hbm_bytes / chip.hbm_bytes_per_s < 0.081
    assert 100 < chip.bf16_flops_per_s / chip.hbm_bytes_per_s < 600
    assert bool(chip.sizes) == (chip.platform == "tpu") == (not chip.describes)
