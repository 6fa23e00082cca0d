"""The native CPU kernels against NumPy in float64, and the promise that a row's bits never depend on its neighbours."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlane.engine.kernels.native.calls import NativeKernels
from xlane.models.attention import XlaKernels
from xlane.models.kernels import Kernels, KvLayer, PagedBatch
from xlane.models.spec import pack

# --- linear ---


def linear(kernels: NativeKernels, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.asarray(_linear(kernels, jnp.asarray(x), jnp.asarray(pack(weight)), weight.shape[0]))


@partial(jax.jit, static_argnums=(0, 3))
def _linear(kernels, x, weight, outputs):
    return kernels.linear(x, weight, outputs)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 11, 12, 13, 16, 17, 25, 130])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 8), (1, 1), (5, 3), (100, 77), (960, 576), (64, 1536)])
def test_linear_matches_numpy(kernels: NativeKernels, tokens: int, outputs: int, inputs: int) -> None:
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, inputs), dtype=np.float32)
    weight = rng.standard_normal((outputs, inputs), dtype=np.float32)
    want = x.astype(np.float64) @ weight.astype(np.float64).T
    # The proven bound of n fused multiply-adds: n units of rounding of the sum of magnitudes.
    bound = inputs * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T)
    assert (np.abs(linear(kernels, x, weight) - want) <= bound).all()


def test_linear_row_is_the_same_bits_in_any_batch(kernels: NativeKernels) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 576), dtype=np.float32)
    weight = rng.standard_normal((1000, 576), dtype=np.float32)
    whole = linear(kernels, x, weight)
    for tokens in [*range(1, 34), 64, 128]:
        np.testing.assert_array_equal(linear(kernels, x[:tokens], weight), whole[:tokens])
    np.testing.assert_array_equal(linear(kernels, x[150:151], weight), whole[150:151])


def test_linear_row_is_the_bits_of_one_ordered_sum(kernels: NativeKernels) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 40), dtype=np.float32)
    weight = rng.standard_normal((16, 40), dtype=np.float32)
    total = np.zeros(16, np.float32)
    for d in range(40):
        # A product of two float32 is exact in float64; the sum is then rounded once, as a fused multiply-add does,
        # but for double rounding, which these numbers do not meet. A machine without the instruction rounds both.
        product = np.float64(x[0, d]) * weight[:, d].astype(np.float64)
        if "portable" in kernels.name:
            product = product.astype(np.float32)
        total = (product + total.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(linear(kernels, x, weight)[0], total)


def test_linear_flushes_denormals_on_every_thread(kernels: NativeKernels) -> None:
    x, weight = np.full((4, 64), 1e-30, np.float32), np.full((4000, 64), 1e-10, np.float32)
    for _ in range(20):
        assert not linear(kernels, x, weight).any()


@pytest.mark.parametrize("computed", [0, 1, 7, 20, 70])
def test_a_row_of_zeros_is_not_computed_and_changes_no_other(kernels: NativeKernels, computed: int) -> None:
    """Weights that are no numbers would show in every row that was."""
    rng = np.random.default_rng(computed)
    x = np.zeros((90, 64), np.float32)
    x[1] = -0.0
    rows = np.sort(rng.choice(np.arange(2, 90), computed, replace=False))
    x[rows] = rng.standard_normal((computed, 64), dtype=np.float32)
    x[rows, :63] *= rng.random((computed, 1)) < 0.5  # one number that is not 0 is enough
    weight = rng.standard_normal((100, 64), dtype=np.float32)
    out = linear(kernels, x, weight)
    np.testing.assert_array_equal(out[rows], linear(kernels, x[rows], weight))
    broken = linear(kernels, x, np.full_like(weight, np.nan))
    zeros = np.setdiff1d(np.arange(90), rows)
    np.testing.assert_array_equal(out[zeros], 0)
    np.testing.assert_array_equal(broken[zeros], 0)
    assert np.isnan(broken[rows]).all()


def test_linear_refuses_what_does_not_fit(kernels: NativeKernels) -> None:
    x, weight = jnp.zeros((2, 8)), jnp.zeros((2, 8, 16))
    with pytest.raises(ValueError, match="do not give 40 outputs"):
        kernels.linear(x, weight, 40)
    with pytest.raises(TypeError, match="x is bfloat16"):
        kernels.linear(x.astype(jnp.bfloat16), weight, 32)


# --- attend ---


@dataclass(frozen=True)
class Case:
    """A pool with some history, and the tokens of one launch."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    k_pool: np.ndarray
    v_pool: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    table: np.ndarray

    def take(self, tokens: np.ndarray) -> "Case":
        """The same launch with only these tokens."""
        return replace(
            self,
            q=self.q[tokens],
            k=self.k[tokens],
            v=self.v[tokens],
            positions=self.positions[tokens],
            rows=self.rows[tokens],
        )


