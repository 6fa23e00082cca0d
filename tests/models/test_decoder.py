"""The decoder's logits against transformers': prefill in chunks beside another row, then token by token, over page
borders, for every family, with both kernels."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.rounding import rounded_model
from tests.support.tiny import TINY_KINDS, hf_logits, one_of_each, tiny_model
from xlane.engine.programs import param_sharding
from xlane.engine.state import Shapes, abstract_kv, zeros_like
from xlane.models.attention import XlaKernels
from xlane.models.decoder import DecoderGraph
from xlane.models.kernels import Kernels, KvLayer, PagedBatch, Weight
from xlane.models.loader import load_params
from xlane.models.opened import open_model
from xlane.models.spec import Quant
from xlane.sharding.mesh import make_placement

pytestmark = pytest.mark.slow

PAGE_TOKENS, PAGES, WIDTH = 4, 24, 8
TOLERANCE = 1e-4
"""Largest error relative to the largest logit, float32. Never relaxed."""

SPLIT_KINDS = (
    "gemma2",
    "gemma3",
    "phi3",
    "phi",
    "olmo2",
    "cohere",
    "bloom",
    "gpt2",
    "falcon-40b",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
)

OURS = np.random.default_rng(1).integers(3, 131, 23).tolist()
OTHER = np.random.default_rng(2).integers(3, 131, 9).tolist()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


class Network:
    """A tiny model with its KV pool, called directly."""

    def __init__(
        self,
        path: Path,
        kernels: Kernels,
        devices: int = 1,
        quant: Quant | None = None,
        adapters: tuple[tuple[str, str], ...] = (),
        data: int = 1,
    ) -> None:
        opened = open_model(path, adapters=adapters)
        self.config = opened.config
        self.graph = DecoderGraph.of(opened.config, "float32", packed=kernels.packed, quant=quant)
        self.placement = make_placement(data, devices)
        assert opened.source is not None
        self.params = load_params(
            self.graph.specs, opened.source, lambda spec: param_sharding(self.placement, spec)
        )
        shapes = Shapes(2, PAGES, PAGE_TOKENS, WIDTH, opened.config.vocab_size)
        self.kv: tuple[KvLayer, ...] = zeros_like(
            abstract_kv(opened.config, shapes, "float32", self.placement)
        )
        self.kernels = kernels
        # Scattered on purpose: pages of a row are neither adjacent nor in order.
        self.table = (
            np.random.default_rng(3).permutation(PAGES)[: 2 * WIDTH].reshape(2, WIDTH).astype(np.int32)
        )

    def __call__(
        self,
        tokens: list[int],
        rows: list[int],
        positions: list[int],
        one_token_rows: bool,
        adapters: list[int] | None = None,
    ) -> np.ndarray:
        """Run one launch -> float32[T, V]."""
        table = self.table[rows] if one_token_rows else self.table
        index = list(range(len(rows))) if one_token_rows else rows
        batch = PagedBatch(jnp.array(positions, jnp.int32), jnp.array(index, jnp.int32), jnp.array(table))
        logits, self.kv = _launch(
            self.graph,
            self.kernels,
            len(tokens) if one_token_rows else 0,
            self.params,
            self.kv,
            jnp.array(tokens, jnp.int32),
            batch,
            None if adapters is None else jnp.array(adapters, jnp.int32),
        )
        return np.asarray(logits)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _launch(graph, kernels, one_token_rows, params, kv, tokens, batch, adapters):
    decoder = graph.merge(params)
    hidden, kv = decoder(
        tokens, batch, kv, kernels, lambda x, axes: x, one_token_rows=one_token_rows, adapters=adapters
    )
    return decoder.logits(hidden, kernels), kv


def largest_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_logits_equal_transformers(kind: str, kernels: Kernels, models: Path) -> None:
    path = tiny_model(kind, models)
    ours, other = hf_logits(path, OURS), hf_logits(path, OTHER)
    network = Network(path, kernels)

    first = network(OURS[:10] + [0] * 2, [0] * 12, [*range(10), -1, -1], False)
    assert largest_error(first[:10], ours[:10]) <= TOLERANCE

    # The second chunk shares its launch with another sequence's prompt.
    second = network(
        OURS[10:14] + OTHER[:6] + [0] * 2, [0] * 4 + [1] * 8, [*range(10, 14), *range(6), -1, -1], False
    )
    assert largest_error(second[:4], ours[10:14]) <= TOLERANCE
    assert largest_error(second[4:10], other[:6]) <= TOLERANCE

    for step in range(3):
        both = network([OTHER[6 + step], OURS[14 + step]], [1, 0], [6 + step, 14 + step], True)
        assert largest_error(both[0], other[6 + step]) <= TOLERANCE
        assert largest_error(both[1], ours[14 + step]) <= TOLERANCE
    for position in range(17, len(OURS)):
        alone = network([OURS[position], 0], [0, 1], [position, -1], True)
        assert largest_error(alone[0], ours[position]) <= TOLERANCE


@pytest.mark.parametrize("kind", SPLIT_KINDS)
def test_a_split_model_gives_the_same_logits(kind: str, models: Path) -> None:
    """Over two devices, a prefill and a decode; one kind for each way in which parameters can be split."""
    path = tiny_model(kind, models)
    ours = hf_logits(path, OURS)
    network = Network(path, XlaKernels("cpu", make_placement(1, 2)), devices=2)
    split = [p for p in network.params if p.sharding.shard_shape(p.shape) != p.shape]
    assert sum(p.size for p in split) > 0.7 * sum(p.size for p in network.params)
    first = network(OURS[:10] + [0] * 2, [0] * 12, [*range(10), -1, -1], False)
    assert largest_error(first[:10], ours[:10]) <= TOLERANCE
    alone = network([0, OURS[10]], [1, 0], [-1, 10], True)
    assert largest_error(alone[1], ours[10]) <= TOLERANCE


def test_experts_lie_over_both_axes_of_a_mesh(models: Path) -> None:
    """Two by two devices hold one each of four; launches whose tokens divide over the data axis, and one whose do not."""
    path = tiny_model("mixtral", models)
    ours = hf_logits(path, OURS)
    network = Network(path, XlaKernels("cpu", make_placement(2, 2)), devices=2, data=2)
    paths = [spec.path for spec in network.graph.specs]
    down = network.params[paths.index("layers.0.experts.down.weight")]
    assert down.sharding.shard_shape(down.shape) == (1, *down.shape[1:])
    first = network(OURS[:10] + [0] * 2, [0] * 12, [*range(10), -1, -1], False)
    assert largest_error(first[:10], ours[:10]) <= TOLERANCE
    second = network(OURS[10:13], [0] * 3, [10, 11, 12], False)
    assert largest_error(second, ours[10:13]) <= TOLERANCE
    alone = network([0, OURS[13]], [1, 0], [-1, 13], True)
    assert largest_error(alone[1], ours[13]) <= TOLERANCE


@pytest.mark.parametrize("kernels", ["native"], indirect=True)
@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("kind", one_of_each(TINY_KINDS))
def test_logits_in_few_bits_equal_transformers_with_rounded_weights(
    kind: str, quant: Quant, kernels: Kernels, models: Path
) -> None:
    """A prefill and a decode. Rounding is all that few bits change: the tolerance stays that of whole weights. Plain XLA
    does this over two devices, below."""
    path = tiny_model(kind, models)
    rounded = hf_logits(rounded_model(path, quant), OURS)
    assert largest_error(rounded, hf_logits(path, OURS)) > 10 * TOLERANCE
    network = Network(path, kernels, quant=quant)
    first = network(OURS[:10] + [0] * 2, [0] * 12, [*range(10), -1, -1], False)
    assert largest_error(first[:10], rounded[:10]) <= TOLERANCE
    alone = network([0, OURS[10]], [1, 0], [-1, 10], True)
    assert largest_error(alone[1], rounded[10]) <= TOLERANCE


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("kind", SPLIT_KINDS)
def test_a_split_model_in_few_bits_gives_the_same_logits(kind: str, quant: Quant, models: Path) -> None:
    """Over two devices; what is split along the inputs has its scales from whole rows."""
    path = tiny_model(kind, models)
    rounded = hf_logits(rounded_model(path, quant), OURS)
    network = Network(path, XlaKernels("cpu", make_placement(1, 2)), devices=2, quant=quant)
    leaves = jax.tree.leaves(network.params)
    split = [p for p in leaves if p.sharding.shard_shape(p.shape) != p.shape]
    assert sum(p.size for p in split) > 0.5 * sum(p.size for p in leaves)
    first = network(OURS[:10] + [0] * 2, [0] * 12, [*range(10), -1, -1], False)
    assert largest_error(first[:10], rounded[:10]) <= TOLERANCE


class Watched(XlaKernels):
    """Notes which rows of each product hold anything but zeros."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.filled: list[list[bool]] = []

    def linear(self, x: jax.Array, weight: Weight, outputs: int) -> jax.Array:
        """See `Kernels.linear`."""
        jax.debug.callback(lambda filled: self.filled.append(filled.tolist()), (x != 0).any(axis=1))
        return super().linear(x, weight, outputs)


