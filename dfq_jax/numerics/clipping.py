"""Ranges that follow from the shape of a distribution: analytic clipping (ACIQ) and entropy."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.stats import laplace, norm
from jaxtyping import Array, Float

from dfq_jax.numerics.histogram import BINS, Histogram, magnitudes

Range = tuple[Float[Array, ""], Float[Array, ""]]

NORMAL_CLIP = {
    2: 1.7106, 3: 2.1516, 4: 2.5591, 5: 2.9362, 6: 3.2869, 7: 3.6151, 8: 3.9240, 9: 4.2163,
}  # fmt: skip
"""{bits: the clip, in standard deviations, that minimises clipping and rounding error together}:
`2 [(1 + a^2) (1 - Phi(a)) - a phi(a)] + a^2 / (3 4^b)`."""
LAPLACE_CLIP = {
    2: 2.8307, 3: 3.8972, 4: 5.0286, 5: 6.2048, 6: 7.4131, 7: 8.6456, 8: 9.8968, 9: 11.1627,
}  # fmt: skip
"""The same in mean absolute deviations of a Laplace variable: `2 exp(-a) + a^2 / (3 4^b)`."""

THRESHOLDS = 128
"""How many thresholds the entropy is computed for."""
SMOOTHING = 1e-4
"""What empty bins count, so that the divergence stays finite."""


def aciq_range(hist: Histogram, bits: int) -> Range:
    """The range around the mean that loses least for the distribution that fits better.

    Values without negative ones are the upper half of a symmetric distribution around zero, its
    lower half cut off by a ReLU: zeros are left out, the spread is that of the whole, and as many
    codes for half the range make it a grid of one bit more.

    Args:
      hist: of the values.
      bits: of the grid, 2..8.

    Returns:
      Lower and upper end, within those observed.

    Reference:
      Banner et al. 2019, "Post training 4-bit quantization of convolutional networks for
      rapid-deployment" (ACIQ). Its code takes the spread of rectified values as they are.
    """
    half = hist.one_sided
    x, counts = hist.centres, hist.counts.at[0].set(jnp.where(half, 0.0, hist.counts[0]))
    share = counts / jnp.maximum(jnp.sum(counts), 1.0)
    mean = jnp.where(half, 0.0, jnp.sum(share * x))
    deviation = jnp.sqrt(jnp.sum(share * (x - mean) ** 2))
    scale = jnp.sum(share * jnp.abs(x - mean))
    alpha = lambda table: jnp.where(half, table[bits + 1], table[bits])
    normal = norm.pdf(x, mean, jnp.maximum(deviation, 1e-30))
    double = laplace.pdf(x, mean, jnp.maximum(scale, 1e-30))
    sides = jnp.where(half, 2.0, 1.0)
    density = share / jnp.maximum(hist.width, 1e-30)
    misfit = lambda shape: jnp.sum((density - sides * shape) ** 2)
    clip = jnp.where(
        misfit(normal) < misfit(double),
        alpha(NORMAL_CLIP) * deviation,
        alpha(LAPLACE_CLIP) * scale,
    )
    return jnp.maximum(hist.lo, mean - clip), jnp.minimum(hist.hi, mean + clip)


def entropy_range(hist: Histogram, bits: int) -> Range:
    """The range whose values, rounded, have the distribution nearest to that of all values.

    Absolute values are cut at a threshold, those beyond count in the last bin; rounding spreads
    what falls to one level evenly over its bins that are not empty. Two signs share the levels.
    Zeros are exact on every grid: their bin counts as much as the next. Sensible at 8 bits; with
    few levels a small range looks best whatever it cuts.

    Args:
      hist: of the values.
      bits: of the grid.

    Returns:
      Lower and upper end, within those observed.

    Reference:
      Migacz 2017, "8-bit Inference with TensorRT" (GTC), the calibration algorithm.
    """
    most = 2**bits
    levels = jnp.where(hist.one_sided, jnp.int32(most), jnp.int32(most // 2))
    counts, width = magnitudes(hist, BINS // 2)
    counts = counts.at[0].set(counts[1])
    steps = jnp.linspace(0.0, 1.0, THRESHOLDS, dtype=jnp.float32)
    fewest = levels.astype(jnp.float32)
    kept = jnp.round(fewest + steps * (counts.size - fewest)).astype(jnp.int32)
    costs = lax.map(lambda keep: divergence(counts, keep, levels, most), kept)
    threshold = kept[jnp.argmin(costs)].astype(jnp.float32) * width
    return jnp.maximum(hist.lo, -threshold), jnp.minimum(hist.hi, threshold)


def divergence(
    counts: Float[Array, " bins"], keep: Array, levels: Array, most: int
) -> Float[Array, ""]:
    """KL divergence of cut values from rounded ones, if the first `keep` bins are kept.

    Args:
      counts: of absolute values.
      keep: how many bins lie below the threshold.
      levels: how many levels they are rounded to.
      most: upper bound of `levels`, static.
    """
    bins = jnp.arange(counts.size)
    inside = bins < keep
    within = jnp.where(inside, counts, 0.0)
    cut = within + jnp.where(bins == keep - 1, jnp.sum(counts) - jnp.sum(within), 0.0)
    level = jnp.minimum(bins * levels // keep, most - 1)
    total = jax.ops.segment_sum(within, level, most)
    filled = ((cut > 0) & inside).astype(jnp.float32)
    share = total / jnp.maximum(jax.ops.segment_sum(filled, level, most), 1.0)
    p, q = smoothed(cut, inside), smoothed(share[level] * filled, inside)
    return jnp.sum(jnp.where(inside, p * jnp.log(p / q), 0.0))


def smoothed(counts: Float[Array, " bins"], inside: Array) -> Float[Array, " bins"]:
    """Counts as a distribution; empty bins `inside` count a little, taken from the others."""
    empty = inside & (counts <= 0)
    full = inside & (counts > 0)
    size = lambda group: jnp.sum(group.astype(jnp.float32))
    toll = SMOOTHING * size(empty) / jnp.maximum(size(full), 1.0)
    tolled = jnp.maximum(counts - toll, SMOOTHING)
    found = jnp.where(full, tolled, jnp.where(inside, SMOOTHING, 0.0))
    return jnp.where(inside, found / jnp.sum(found), 1.0)
