"""What calibration keeps of the values of a tensor: counts in equal bins."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

BINS = 4096


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

    @property
    def width(self) -> Float[Array, ""]:
        """Of one bin."""
        return (self.hi - self.lo) / BINS

    @property
    def centres(self) -> Float[Array, " bins"]:
        """The middle of each bin."""
        edges = jnp.linspace(0.0, 1.0, BINS + 1, dtype=jnp.float32)
        return self.lo + (edges[1:] + edges[:-1]) / 2 * (self.hi - self.lo)

    @property
    def one_sided(self) -> Bool[Array, ""]:
        """Whether no value is negative."""
        return self.lo >= 0


def empty(lo: Float[Array, ""], hi: Float[Array, ""]) -> Histogram:
    """A histogram of nothing."""
    return Histogram(jnp.zeros(BINS, jnp.float32), lo, hi)


def extend(
    hist: Histogram, x: Float[Array, "..."], lo: Float[Array, ""], hi: Float[Array, ""]
) -> Histogram:
    """Adds the values of `x` to a histogram over [lo, hi]; values outside go to the end bins."""
    lo, hi = jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0)
    width = jnp.maximum((hi - lo) / BINS, 1e-30)
    index = jnp.clip(jnp.floor((x.reshape(-1) - lo) / width), 0, BINS - 1).astype(jnp.int32)
    counts = jnp.zeros(BINS, jnp.float32).at[index].add(1.0)
    return Histogram(hist.counts + counts, lo, hi)


def percentile_range(hist: Histogram, percent: float) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The range holding the central `percent` of the mass, to the width of one bin."""
    below = jnp.cumsum(hist.counts)
    share = below / jnp.maximum(below[-1], 1.0)  # a separate sum would round differently
    outside = (100 - percent) / 100
    low = jnp.where(hist.one_sided, 0.0, outside / 2)
    high = jnp.where(hist.one_sided, 1 - outside, 1 - outside / 2)
    first = jnp.argmax(share > low).astype(jnp.float32)
    last = jnp.argmax(share >= high - 1e-7).astype(jnp.float32)
    return hist.lo + first * hist.width, hist.lo + (last + 1) * hist.width


def magnitudes(hist: Histogram, bins: int) -> tuple[Float[Array, " {bins}"], Float[Array, ""]]:
    """The histogram of absolute values over [0, max(-lo, hi)].

    Args:
      hist: of the values.
      bins: how many; at most half of `BINS`, so that a bin of the values meets at most two.

    Returns:
      Counts, each bin's shared between the bins it meets by their parts of its width, and the
      width of a bin.
    """
    most = jnp.maximum(-hist.lo, hist.hi)
    width = jnp.maximum(most / bins, 1e-30)
    fine = jnp.maximum(hist.width, 1e-30)
    near = jnp.maximum(jnp.abs(hist.centres) - fine / 2, 0.0)
    index = jnp.clip(jnp.floor(near / width), 0, bins - 1)
    beyond = jnp.clip((near + fine - (index + 1) * width) / fine, 0.0, 1.0)
    index = index.astype(jnp.int32)
    counts = jnp.zeros(bins, jnp.float32).at[index].add(hist.counts * (1 - beyond))
    following = jnp.minimum(index + 1, bins - 1)
    return counts.at[following].add(hist.counts * beyond), width