@pytest.mark.parametrize("kind", ["llama-gqa-tied", "qwen2", "gemma3"])
def test_padding_is_zeros_in_every_product(kind: str, models: Path) -> None:
    """The native kernels compute nothing for such rows."""
    kernels = Watched()
    Network(tiny_model(kind, models), kernels)([5, 0, 6], [0, 1, 0], [0, -1, 1], False)
    jax.effects_barrier()
    assert len(kernels.filled) > 8
    assert kernels.filled == [[True, False, True]] * len(kernels.filled)


def test_specs_follow_the_order_of_the_tree() -> None:
    """More than ten layers: a path sorted as text would put layer 10 before layer 2."""
    from xlane.models.config import ModelConfig

    config = ModelConfig(
        family="llama", vocab_size=8, hidden_size=8, layers=12, heads=2, kv_heads=1, head_dim=4, ffn_size=8,
        max_positions=16, norm_eps=1e-5, rope_theta=1e4,
    )  # fmt: skip
    graph = DecoderGraph.of(config, "float32")
    params = tuple(jnp.full(spec.shape, float(number)) for number, spec in enumerate(graph.specs))
    decoder = graph.merge(params)
    numbers = {spec.path: number for number, spec in enumerate(graph.specs)}
    for layer in (2, 10):
        assert decoder.layers[layer].down.weight[...][0, 0] == numbers[f"layers.{layer}.down.weight"]
    assert decoder.head is not None
    assert decoder.head.weight[...][0, 0] == numbers["head.weight"]
