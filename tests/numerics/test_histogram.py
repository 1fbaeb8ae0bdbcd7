import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.numerics.histogram import BINS, empty, extend, magnitudes


@jax.jit
def fill(hist, x, lo, hi):
    return extend(empty(lo, hi) if hist is None else hist, x, lo, hi)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def test_histogram_counts_like_numpy():
    x = np.random.default_rng(3).normal(size=3000).astype(np.float32)
    found = fill(None, f32(x), f32(x.min()), f32(x.max()))
    wanted, _ = np.histogram(x.astype(np.float64), BINS, (x.min(), x.max()))
    assert float(found.counts.sum()) == 3000
    gap = np.cumsum(np.asarray(found.counts)) - np.cumsum(wanted)
    assert np.abs(gap).max() <= 1  # float32 bin edges
    more = fill(found, f32([-100, 100, 100]), found.lo, found.hi)
    extra = np.asarray(more.counts - found.counts)
    assert (extra[0], extra[-1], extra.sum()) == (1, 2, 3)


def test_centres_and_width():
    found = fill(None, f32([-1.0, 3.0]), f32(-1.0), f32(3.0))
    edges = np.linspace(-1, 3, BINS + 1)
    np.testing.assert_allclose(found.centres, (edges[1:] + edges[:-1]) / 2, atol=1e-6)
    assert float(found.width) == pytest.approx(4 / BINS)
    assert not found.one_sided
    assert fill(None, f32([1.0]), f32(0.5), f32(1.0)).one_sided


@pytest.mark.parametrize("shift", [-1.7, 0.0, 0.9])
def test_magnitudes_count_absolute_values(shift):
    x = (np.random.default_rng(4).normal(size=20000) + shift).astype(np.float32)
    counts, width = jax.jit(magnitudes, static_argnums=1)(
        fill(None, f32(x), f32(x.min()), f32(x.max())), BINS // 2
    )
    most = np.abs(x).max()
    assert float(width) == pytest.approx(most / (BINS // 2), rel=1e-6)
    assert float(counts.sum()) == pytest.approx(20000, rel=1e-5)
    wanted, _ = np.histogram(np.abs(x), BINS // 2, (0, most))
    gap = np.cumsum(np.asarray(counts)) - np.cumsum(wanted)
    assert np.abs(gap).max() < 20  # values are where their bin is, to one bin


def test_empty_magnitudes_stay_empty():
    x = f32([0.25, -0.25, 1.0])
    counts, _ = magnitudes(fill(None, x, f32(-0.25), f32(1.0)), 64)
    assert np.flatnonzero(counts).tolist() in ([15, 16, 63], [16, 63], [15, 63])
    assert float(counts.sum()) == pytest.approx(3)
