import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.numerics.affine import DEAD_SCALE, Grid, covers
from dfq_jax.numerics.histogram import BINS, Histogram, empty, extend
from dfq_jax.numerics.ranges import (
    Aciq,
    EmaMinMax,
    Entropy,
    ImageMinMax,
    Lp,
    LpShift,
    MinMax,
    Omse,
    Percentile,
    Statistics,
    activation_affine,
    merged_ranges,
    unseen,
    weight_affine,
)

SYMMETRIC, LOW = Grid(8, symmetric=True, axis=-1), Grid(4, axis=-1)
fit = jax.jit(weight_affine, static_argnames=("grid", "observer"))
fit_activation = jax.jit(activation_affine, static_argnames=("grid", "observer"))


@jax.jit
def fill(hist, x, lo, hi):
    return extend(empty(lo, hi) if hist is None else hist, x, lo, hi)


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
        for observer in (MinMax(), Percentile(99.0), Lp(), LpShift(), Omse(), Aciq()):
            affine = fit(f32(w), grid, observer)
            assert float(affine.scale[0, 1]) == np.float32(DEAD_SCALE)
            assert np.all(np.asarray(affine.scale) > 0)


def test_histogram_range_includes_zero_and_survives_constants():
    found = fill(None, f32([2.0, 3.0]), f32(2.0), f32(3.0))
    assert (float(found.lo), float(found.hi)) == (0, 3)
    zeros = fill(None, f32([0.0, 0.0]), f32(0.0), f32(0.0))
    for observer in (MinMax(), Percentile(), Lp(), LpShift(), Omse(), Aciq(), Entropy()):
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


def brute_shift(x, grid, p):
    """Scale, zero point and error of QDrop's search over raw values, loop by loop."""
    lo, hi, best = min(x.min(), 0.0), max(x.max(), 0.0), (0.0, 0, np.inf)
    points = [0] if lo == 0 else [grid.qmax] if hi == 0 else range(grid.qmax + 1)
    for ratio in RATIOS:
        for point in points:
            step = ratio * (hi - lo) / grid.qmax
            error = numpy_error(x, step, point, grid, p)
            best = min(best, (step, point, error), key=lambda found: found[2])
    return best


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_by_search_of_width_and_zero_point(bits):
    rng = np.random.default_rng(20)
    w = rng.gamma(0.7, size=(30, 3)) * [1.0, -1.0, 1.0]  # one sign, the other, and below: both
    w[:, 2] += -0.4 + 0.1 * rng.normal(size=30)
    grid = Grid(bits, axis=-1)
    affine = fit(f32(w), grid, LpShift(2.4))
    for c in range(3):
        x = w[:, c]
        step, point, error = brute_shift(x, grid, 2.4)
        mine = float(affine.scale[0, c]), int(affine.zero_point[0, c])
        assert numpy_error(x, *mine, grid, 2.4) == pytest.approx(error, rel=1e-4)
        assert mine == (pytest.approx(step, rel=1e-4), point)
    plain = fit(f32(w), grid, Lp(2.4))
    error = lambda a: numpy_error(w[:, 2], a.scale[0, 2], int(a.zero_point[0, 2]), grid, 2.4)
    assert error(affine) <= error(plain) * 1.0001
    symmetric = fit(f32(w), SYMMETRIC, LpShift(2.4))
    np.testing.assert_array_equal(symmetric.scale, fit(f32(w), SYMMETRIC, Lp(2.4)).scale)


@pytest.mark.parametrize("bits", [2, 4])
def test_activations_by_search_of_width_and_zero_point(bits):
    x = np.random.default_rng(21).uniform(0, 1, size=4000)
    x[0] = -0.3  # not worth the codes that a range down to it takes
    affine = fit_activation(histogram(x), Grid(bits), LpShift(2.4))
    _, _, error = brute_shift(x, Grid(bits), 2.4)
    mine = numpy_error(x, float(affine.scale), int(affine.zero_point), Grid(bits), 2.4)
    assert mine == pytest.approx(error, rel=0.01)
    plain = fit_activation(histogram(x), Grid(bits), Lp(2.4))
    rough = numpy_error(x, float(plain.scale), int(plain.zero_point), Grid(bits), 2.4)
    assert mine < 0.9 * rough


