"""Range estimators ("observers"): where a grid should begin and end.

Weights are searched directly, per output channel. Activations are summarised in a histogram that
is filled batch by batch, so calibration never holds more than one batch of one network.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dfq_jax.numerics.affine import Affine, Grid, dequantize, from_range, quantize
from dfq_jax.numerics.clipping import aciq_range, entropy_range
from dfq_jax.numerics.histogram import Histogram, empty, extend, percentile_range
from dfq_jax.numerics.search import best_clip, best_shift, best_shrinkage

CHANNELS_AT_ONCE = 16
"""Channels whose histograms are judged together."""


@dataclasses.dataclass(frozen=True)
class MinMax:
    """The observed extremes."""


@dataclasses.dataclass(frozen=True)
class EmaMinMax:
    """The extremes of each batch, averaged over batches with weights that fall exponentially.

    `m <- momentum m + (1 - momentum) new`, started at 0 and divided by `1 - momentum^t` for it;
    ZeroQ's successors (GDFQ, IntraQ) average so.

    Attributes:
      momentum: weight of the past.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Raises ValueError unless 0 <= momentum < 1."""
        if not 0 <= self.momentum < 1:
            raise ValueError(f"EmaMinMax needs 0 <= momentum < 1, got {self.momentum}.")


@dataclasses.dataclass(frozen=True)
class ImageMinMax:
    """The extremes of each image, averaged over all images (Zhang et al. 2021, DSG)."""


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

    BRECQ (Li et al. 2021) uses p = 2.4; both ends shrink together through the ratios
    1.00, 0.99 … 0.01.
    """

    p: float = 2.4


@dataclasses.dataclass(frozen=True)
class LpShift:
    """The width and the zero point that minimise mean |x - fake_quantize(x)|^p.

    QDrop (Wei et al. 2022): every zero point at each of 100 widths; only the width where values
    have one sign or the grid is symmetric.
    """

    p: float = 2.4


@dataclasses.dataclass(frozen=True)
class Omse:
    """The clip `[-c, c]` that minimises the mean squared error (Choukroun et al. 2019)."""


@dataclasses.dataclass(frozen=True)
class Aciq:
    """The clip that is best for a normal or Laplace variable, whichever fits (Banner 2019)."""


@dataclasses.dataclass(frozen=True)
class Entropy:
    """The clip that changes the distribution least, by Kullback-Leibler divergence (TensorRT)."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What batch-norm statistics predict (DFQ); the observed extremes where they are silent."""


WeightObserver = MinMax | Percentile | Lp | LpShift | Omse | Aciq | Entropy
Observer = WeightObserver | EmaMinMax | ImageMinMax | Statistics
Range = tuple[Float[Array, ""], Float[Array, ""]]


def weight_affine(
    w: Float[Array, "..."],
    grid: Grid,
    observer: Observer,
    shares: Float[Array, "..."] | None = None,
) -> Affine:
    """Affine parameters of a weight tensor, per channel along `grid.axis`.

    Args:
      w: any finite values.
      grid: the integers to use; its axis says what shares a scale.
      observer: how to choose the range; those that speak of batches or batch norms take the
        extremes.
      shares: one over the number of values of each channel, where others are zeros that fill it
        up; only for observers of extremes and errors.

    Returns:
      Scales and zero points with the rank of `w`; of groups one for each.

    Reference:
      Nahshan et al. 2021, "Loss aware post-training quantization" (L_p); BRECQ for p = 2.4.
    """
    if grid.group is not None:
        return group_affine(w, grid, grid.group, observer)
    axes = grid.reduced_axes(w.ndim)
    lo, hi = jnp.min(w, axes, keepdims=True), jnp.max(w, axes, keepdims=True)

    def error(p: float, affine: Affine) -> Float[Array, "..."]:
        gap = jnp.abs(w - dequantize(quantize(w, affine, grid), affine))
        if shares is None:
            return jnp.mean(gap**p, axes, keepdims=True)
        return jnp.sum(gap**p, axes, keepdims=True) * shares

    match observer:
        case MinMax() | EmaMinMax() | ImageMinMax() | Statistics():
            return from_range(lo, hi, grid)
        case Percentile(percent):
            tail = (100 - percent) / 200
            return from_range(
                jnp.quantile(w, tail, axes, keepdims=True),
                jnp.quantile(w, 1 - tail, axes, keepdims=True),
                grid,
            )
        case Lp(p):
            return best_shrinkage(lo, hi, grid, lambda affine: error(p, affine))
        case LpShift(p):
            return best_shift(lo, hi, grid, lambda affine: error(p, affine))
        case Omse():
            return best_clip(lo, hi, grid, lambda affine: error(2.0, affine))
        case Aciq() | Entropy():
            return by_channel(w, grid, observer)


