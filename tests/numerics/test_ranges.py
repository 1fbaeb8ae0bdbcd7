import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.numerics.affine import DEAD_SCALE, Grid, covers
from dfq_jax.numerics.ranges import (
    BINS,
    Histogram,
    Lp,
    MinMax,
    Percentile,
    activation_affine,
    extend,
    weight_affine,
)

SYMMETRIC, LOW = Grid(8, symmetric=True, axis=-1), Grid(4, axis=-1)
fit = jax.jit(weight_affine, static_argnames=("grid", "observer"))
fit_activation = jax.jit(activation_affine, static_argnames=("grid", "observer"))
fill = jax.jit(extend)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def numpy_affine(lo, hi, grid):
    """Scale and zero point of one range."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    scale = (max(-lo, hi) if grid.symmetric else hi - lo) / grid.qmax
    return scale, 0 if grid.symmetric else round(-lo / scale)


def numpy_error(x, scale, zero_point, grid, p):
    """Mean p-th power of the rounding error."""
    q = np.clip(np.round(x / scale) + zero_point, grid.qmin, grid.qmax)
    return np.mean(np.abs(x - (q - zero_point) * scale) ** p)


def search(x, grid, p, ratios):
    """{ratio: error} by brute force over the raw values."""
    lo, hi = min(x.min(), 0.0), max(x.max(), 0.0)
    return {r: numpy_error(x, *numpy_affine(r * lo, r * hi, grid), grid, p) for r in ratios}


RATIOS = np.arange(100, 0, -1) / 100


def histogram(x, batches=3):
    """What calibration makes of the values."""
    lo, hi = f32(x.min()), f32(x.max())
    found = None
    for part in np.array_split(x, batches):
        found = fill(found, f32(part), lo, hi)
    assert found is not None
    return found


@pytest.mark.parametrize("grid", [SYMMETRIC, LOW], ids=["w8", "w4"])
def test_weights_by_extremes_and_percentiles(grid):
    w = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32)
    w[..., 1] = np.abs(w[..., 1])
    for observer, tail in [(MinMax(), 0.0), (Percentile(90.0), 0.05)]:
        affine = fit(f32(w), grid, observer)
        assert affine.scale.shape == affine.zero_point.shape == (1, 1, 1, 5)
        assert affine.zero_point.dtype == grid.dtype
        for c in range(5):
            lo, hi = np.quantile(w[..., c], [tail, 1 - tail])
            scale, zero_point = numpy_affine(lo, hi, grid)
            assert float(affine.scale[0, 0, 0, c]) == pytest.approx(scale, rel=1e-5)
            assert int(affine.zero_point[0, 0, 0, c]) == zero_point


@pytest.mark.parametrize("p", [2.0, 2.4])
@pytest.mark.parametrize("grid", [SYMMETRIC, LOW], ids=["w8", "w4"])
def test_weights_by_search_take_the_best_ratio(grid, p):
    w = np.random.default_rng(1).standard_t(3, size=(3, 3, 6, 5))
    affine = fit(f32(w), grid, Lp(p))
    shrunk = 0
    for c in range(5):
        x = w[..., c].ravel()
        errors = search(x, grid, p, RATIOS)
        best = min(errors, key=lambda r: errors[r])
        scale, zero_point = numpy_affine(best * x.min(), best * x.max(), grid)
        assert float(affine.scale[0, 0, 0, c]) == pytest.approx(scale, rel=1e-4)
        assert int(affine.zero_point[0, 0, 0, c]) == zero_point
        shrunk += best < 1
    assert shrunk or grid is SYMMETRIC


def test_weights_with_one_scale_and_with_dead_channels():
    w = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)
    whole = fit(f32(w), Grid(8), MinMax())
    assert whole.scale.shape == (1, 1)
    assert float(whole.scale[0, 0]) == pytest.approx(np.ptp(w) / 255, rel=1e-5)
    w[:, 1] = 0
    for grid in (SYMMETRIC, LOW):
        for observer in (MinMax(), Percentile(99.0), Lp()):
            affine = fit(f32(w), grid, observer)
            assert float(affine.scale[0, 1]) == np.float32(DEAD_SCALE)
            assert np.all(np.asarray(affine.scale) > 0)


def test_histogram_counts_like_numpy():
    x = np.random.default_rng(3).normal(size=3000).astype(np.float32)
    found = histogram(x)
    wanted, _ = np.histogram(x.astype(np.float64), BINS, (x.min(), x.max()))
    assert float(found.counts.sum()) == 3000
    gap = np.cumsum(np.asarray(found.counts)) - np.cumsum(wanted)
    assert np.abs(gap).max() <= 1  # float32 bin edges
    more = fill(found, f32([-100, 100, 100]), found.lo, found.hi)
    extra = np.asarray(more.counts - found.counts)
    assert (extra[0], extra[-1], extra.sum()) == (1, 2, 3)


def test_histogram_range_includes_zero_and_survives_constants():
    found = fill(None, f32([2.0, 3.0]), f32(2.0), f32(3.0))
    assert (float(found.lo), float(found.hi)) == (0, 3)
    zeros = fill(None, f32([0.0, 0.0]), f32(0.0), f32(0.0))
    for observer in (MinMax(), Percentile(), Lp()):
        assert float(fit_activation(zeros, Grid(8), observer).scale) == np.float32(DEAD_SCALE)


def test_activations_by_extremes():
    x = np.random.default_rng(4).normal(size=500)
    affine = fit_activation(histogram(x), Grid(8), MinMax())
    scale, zero_point = numpy_affine(x.min(), x.max(), Grid(8))
    assert float(affine.scale) == pytest.approx(scale, rel=1e-5)
    assert int(affine.zero_point) == zero_point


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("one_sided", [False, True])
def test_activations_by_percentile(percent, one_sided):
    x = np.random.default_rng(5).normal(size=20000)
    x = np.abs(x) if one_sided else x
    ordered, cut = np.sort(x), round(20000 * (100 - percent) / 100)
    lo, hi = ordered[cut // 2], ordered[-cut // 2 - 1]
    if one_sided:
        lo, hi = 0.0, ordered[-cut - 1]
    affine = fit_activation(histogram(x), Grid(8), Percentile(percent))
    width = np.ptp([*x, 0]) / BINS
    assert float(affine.scale) * 255 == pytest.approx(hi - lo, abs=2.1 * width)
    assert abs(int(affine.zero_point) - 255 * -lo / (hi - lo)) <= 0.6


@pytest.mark.parametrize(("seed", "total"), [(3, 72384651.3), (44, 458347676.0), (7, 1e9)])
def test_percentile_100_keeps_everything_however_many_values(seed, total):
    """Above 2^24 values float32 sums round, which must not lose the last bin."""
    counts = np.round(np.random.default_rng(seed).dirichlet(np.ones(BINS)) * total)
    big = Histogram(f32(counts), f32(-1.0), f32(3.0))
    affine = fit_activation(big, Grid(8), Percentile(100.0))
    assert float(affine.scale) * 255 == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("shape", ["normal", "relu", "heavy"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activations_by_search_are_within_one_ratio_of_brute_force(bits, shape):
    rng = np.random.default_rng(7)
    x = rng.standard_t(3, size=20000) if shape == "heavy" else rng.normal(size=20000)
    x = np.maximum(x, 0) if shape == "relu" else x
    grid = Grid(bits)
    affine = fit_activation(histogram(x), grid, Lp(2.4))
    full, _ = numpy_affine(x.min(), x.max(), grid)
    ratio = float(affine.scale) / full
    errors = search(x, grid, 2.4, RATIOS)
    best = min(errors, key=lambda r: errors[r])
    near = min(abs(r - ratio) for r in RATIOS)
    assert near < 1e-4
    if shape == "heavy" and bits == 8:
        return  # the optimum is flat: neighbours differ by less than a bin
    assert abs(ratio - best) <= 0.0101


@pytest.mark.parametrize(
    ("p", "bits", "low", "high"),
    [
        (2.0, 2, 0.98, 1.11),  # flat: half the codes hold almost no mass
        (2.0, 3, 0.575, 0.615),
        (2.0, 4, 0.325, 0.345),
        (2.4, 2, 1.08, 1.18),
        (2.4, 3, 0.61, 0.67),
        (2.4, 4, 0.345, 0.375),
    ],
)
def test_best_steps_for_a_normal_variable(p, bits, low, high):
    """Known optima; larger p cuts fewer outliers."""
    x = np.random.default_rng(8).normal(size=100_000)
    ends = np.abs(x).max() * np.array([-1.0, 1.0])
    hist = fill(None, f32(x), f32(ends[0]), f32(ends[1]))
    assert low < float(fit_activation(hist, Grid(bits), Lp(p)).scale) < high


@pytest.mark.parametrize(("bits", "clip"), [(2, 1.94), (3, 2.48), (4, 2.91)])
def test_best_clip_for_a_rectified_normal_variable(bits, clip):
    x = np.maximum(np.random.default_rng(9).normal(size=100_000), 0)
    affine = fit_activation(histogram(x, 1), Grid(bits), Lp(2.0))
    assert float(covers(affine, Grid(bits))[1]) == pytest.approx(clip, abs=0.06)


@pytest.mark.parametrize("percent", [50.0, 100.5])
def test_percentile_needs_a_majority(percent):
    with pytest.raises(ValueError, match=f"Percentile needs 50 < percent <= 100, got {percent}"):
        Percentile(percent)
