"""Ranges that err least over channels of several widths, beside what rounding really costs."""

import numpy as np
import pytest

from dfq_jax.numerics.tails import CODES, least_lossy_range, lost_beyond

RNG = np.random.default_rng(0)
WIDTHS = np.concatenate([RNG.uniform(0.5, 1.5, 60), [4.0, 6.0, 9.0, 12.0]])
MEANS = RNG.normal(size=64) * WIDTHS / 2
DRAWN = RNG.laplace(MEANS, WIDTHS / np.sqrt(2), (20_000, 64))
SIX = (float((MEANS - 6 * WIDTHS).min()), float((MEANS + 6 * WIDTHS).max()))


def rounded(x, low, high):
    step = (high - low) / CODES
    return low + np.clip(np.round((x - low) / step), 0, CODES) * step


def cost(x, ends):
    return np.mean((rounded(x, *ends) - x) ** 2)


def rectified(x, slope):
    return np.where(x > 0, x, slope * x)


@pytest.mark.parametrize("slope", [1.0, 0.25])
def test_it_errs_least_of_all_ranges_tried(slope):
    """Rounding samples of the distribution costs little less under any other share of the ends."""
    x = rectified(DRAWN, slope)
    whole = (SIX[0] * slope, SIX[1])
    found = least_lossy_range(MEANS, WIDTHS, whole, slope)
    shares = np.linspace(0.3, 1, 8)
    best = min(cost(x, (whole[0] * a, whole[1] * b)) for a in shares for b in shares)
    assert cost(x, found) < 1.1 * best
    assert cost(x, found) < 0.9 * cost(x, whole)
    assert whole[0] <= found[0] <= 0 < found[1] < whole[1]


def test_slopes_of_channels_count():
    """A wide channel that is nearly cut off below asks for no codes there."""
    slopes = np.where(WIDTHS > 2, 0.05, 1.0)
    whole = (SIX[0], SIX[1])
    low, _ = least_lossy_range(MEANS, WIDTHS, whole, slopes)
    assert low > least_lossy_range(MEANS, WIDTHS, whole)[0]
    x = np.where(DRAWN > 0, DRAWN, slopes * DRAWN)
    assert cost(x, least_lossy_range(MEANS, WIDTHS, whole, slopes)) < 0.8 * cost(x, whole)


def test_channels_of_one_width_keep_their_six_deviations():
    ones = np.ones(16)
    assert least_lossy_range(0 * ones, ones, (-6.0, 6.0)) == (-6.0, 6.0)
    assert least_lossy_range(0 * ones, ones, (0.0, 6.0), 0.0) == (0.0, 6.0)


def test_what_is_lost_beyond_an_end():
    ends = np.array([2.0, 8.0])
    wanted = [np.mean(np.maximum(DRAWN - end, 0) ** 2) for end in ends]
    np.testing.assert_allclose(lost_beyond(ends, MEANS, WIDTHS), wanted, rtol=0.05)