def group_affine(w: Float[Array, "..."], grid: Grid, group: int, observer: Observer) -> Affine:
    """Affine parameters of every group of input channels; the last may have fewer than `group`."""
    whole = w.shape[-2] // group * group
    parts = [w[..., :whole, :], w[..., whole:, :]]
    plain = dataclasses.replace(grid, group=None)

    def fitted(part: Float[Array, "..."]) -> Affine:
        size = min(group, part.shape[-2])
        count, outputs = part.shape[-2] // size, part.shape[-1]
        split = part.reshape(*part.shape[:-2], count, size, outputs)
        columns = jnp.swapaxes(split, -3, -2).reshape(*part.shape[:-2], size, count * outputs)
        found = weight_affine(columns, plain, observer)
        return jax.tree.map(lambda v: v.reshape(*v.shape[:-2], count, outputs), found)

    each = [fitted(part) for part in parts if part.shape[-2]]
    return jax.tree.map(lambda *vs: jnp.concatenate(vs, axis=-2), *each)


def by_channel(w: Float[Array, "..."], grid: Grid, observer: Aciq | Entropy) -> Affine:
    """Affine parameters from a histogram of each channel."""
    shape = tuple(1 if i in grid.reduced_axes(w.ndim) else n for i, n in enumerate(w.shape))
    rows = w.reshape(1, -1) if grid.axis is None else jnp.moveaxis(w, grid.axis, 0)
    rows = rows.reshape(rows.shape[0], -1)

    def fit(row: Float[Array, " n"]) -> Affine:
        lo, hi = jnp.min(row), jnp.max(row)
        return activation_affine(extend(empty(lo, hi), row, lo, hi), grid, observer)

    found = lax.map(fit, rows, batch_size=min(CHANNELS_AT_ONCE, rows.shape[0]))
    return jax.tree.map(lambda v: v.reshape(shape), found)


def activation_affine(hist: Histogram, grid: Grid, observer: Observer) -> Affine:
    """Affine parameters (scalars) for the values a histogram summarises.

    Args:
      hist: counts over the observed range; for `EmaMinMax` over the averaged one.
      grid: per-tensor grid.
      observer: how to choose the range.

    Returns:
      A scalar scale and zero point.
    """
    x, counts = hist.centres, hist.counts

    def error(p: float, affine: Affine) -> Float[Array, ""]:
        gap = jnp.abs(x - dequantize(quantize(x, affine, grid), affine))
        return jnp.sum(counts * gap**p)

    match observer:
        case MinMax() | EmaMinMax() | ImageMinMax() | Statistics():
            return from_range(hist.lo, hist.hi, grid)
        case Percentile(percent):
            return from_range(*percentile_range(hist, percent), grid)
        case Lp(p):
            return best_shrinkage(hist.lo, hist.hi, grid, lambda affine: error(p, affine))
        case LpShift(p):
            return best_shift(hist.lo, hist.hi, grid, lambda affine: error(p, affine))
        case Omse():
            return best_clip(hist.lo, hist.hi, grid, lambda affine: error(2.0, affine))
        case Aciq():
            return from_range(*aciq_range(hist, grid.bits), grid)
        case Entropy():
            return from_range(*entropy_range(hist, grid.bits), grid)


def averages(observer: Observer) -> bool:
    """Whether a range is averaged over batches or images; all others are between extremes."""
    return isinstance(observer, EmaMinMax | ImageMinMax)


def unseen(observer: Observer) -> Range:
    """The range of no batch, for `merged_ranges` to begin from."""
    if averages(observer):
        return jnp.float32(0.0), jnp.float32(0.0)
    return jnp.float32(jnp.inf), jnp.float32(-jnp.inf)


def extremes(x: Float[Array, "b ..."], fresh: Float[Array, ""], observer: Observer) -> Range:
    """Smallest and largest value of a batch; of each image, averaged, where the observer does so.

    Args:
      x: values of a tensor, images first.
      fresh: images at its end that no earlier batch had: only these are averaged.
      observer: whose range it is.
    """
    if not isinstance(observer, ImageMinMax):
        return jnp.min(x), jnp.max(x)
    each, count = x.reshape(x.shape[0], -1), x.shape[0]
    weight = (jnp.arange(count, dtype=jnp.float32) >= count - fresh).astype(x.dtype) / fresh
    return jnp.sum(weight * each.min(1)), jnp.sum(weight * each.max(1))


def merged_ranges(
    before: Range,
    new: Range,
    seen: Float[Array, ""],
    observer: Observer,
    share: Float[Array, ""] | float = 1.0,
) -> Range:
    """The range of several batches.

    Args:
      before: that of the batches so far.
      new: `extremes` of one batch more.
      seen: how many batches that makes.
      observer: whose range it is.
      share: of all images so far, those that are new with the last batch.

    Returns:
      The extremes of all, or their average: with `t` batches, the bias-corrected moving average
      is `m_t = m_{t-1} + (1 - d) / (1 - d^t) (new - m_{t-1})`; over images it is their mean.

    Reference:
      Kingma and Ba 2015, "Adam", section 3 (the correction).
    """
    if isinstance(observer, EmaMinMax | ImageMinMax):
        rate = share
        if isinstance(observer, EmaMinMax):
            rate = (1 - observer.momentum) / (1 - observer.momentum**seen)
            rate = jnp.where(seen > 1, rate, 1.0)  # exactly, whatever the powers round to
        return before[0] + rate * (new[0] - before[0]), before[1] + rate * (new[1] - before[1])
    return jnp.minimum(before[0], new[0]), jnp.maximum(before[1], new[1])