@pytest.mark.parametrize("grid", [SYMMETRIC, LOW], ids=["w8", "w4"])
def test_omse_cuts_both_ends_at_one_threshold(grid):
    w = np.random.default_rng(22).standard_t(3, size=(200, 3)) + 0.5
    affine = fit(f32(w), grid, Omse())
    for c in range(3):
        x = w[:, c]
        lo, hi = x.min(), x.max()
        cut = lambda r, lo=lo, hi=hi: (max(lo, -r * max(-lo, hi)), min(hi, r * max(-lo, hi)))
        errors = [numpy_error(x, *numpy_affine(*cut(r), grid), grid, 2) for r in RATIOS]
        scale, zero_point = numpy_affine(*cut(RATIOS[np.argmin(errors)]), grid)
        assert float(affine.scale[0, c]) == pytest.approx(scale, rel=1e-4)
        assert int(affine.zero_point[0, c]) == zero_point
    hist = histogram(w[:, 0])
    whole = fit_activation(hist, Grid(4), Omse())
    error = lambda a: numpy_error(w[:, 0], float(a.scale), int(a.zero_point), Grid(4), 2)
    assert error(whole) < 0.95 * error(fit_activation(hist, Grid(4), MinMax()))


@pytest.mark.parametrize(
    ("bits", "low", "high"), [(2, 0.98, 1.11), (3, 0.58, 0.61), (4, 0.32, 0.35)]
)
def test_omse_steps_for_a_normal_variable(bits, low, high):
    x = np.random.default_rng(8).normal(size=100_000)
    ends = np.abs(x).max() * np.array([-1.0, 1.0])
    hist = fill(None, f32(x), f32(ends[0]), f32(ends[1]))
    assert low < float(fit_activation(hist, Grid(bits), Omse()).scale) < high


@pytest.mark.parametrize("observer", [Aciq(), Entropy()])
@pytest.mark.parametrize("axis", [-1, 0, None])
def test_weights_by_histogram_are_those_of_each_channel_alone(observer, axis):
    w = f32(np.random.default_rng(23).laplace(size=(17, 3, 19)) * np.arange(1, 20))
    grid = Grid(4, axis=axis)
    affine = fit(w, grid, observer)
    rows = [w] if axis is None else [w.take(c, axis) for c in range(w.shape[axis])]
    assert affine.scale.shape == {-1: (1, 1, 19), 0: (17, 1, 1), None: (1, 1, 1)}[axis]
    for row, scale in zip(rows, np.ravel(affine.scale), strict=True):
        alone = fit_activation(fill(None, row, row.min(), row.max()), Grid(4), observer)
        assert float(alone.scale) == pytest.approx(float(scale), rel=1e-6)


def test_averages_over_batches_weigh_the_last_most():
    """Against the uncorrected recursion, divided at the end."""
    ends = np.random.default_rng(24).normal([-3.0, 3.0], size=(7, 2))
    found, raw = unseen(EmaMinMax()), np.zeros(2)
    for index, new in enumerate(ends):
        found = merged_ranges(found, (f32(new[0]), f32(new[1])), f32(index + 1), EmaMinMax())
        raw = 0.9 * raw + 0.1 * new
    np.testing.assert_allclose(np.array(found), raw / (1 - 0.9**7), rtol=1e-5)
    lo, hi = merged_ranges((f32(-1), f32(2)), (f32(-3), f32(1)), f32(2), Lp())
    assert (float(lo), float(hi)) == (-3, 2)


@pytest.mark.parametrize("observer", [EmaMinMax(), ImageMinMax(), Lp(), MinMax()])
def test_one_batch_is_its_own_range(observer):
    found = merged_ranges(unseen(observer), (f32(0.3), f32(0.7)), f32(1), observer)
    assert (float(found[0]), float(found[1])) == (float(f32(0.3)), float(f32(0.7)))


@pytest.mark.parametrize("observer", [EmaMinMax(), ImageMinMax(), Statistics()])
def test_observers_of_batches_take_the_extremes_they_are_given(observer):
    w = f32(np.random.default_rng(25).normal(size=(20, 3)))
    np.testing.assert_array_equal(fit(w, LOW, observer).scale, fit(w, LOW, MinMax()).scale)
    hist = histogram(np.asarray(w))
    extremes = fit_activation(hist, Grid(8), MinMax())
    assert float(fit_activation(hist, Grid(8), observer).scale) == float(extremes.scale)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_averages_need_a_momentum_below_one(momentum):
    with pytest.raises(ValueError, match=f"EmaMinMax needs 0 <= momentum < 1, got {momentum}"):
        EmaMinMax(momentum)
