"""Ranges that err least where channels differ in width: what clipping costs beside rounding.

A range that covers six deviations of the widest channel spends most codes on values that hardly
ever come. What is lost beyond an end is the mean over channels, of which mostly one or a few are
wide; what is lost by rounding grows with the square of the range.
"""

import numpy as np
from jaxtyping import Float

Channels = Float[np.ndarray, " c"]
LEAST, SHARES = 0.2, 81
"""The smallest share of an end that is tried, and how many."""
CODES = 255
"""Steps of a grid of 8 bits."""
NARROWEST = 1e-30
"""What deviations are at least: channels that are constant lose nothing."""


def lost_beyond(
    end: Float[np.ndarray, " e"], mean: Channels, deviation: Channels
) -> Float[np.ndarray, " e"]:
    """Mean squared error of clipping at an upper end, over channels with exponential tails.

        1/C sum_c b_c^2 exp(-max(end - m_c, 0) / b_c),   b_c = deviation_c / sqrt(2)

    Args:
      end: where values are clipped, several to compare.
      mean: of each channel.
      deviation: of each channel; a Laplace distribution has tails twice as heavy as most channels,
        which makes up for what few statistics tell of them.

    Returns:
      One error for each end.
    """
    scale = np.maximum(deviation / np.sqrt(2), NARROWEST)
    beyond = np.maximum(end[:, None] - mean, 0.0)
    return np.mean(scale**2 * np.exp(-beyond / scale), axis=1)


def least_lossy_range(
    mean: Channels, deviation: Channels, ends: tuple[float, float], below: Channels | float = 1.0
) -> tuple[float, float]:
    """The part of a range under which a tensor errs least on a grid of 8 bits.

        ((hi - lo) / 255)^2 / 12 + lost above hi + lost below lo

    Zeros behind a ReLU, which are exact, count as rounded too: tails of channels are mostly lighter
    than exponential, and ends that lie nearer for it have been the better ones (RESULTS).

    Args:
      mean: of each channel, before a rectifier.
      deviation: likewise.
      ends: the range that covers all that is expected; no end moves outwards, nor over zero.
      below: slope of the rectifier on the negative side, of each channel; 1 without one, 0 for a
        ReLU.

    Returns:
      Its ends.
    """
    mean, deviation = (np.asarray(v, np.float64) for v in (mean, deviation))
    steepness = np.abs(np.broadcast_to(np.asarray(below, np.float64), mean.shape))
    shares = np.linspace(LEAST, 1.0, SHARES)
    low, high = ends
    lows = low * shares if low < 0 else np.array([low])
    highs = high * shares if high > 0 else np.array([high])
    nothing = np.zeros(1)
    above = lost_beyond(highs, mean, deviation) if high > 0 else nothing
    under = nothing
    if low < 0:
        under = lost_beyond(-lows, -mean * steepness, deviation * steepness)
    rounding = ((highs[:, None] - lows) / CODES) ** 2 / 12
    found = rounding + above[:, None] + under
    i, j = np.unravel_index(np.argmin(found), found.shape)
    return float(lows[j]), float(highs[i])