def make_case(
    runs: list[tuple[int, int]],
    *,
    kv_heads: int = 3,
    group: int = 3,
    head: int = 64,
    page: int = 16,
    padding: int = 0,
) -> Case:
    """One row per (tokens held before, tokens of this launch), then padding. Unused pages hold NaN."""
    rng = np.random.default_rng(len(runs) * 1000 + runs[0][0])
    held = [before + new for before, new in runs]
    width = max(-(-n // page) for n in held) + 1
    pages = sum(-(-n // page) for n in held) + 2
    ids = iter(rng.permutation(pages))
    table = np.full((len(runs), width), 2**30, np.int32)  # an id that must not be followed
    shape = (kv_heads, pages, page, head)
    k_pool, v_pool = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    for row, (before, new) in enumerate(runs):
        for i in range(-(-(before + new) // page)):
            table[row, i] = next(ids)
        for p in range(before):
            k_pool[:, table[row, p // page], p % page] = rng.standard_normal((kv_heads, head))
            v_pool[:, table[row, p // page], p % page] = rng.standard_normal((kv_heads, head))
    positions = np.concatenate(
        [np.arange(before, before + new) for before, new in runs] + [np.full(padding, -1)]
    )
    rows = np.concatenate([np.full(new, row) for row, (_, new) in enumerate(runs)] + [np.zeros(padding)])
    tokens = len(positions)

    def normal(heads: int) -> np.ndarray:
        return rng.standard_normal((tokens, heads, head), dtype=np.float32)

    return Case(
        normal(kv_heads * group) * 2,
        normal(kv_heads),
        normal(kv_heads),
        k_pool,
        v_pool,
        positions.astype(np.int32),
        rows.astype(np.int32),
        table,
    )


def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q [T, N, H], k and v [T, K, H] -> [T, K, G+2, H]"""
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2])
    return jnp.concatenate([grouped, k[:, :, None], v[:, :, None]], axis=2)


@dataclass(frozen=True)
class Scores:
    """What some models do to scores; static."""

    softcap: float | None = None
    slopes: tuple[float, ...] = ()


def laid(kernels: Kernels, keys: np.ndarray, *, back: bool = False) -> np.ndarray:
    """Keys [K, P, W, H] as these kernels lay them, or back: the native ones in columns [K, P, W / 16, H, 16], if there are
    whole groups of 16 tokens."""
    tokens, head = keys.shape[-2:]
    if not isinstance(kernels, NativeKernels) or tokens % 16:
        return keys
    group = (head, 16) if back else (16, head)
    return keys.reshape(*keys.shape[:2], tokens // 16, *group).swapaxes(-1, -2).reshape(keys.shape)


def attend(
    kernels: Kernels,
    case: Case,
    window: int | None = None,
    scores: Scores = Scores(),
    sinks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batch = PagedBatch(jnp.asarray(case.positions), jnp.asarray(case.rows), jnp.asarray(case.table))
    kv = KvLayer(jnp.array(laid(kernels, case.k_pool)), jnp.array(case.v_pool))
    out, kv = _attend(
        kernels,
        window,
        jnp.asarray(case.q),
        jnp.asarray(case.k),
        jnp.asarray(case.v),
        kv,
        batch,
        scores,
        sinks,
    )
    return np.asarray(out), laid(kernels, np.asarray(kv.k), back=True), np.asarray(kv.v)


@partial(jax.jit, static_argnums=(0, 1, 7), donate_argnums=5)
def _attend(kernels, window, q, k, v, kv, batch, scores, sinks):
    """One function for all tests, so that launches of one shape are compiled once."""
    scale = q.shape[-1] ** -0.5
    return kernels.attend(
        fused(q, k, v), kv, batch, window=window, scale=scale, one_token_rows=0,
        softcap=scores.softcap, slopes=scores.slopes, sinks=sinks,
    )  # fmt: skip


def reference(
    case: Case, window: int | None = None, asked: Scores = Scores(), sinks: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write, then attend, one query at a time in float64."""
    k_pool, v_pool = case.k_pool.copy(), case.v_pool.copy()
    page = k_pool.shape[2]
    heads, kv_heads = case.q.shape[1], k_pool.shape[0]
    live = [t for t in range(len(case.positions)) if case.positions[t] >= 0]
    for t in live:
        at = case.table[case.rows[t], case.positions[t] // page], case.positions[t] % page
        k_pool[:, at[0], at[1]], v_pool[:, at[0], at[1]] = case.k[t], case.v[t]
    out = np.zeros(case.q.shape)
    for t in live:
        p = int(case.positions[t])
        seen = np.arange(0 if window is None else max(0, p - window + 1), p + 1)
        ids = case.table[case.rows[t], seen // page]
        for n in range(heads):
            head = n // (heads // kv_heads)
            scores = (
                k_pool[head, ids, seen % page].astype(np.float64) @ case.q[t, n] * case.q.shape[-1] ** -0.5
            )
            if asked.softcap:
                scores = asked.softcap * np.tanh(scores / asked.softcap)
            if asked.slopes:
                scores = scores - asked.slopes[n] * (p - seen)
            sink = -np.inf if sinks is None else sinks.reshape(-1)[n]
            top = max(scores.max(), sink)
            weights = np.exp(scores - top)
            total = weights.sum() + np.exp(sink - top)
            out[t, n] = weights @ v_pool[head, ids, seen % page].astype(np.float64) / total
    return out, k_pool, v_pool


def agree(kernels: NativeKernels, case: Case, window: int | None = None, atol: float = 5e-6) -> None:
    got, want = attend(kernels, case, window), reference(case, window)
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=atol)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[2], want[2])


DECODE = [(0, 1), (15, 1), (16, 1), (63, 1), (64, 1), (200, 1), (1, 1), (255, 1), (256, 1), (600, 1)]
PREFILL = [(0, 37), (30, 1), (17, 70), (64, 64), (200, 60)]
"""Tokens held before, tokens of this launch: on both sides of a vector, a block of keys and a split of them (256)."""


@pytest.mark.parametrize("runs", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (4, 1), (3, 3), (2, 8), (1, 71)])
def test_attend_head_ratios(
    kernels: NativeKernels, runs: list[tuple[int, int]], kv_heads: int, group: int
) -> None:
    agree(kernels, make_case(runs, kv_heads=kv_heads, group=group, padding=3))


@pytest.mark.parametrize("runs", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("head", [1, 8, 16, 20, 64, 80, 96, 128, 256])
def test_attend_head_sizes(kernels: NativeKernels, runs: list[tuple[int, int]], head: int) -> None:
    agree(kernels, make_case(runs, kv_heads=2, group=2, head=head))


@pytest.mark.parametrize("runs", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("page", [1, 5, 8, 16, 24, 32, 48, 64, 128])
def test_attend_page_sizes(kernels: NativeKernels, runs: list[tuple[int, int]], page: int) -> None:
    agree(kernels, make_case(runs, kv_heads=2, group=2, head=32, page=page, padding=1))


@pytest.mark.parametrize("runs", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("window", [1, 2, 16, 63, 64, 65, 1000])
@pytest.mark.parametrize("page", [8, 16, 64])
def test_attend_windows(kernels: NativeKernels, runs: list[tuple[int, int]], window: int, page: int) -> None:
    agree(kernels, make_case(runs, kv_heads=2, group=3, head=16, page=page), window)


@pytest.mark.parametrize("runs", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    ("scores", "sinks", "window"),
    [
        (Scores(softcap=1.5), None, None),
        (Scores(slopes=(0.5, 0.25, 0.1, 0.01, 0.3, 0.7)), None, None),
        (Scores(), np.array([[0.5, -9, 3], [90, 0, -90]], np.float32), None),
        (Scores(softcap=3.0, slopes=(0.5,) * 6), np.ones((2, 3), np.float32), 20),
    ],
    ids=["softcap", "slopes", "sinks", "all"],
)
def test_attend_scores_of_other_models(
    kernels: NativeKernels,
    runs: list[tuple[int, int]],
    scores: Scores,
    sinks: np.ndarray | None,
    window: int | None,
) -> None:
    case = make_case(runs, kv_heads=2, group=3, head=20, page=16, padding=2)
    want = reference(case, window, scores, sinks)
    for computes in (kernels, XlaKernels("cpu")):
        got = attend(computes, case, window, scores, sinks)
        np.testing.assert_allclose(got[0], want[0], rtol=0, atol=5e-6)
        np.testing.assert_array_equal(got[1], want[1])


def test_attend_never_follows_a_page_left_behind_by_the_window(kernels: NativeKernels) -> None:
    case = make_case([(200, 1)], page=16)
    case.table[0, : (200 - 31) // 16] = 2**30
    got, want = attend(kernels, case, 32), reference(case, 32)
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=5e-6)


def test_attend_padding_only(kernels: NativeKernels) -> None:
    case = make_case([(4, 1)], padding=2).take(np.array([1, 2]))
    out, k_pool, _ = attend(kernels, case)
    assert not out.any()
    np.testing.assert_array_equal(k_pool, case.k_pool)


def test_attend_large_scores(kernels: NativeKernels) -> None:
    """Scores of ±1000: a softmax without its maximum taken off would overflow, and most keys weigh exactly nothing."""
    case = make_case([(150, 1), (0, 80)])
    # A score of 1000 in float32 is known to about 1e-4, and so is the weight it gives.
    agree(kernels, replace(case, q=case.q * 100), atol=1e-3)


def test_attend_decode_row_is_the_same_bits_in_any_batch(kernels: NativeKernels) -> None:
    case = make_case(DECODE * 3)
    whole = attend(kernels, case)[0]
    for chosen in ([0], [5], [9], [9, 3, 8], list(range(16)), list(range(20, 4, -1))):
        np.testing.assert_array_equal(attend(kernels, case.take(np.array(chosen)))[0], whole[chosen])


def test_attend_sees_what_the_same_row_writes_elsewhere_in_the_launch(kernels: NativeKernels) -> None:
    """A lone token's key is written by who reads it: unless there are others who do."""
    agree(kernels, make_case([(5, 2), (3, 1)]).take(np.array([0, 2, 1])))


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("page", [16, 24])
def test_attend_is_the_same_bits_however_a_prompt_is_cut(
    kernels: NativeKernels, page: int, window: int | None
) -> None:
    """Also token by token, as a decode would: so a replayed answer is the answer."""
    tokens = 600
    case = make_case([(0, tokens)], page=page)
    whole, k_pool, v_pool = attend(kernels, case, window)
    for cut in (1, 7, 64, 599):
        pools, parts = (case.k_pool, case.v_pool), []
        for start in range(0, tokens, cut):
            chunk = case.take(np.arange(start, min(start + cut, tokens)))
            out, *pools = attend(kernels, replace(chunk, k_pool=pools[0], v_pool=pools[1]), window)
            parts.append(out)
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        np.testing.assert_array_equal(pools[0], k_pool)
        np.testing.assert_array_equal(pools[1], v_pool)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": np.full((1, 2), 99, np.int32)}, "holds page id 99"),
        ({"positions": np.array([32], np.int32)}, "position 32 lies beyond"),
        ({"rows": np.array([7], np.int32)}, "names row 7"),
    ],
)
def test_attend_refuses_to_write_outside_the_pool(
    kernels: NativeKernels, change: dict[str, np.ndarray], message: str
) -> None:
    case = replace(make_case([(4, 1)]), **change)  # type: ignore[arg-type]
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        attend(kernels, case)


def test_attend_refuses_other_dtypes(kernels: NativeKernels) -> None:
    case = make_case([(4, 1)])
    half = replace(case, **{name: getattr(case, name).astype(np.float16) for name in ("q", "k", "v")})
    with pytest.raises(TypeError, match="qkv is float16"):
        attend(kernels, half)


def test_attend_updates_the_pools_in_place(kernels: NativeKernels) -> None:
    """As an engine runs it: compiled ahead, pools of several layers donated, other work between."""
    case = make_case([(40, 1), (3, 1)])
    batch = PagedBatch(jnp.asarray(case.positions), jnp.asarray(case.rows), jnp.asarray(case.table))
    layers = 4

    def step(
        q: jax.Array, k: jax.Array, pools: list[KvLayer], batch: PagedBatch
    ) -> tuple[jax.Array, list[KvLayer]]:
        written: list[KvLayer] = []
        for kv in pools:
            q, kv = kernels.attend(
                fused(q, k, k + 1), kv, batch, window=None, scale=0.125, one_token_rows=len(q)
            )
            q = jnp.sin(q)
            written.append(kv)
        return q, written

    pools = [KvLayer(jnp.array(case.k_pool), jnp.array(case.v_pool)) for _ in range(layers)]
    size = 2 * layers * case.k_pool.nbytes
    compiled = (
        jax.jit(step, donate_argnums=2)
        .lower(jnp.asarray(case.q), jnp.asarray(case.k), pools, batch)
        .compile()
    )
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < case.k_pool.nbytes
    assert not [line for line in text.splitlines() if " copy(" in line and "f32[3," in line]
    before = [kv.k.unsafe_buffer_pointer() for kv in pools]
    _, after = compiled(jnp.asarray(case.q), jnp.asarray(case.k), pools, batch)
    assert [kv.k.unsafe_buffer_pointer() for kv in after] == before
