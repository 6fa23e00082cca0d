"""Adapters: what each adds to a parameter against merged weights, for every way in which tensors are fused, and refusals."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_decoder import OURS, TOLERANCE, Network, largest_error
from tests.support.lora import changed, lora
from tests.support.rounding import rounded_model
from tests.support.tiny import hf_logits, tiny_model
from xlane.models.attention import XlaKernels
from xlane.models.decoder import DecoderGraph
from xlane.models.errors import CheckpointError, ModelError
from xlane.models.modules import Linear, Style
from xlane.models.opened import open_model

DOWN = "base_model.model.model.layers.1.mlp.down_proj"


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny"


@pytest.mark.parametrize(
    ("kind", "targets", "others"),
    [
        ("llama-biases", "proj", "down"),
        ("phi3", "qkv_proj|gate_up_proj", "down|gate_up"),
        ("gpt2", r"h\.\d\.(attn|mlp)\.c_", "c_proj"),
        ("falcon-40b", "query_key_value|dense", "dense_h"),
        ("deepseek_v3", "q_[ab]_proj|kv_a_proj|o_proj", r"layers\.0\.mlp|q_b_proj"),
    ],
)
def test_what_is_added_is_the_difference_that_merging_makes(
    kind: str, targets: str, others: str, tiny: Path, tmp_path: Path
) -> None:
    plain = tiny_model(kind, tiny)
    one, merged_one = lora(plain, tmp_path, 4, targets, seed=1)
    two, merged_two = lora(plain, tmp_path, 2, others, seed=2, use_rslora=True)
    opened = open_model(plain, adapters=[("one", str(one)), ("two", str(two))])
    sources = [open_model(path).source for path in (plain, merged_one, merged_two)]
    specs = {spec.path: spec for spec in DecoderGraph.of(opened.config, "float32").specs}
    assert opened.source is not None
    opened.source.check(tuple(specs.values()))
    seen = 0
    for path, spec in specs.items():
        if spec.path.endswith((".lora_a", ".lora_b")) or not path.endswith(".weight"):
            continue
        before, *after = [source.read(spec, whole(spec.shape)) for source in sources if source]
        down = specs.get(path.replace(".weight", ".lora_a"))
        if down is None:
            assert all((merged == before).all() for merged in after), path
            continue
        up = specs[path.replace(".weight", ".lora_b")]
        a = opened.source.read(down, whole(down.shape)).reshape(2, -1, spec.shape[-1])
        b = opened.source.read(up, whole(up.shape)).reshape(*spec.shape[:-1], 2, -1)
        for slot, merged in enumerate(after):
            np.testing.assert_allclose(b[..., slot, :] @ a[slot], merged - before, atol=2e-5, err_msg=path)
        seen += 1
    assert seen >= 4


def test_logits_over_two_devices_are_those_of_merged_weights(tiny: Path, tmp_path: Path) -> None:
    """Three texts in one launch: one adapter, the other, none."""
    plain = tiny_model("llama-gqa-tied", tiny)
    pairs = [lora(plain, tmp_path, 4, "proj", seed=1), lora(plain, tmp_path, 2, "q_proj|down", seed=2)]
    named = tuple((str(number), str(adapter)) for number, (adapter, _) in enumerate(pairs))
    network = Network(plain, XlaKernels("cpu"), 2, adapters=named)
    rows, positions = [row for row in range(3) for _ in range(5)], [*range(5)] * 3
    network.table = np.arange(3 * 4, dtype=np.int32).reshape(3, 4)
    got = network(OURS[:5] * 3, rows, positions, False, adapters=[(2, 1, 0)[row] for row in rows])
    for row, merged in enumerate((pairs[1][1], pairs[0][1], plain)):
        want = hf_logits(merged, OURS[:5])
        assert largest_error(got[5 * row : 5 * row + 5], want) <= TOLERANCE


def test_an_adapter_adds_to_weights_in_few_bits_what_it_adds_to_others(tiny: Path, tmp_path: Path) -> None:
    plain = tiny_model("llama-gqa-tied", tiny)
    adapter, merged = lora(rounded_model(plain, "int4"), tmp_path, 4, "proj")
    network = Network(plain, XlaKernels("cpu"), quant="int4", adapters=(("x", str(adapter)),))
    got = network(OURS[:8], [0] * 8, [*range(8)], False, adapters=[1] * 8)
    assert largest_error(got, hf_logits(merged, OURS[:8])) <= TOLERANCE


@pytest.mark.parametrize(
    ("tensors", "said", "problem"),
    [
        ({}, {"use_dora": True}, "use_dora = True: supported: False"),
        ({}, {"bias": "all"}, "bias = 'all': supported: none"),
        ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save = "),
        ({}, {"peft_type": "IA3"}, "peft_type = 'IA3': supported: LORA"),
        ({}, {"lora_alpha": np.inf}, "lora_alpha = inf: a positive number is expected"),
        ({}, {"lora_alpha": 10**400}, "lora_alpha = 10+: a positive number is expected"),
        ({}, {"twist": 1}, "twist = 1: this option is not understood"),
        ({"base_model.model.lm_head.lora_A.weight": np.ones((4, 64), np.float32)}, {}, "lm_head.lora_A.weight changes nothing"),
        ({DOWN + ".lora_B.weight": np.ones((65, 4), np.float32)}, {}, r"adapter x: .*lora_B.weight is \(65, 4\), expected \(64, 4\)"),
        ({DOWN + ".lora_B.weight": None}, {}, "lora_B.weight is missing"),
    ],
)  # fmt: skip
def test_what_cannot_be_added_is_refused_by_name(
    tensors: dict[str, Any], said: dict[str, Any], problem: str, tiny: Path, tmp_path: Path
) -> None:
    plain = tiny_model("llama-biases", tiny)
    good, _ = lora(plain, tmp_path / "good", 4, "proj")

    def change(found: dict[str, np.ndarray]) -> None:
        for name, value in tensors.items():
            found.pop(name, None)
            if value is not None:
                found[name] = value

    bad = changed(good, tmp_path / "bad", change, **said)

    def read() -> None:
        opened = open_model(plain, adapters=[("x", str(bad))])
        assert opened.source is not None
        opened.source.check(DecoderGraph.of(opened.config, "float32").specs)

    with pytest.raises(ModelError, match=problem):
        read()


@pytest.mark.parametrize(
    ("part", "value", "alpha", "dtype"),
    [
        ("lora_B", 1.0, 1e40, "float32"),
        ("lora_B", 0.0, 1e40, "float32"),
        ("lora_B", 2e38, 8.0, "bfloat16"),
        ("lora_B", 3.4e38, 4.0, "bfloat16"),
        ("lora_B", 4e4, 8.0, "float16"),
        ("lora_B", np.nan, 4.0, "float32"),
        ("lora_A", 1e5, 4.0, "float16"),
        ("lora_A", -np.inf, 4.0, "float32"),
    ],
)
def test_what_is_not_finite_as_it_is_stored_is_refused_by_name(
    part: str, value: float, alpha: float, dtype: str, tiny: Path, tmp_path: Path
) -> None:
    """All slots are multiplied at once, so it would reach other adapters' tokens."""
    plain, tensor = tiny_model("llama-biases", tiny), f"{DOWN}.{part}.weight"
    good, _ = lora(plain, tmp_path / "good", 4, "proj")
    bad = changed(good, tmp_path / "bad", lambda found: found[tensor].fill(value), lora_alpha=alpha)
    opened = open_model(plain, adapters=[("x", str(bad))])
    assert opened.source is not None
    path = f"layers.1.down.{part.lower()}"
    (spec,) = (spec for spec in DecoderGraph.of(opened.config, dtype).specs if spec.path == path)
    with pytest.raises(CheckpointError, match=f"adapter x: tensor {tensor} .*not finite in {dtype}"):
        opened.source.read(spec, whole(spec.shape))


def test_what_overflows_under_one_adapter_is_nothing_to_the_tokens_of_others() -> None:
    linear = Linear((3, 4), (None, None), False, Style("float32", packed=False))
    linear.adapt("float32", 4)
    assert linear.lora_a is not None
    assert linear.lora_b is not None
    linear.weight.set_value(jnp.zeros((3, 4)))
    linear.lora_a.set_value(jnp.array([[3e38] * 4] * 2 + [[1.0] * 4] * 2))
    linear.lora_b.set_value(jnp.ones((3, 4)))
    had = jnp.array([[False, False], [False, True], [True, False]])
    none, second, first = np.asarray(linear(jnp.ones((3, 4)), XlaKernels("cpu"), had))
    assert not none.any()
    assert (second == 8).all()
    assert np.isinf(first).all()


def test_a_folder_without_an_adapter_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        open_model(tiny_model("llama-biases", tiny), adapters=[("x", str(tmp_path))])


def test_without_adapters_nothing_is_added(tiny: Path) -> None:
    opened = open_model(tiny_model("llama-biases", tiny), adapters=())
    assert opened.config.lora is None
    assert not [s for s in DecoderGraph.of(opened.config, "float32").specs if "lora" in s.path]
