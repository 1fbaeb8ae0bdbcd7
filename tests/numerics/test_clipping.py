from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import entropy, norm

from dfq_jax.numerics.clipping import (
    LAPLACE_CLIP,
    NORMAL_CLIP,
    SMOOTHING,
    aciq_range,
    divergence,
    entropy_range,
)
from dfq_jax.numerics.histogram import empty, extend

aciq = jax.jit(aciq_range, static_argnums=1)
by_entropy = jax.jit(entropy_range, static_argnums=1)


def hist(x):
    x = jnp.asarray(x, jnp.float32)
    lo, hi = jnp.min(x), jnp.max(x)
    return extend(empty(lo, hi), x, lo, hi)


@pytest.mark.parametrize("bits", range(2, 10))
def test_clips_minimise_the_analytic_error(bits):
    rounding = lambda a: a**2 / (3 * 4**bits)
    tail = lambda a: 2 * ((1 + a**2) * norm.sf(a) - a * norm.pdf(a))
    for table, cost in (
        (NORMAL_CLIP, lambda a: tail(a) + rounding(a)),
        (LAPLACE_CLIP, lambda a: 2 * np.exp(-a) + rounding(a)),
    ):
        best: Any = minimize_scalar(
            cost, bounds=(0.1, 20), method="bounded", options={"xatol": 1e-8}
        )
        assert table[bits] == pytest.approx(best.x, abs=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_aciq_tells_normal_from_laplace(bits):
    rng = np.random.default_rng(0)
    for x, reach in (
        (rng.normal(0.5, 2.0, 40000), 2.0 * NORMAL_CLIP[bits]),
        (rng.laplace(0.5, 2.0, 40000), 2.0 * LAPLACE_CLIP[bits]),
    ):
        lo, hi = map(float, aciq(hist(x), bits))
        assert lo == pytest.approx(max(0.5 - reach, x.min()), rel=0.03)
        assert hi == pytest.approx(min(0.5 + reach, x.max()), rel=0.03)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_aciq_of_rectified_values_is_that_of_the_whole_with_a_bit_more(bits):
    rng = np.random.default_rng(1)
    for x, reach in (
        (rng.normal(0, 1.5, 40000), 1.5 * NORMAL_CLIP[bits + 1]),
        (rng.laplace(0, 1.5, 40000), 1.5 * LAPLACE_CLIP[bits + 1]),
    ):
        lo, hi = map(float, aciq(hist(np.maximum(x, 0)), bits))
        assert lo == 0
        assert hi == pytest.approx(reach, rel=0.03)


@pytest.mark.parametrize(("bits", "clip"), [(2, 1.94), (3, 2.48), (4, 2.91)])
def test_aciq_is_near_the_best_clip_of_a_rectified_normal(bits, clip):
    x = np.maximum(np.random.default_rng(2).normal(size=40000), 0)
    assert float(aciq(hist(x), bits)[1]) == pytest.approx(clip, rel=0.12)


def numpy_divergence(counts, keep, levels):
    """Levels, spreading and smoothing bin by bin, the divergence by SciPy."""
    p, q = counts[:keep].copy(), np.zeros(keep)
    members = [[j for j in range(keep) if j * levels // keep == k] for k in range(levels)]
    p[-1] += counts[keep:].sum()
    for bins in members:
        full = [j for j in bins if p[j] > 0]
        for j in full:
            q[j] = counts[bins].sum() / len(full)

    def smooth(x):
        empty = x <= 0
        toll = SMOOTHING * empty.sum() / max((~empty).sum(), 1)
        return np.where(empty, SMOOTHING, np.maximum(x - toll, SMOOTHING))

    return entropy(smooth(p), smooth(q))


@pytest.mark.parametrize("keep", [8, 9, 21, 50, 64])
@pytest.mark.parametrize("levels", [4, 8])
def test_divergence_is_that_of_scipy(keep, levels):
    rng = np.random.default_rng(3)
    counts = rng.poisson(40 * np.exp(-np.arange(64) / 9)).astype(np.float64)
    counts[rng.integers(5, 40, 6)] = 0
    found = divergence(jnp.asarray(counts, jnp.float32), jnp.int32(keep), jnp.int32(levels), 8)
    assert float(found) == pytest.approx(numpy_divergence(counts, keep, levels), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("rectified", [False, True])
def test_entropy_takes_the_best_threshold(rectified):
    x = np.random.default_rng(4).standard_t(3, size=20000)
    x = np.maximum(x, 0) if rectified else x
    most, bits = np.abs(x).max(), 7
    levels = 2**bits if rectified else 2 ** (bits - 1)
    counts, _ = np.histogram(np.abs(x), 2048, (0, most))
    counts = counts.astype(np.float64)
    counts[0] = counts[1]
    steps = np.unique(np.rint(np.linspace(levels, 2048, 128))).astype(int)
    costs = [numpy_divergence(counts, keep, levels) for keep in steps]
    lo, hi = map(float, by_entropy(hist(x), bits))
    threshold = hi if rectified or hi > -lo else -lo
    cost = lambda t: np.interp(t / most * 2048, steps, costs)
    assert threshold < 0.97 * most
    assert cost(threshold) < min(costs) + 0.02 * np.ptp(costs)
    assert lo == 0 if rectified else lo == pytest.approx(-hi, rel=1e-3)


def test_entropy_leaves_zeros_out():
    """A spike at zero, exact on every grid, moves no threshold."""
    x = np.abs(np.random.default_rng(5).normal(size=20000))
    plain, spiked = hist(x), hist(np.concatenate([x, np.zeros(10**6)]))
    assert float(by_entropy(spiked, 8)[1]) == float(by_entropy(plain, 8)[1])


def test_entropy_keeps_all_of_a_uniform_variable():
    x = np.random.default_rng(6).uniform(-1, 1, 100000)
    lo, hi = map(float, by_entropy(hist(x), 8))
    assert hi > 0.97
    assert lo < -0.97
