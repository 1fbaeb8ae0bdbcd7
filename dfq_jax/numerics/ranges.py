"""Range estimators: where a grid should begin and end.

Weights are searched directly, per output channel. Activations are summarised in a histogram that
is filled batch by batch, so calibration never holds more than one batch of one network.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dfq_jax.numerics.affine import Affine, Grid, dequantize, from_range, quantize

BINS = 4096
CANDIDATES = 100
HOPELESS = 16.0
"""How far above its best an error must be for the search of a range to end."""


@dataclasses.dataclass(frozen=True)
class MinMax:
    """The observed extremes."""


@dataclasses.dataclass(frozen=True)
class Percentile:
    """The values that leave `100 - percent` percent of the mass outside, half at each end.

    For one-sided data (nothing below zero) all of it is cut at the upper end.
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        """Raises ValueError unless 50 < percent <= 100."""
        if not 50 < self.percent <= 100:
            raise ValueError(f"Percentile needs 50 < percent <= 100, got {self.percent}.")


@dataclasses.dataclass(frozen=True)
class Lp:
    """The shrinkage of the min-max range that minimises mean |x - fake_quantize(x)|^p.

    BRECQ (Li et al. 2021) and QDrop (Wei et al. 2022) use p = 2.4; both ends shrink together
    through the ratios 1.00, 0.99 … 0.01.
    """

    p: float = 2.4


Observer = MinMax | Percentile | Lp


class Histogram(NamedTuple):
    """Counts of values in equal bins over [lo, hi]; `lo <= 0 <= hi`.

    Attributes:
      counts: float32, how many values fell into each bin (exact below 2^24 a bin).
      lo: lower edge of the first bin.
      hi: upper edge of the last bin.
    """

    counts: Float[Array, " bins"]
    lo: Float[Array, ""]
    hi: Float[Array, ""]


def weight_affine(w: Float[Array, "..."], grid: Grid, observer: Observer) -> Affine:
    """Affine parameters of a weight tensor, per channel along `grid.axis`.

    Args:
      w: any finite values.
      grid: the integers to use; its axis says what shares a scale.
      observer: how to choose the range.

    Returns:
      Scales and zero points with the rank of `w`.

    Reference:
      Nahshan et al. 2021, "Loss aware post-training quantization" (L_p); BRECQ for p = 2.4.
    """
    axes = grid.reduced_axes(w.ndim)
    lo, hi = jnp.min(w, axes, keepdims=True), jnp.max(w, axes, keepdims=True)
    match observer:
        case MinMax():
            return from_range(lo, hi, grid)
        case Percentile(percent):
            tail = (100 - percent) / 200
            return from_range(
                jnp.quantile(w, tail, axes, keepdims=True),
                jnp.quantile(w, 1 - tail, axes, keepdims=True),
                grid,
            )
        case Lp(p):

            def error(affine: Affine) -> Float[Array, "..."]:
                gap = jnp.abs(w - dequantize(quantize(w, affine, grid), affine))
                return jnp.mean(gap**p, axes, keepdims=True)

            return best_shrinkage(lo, hi, grid, error)


def best_shrinkage(lo, hi, grid: Grid, error) -> Affine:
    """The affine parameters of `ratio * [lo, hi]` with the least `error`, elementwise.

    Ratios fall from 1 in equal steps. Clipping only costs more as they do, so the search ends once
    every element's error is hopelessly above its best.
    """
    ratios = jnp.linspace(1.0, 1.0 / CANDIDATES, CANDIDATES, dtype=jnp.float32)
    full = from_range(lo, hi, grid)
    first = error(full)

    def step(carry):
        index, _, least, best = carry
        ratio = ratios[index]
        affine = from_range(lo * ratio, hi * ratio, grid)
        score = error(affine)
        better = score < least
        pick = lambda new, old: jnp.where(better, new, old)
        return index + 1, score, pick(score, least), jax.tree.map(pick, affine, best)

    def promising(carry):
        index, score, least, _ = carry
        return (index < CANDIDATES) & jnp.any(score <= HOPELESS * least)

    start = (jnp.ones((), jnp.int32), first, first, full)
    return lax.while_loop(promising, step, start)[3]


def extend(
    hist: Histogram | None, x: Float[Array, "..."], lo: Float[Array, ""], hi: Float[Array, ""]
) -> Histogram:
    """Adds the values of `x` to a histogram over [lo, hi]; values outside go to the end bins."""
    lo, hi = jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0)
    width = jnp.maximum((hi - lo) / BINS, 1e-30)
    index = jnp.clip(jnp.floor((x.reshape(-1) - lo) / width), 0, BINS - 1).astype(jnp.int32)
    counts = jnp.zeros(BINS, jnp.float32).at[index].add(1.0)
    return Histogram(counts if hist is None else hist.counts + counts, lo, hi)


def activation_affine(hist: Histogram, grid: Grid, observer: Observer) -> Affine:
    """Affine parameters (scalars) for the values a histogram summarises.

    Args:
      hist: counts over the observed range.
      grid: per-tensor grid.
      observer: how to choose the range.

    Returns:
      A scalar scale and zero point.
    """
    match observer:
        case MinMax():
            return from_range(hist.lo, hist.hi, grid)
        case Percentile(percent):
            return from_range(*percentile_range(hist, percent), grid)
        case Lp(p):
            edges = jnp.linspace(0.0, 1.0, BINS + 1, dtype=jnp.float32)
            centres = hist.lo + (edges[1:] + edges[:-1]) / 2 * (hist.hi - hist.lo)

            def error(affine: Affine) -> Float[Array, ""]:
                gap = jnp.abs(centres - dequantize(quantize(centres, affine, grid), affine))
                return jnp.sum(hist.counts * gap**p)

            return best_shrinkage(hist.lo, hist.hi, grid, error)


def percentile_range(hist: Histogram, percent: float) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The range holding the central `percent` of the mass, to the width of one bin."""
    below = jnp.cumsum(hist.counts)
    share = below / jnp.maximum(below[-1], 1.0)  # a separate sum would round differently
    one_sided = hist.lo >= 0
    outside = (100 - percent) / 100
    low = jnp.where(one_sided, 0.0, outside / 2)
    high = jnp.where(one_sided, 1 - outside, 1 - outside / 2)
    width = (hist.hi - hist.lo) / BINS
    first = jnp.argmax(share > low).astype(jnp.float32)
    last = jnp.argmax(share >= high - 1e-7).astype(jnp.float32)
    return hist.lo + first * width, hist.lo + (last + 1) * width
