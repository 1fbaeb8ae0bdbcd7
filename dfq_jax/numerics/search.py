"""Ranges found by trying: the one whose grid puts values nearest to where they were."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dfq_jax.numerics.affine import Affine, Grid, from_range

CANDIDATES = 100
HOPELESS = 16.0
"""How far above its best an error must be for the search of a range to end."""
AT_ONCE = 16
"""Zero points tried together; each takes the memory of a copy of the tensor."""

Ends = Float[Array, "..."]
Error = Callable[[Affine], Float[Array, "..."]]


class Scored(NamedTuple):
    """A candidate, elementwise.

    Attributes:
      error: what it costs.
      affine: its scales and zero points, in the shape of `error`.
    """

    error: Float[Array, "..."]
    affine: Affine


def best_shrinkage(lo: Ends, hi: Ends, grid: Grid, error: Error) -> Affine:
    """The grid over `ratio * [lo, hi]` with the least error: both ends shrink together."""
    return best_ratio(lambda ratio: scored(from_range(lo * ratio, hi * ratio, grid), error))


def best_clip(lo: Ends, hi: Ends, grid: Grid, error: Error) -> Affine:
    """The grid over [lo, hi] cut to [-c, c] with the least error, `c` a ratio of the larger end.

    Reference:
      Choukroun et al. 2019, "Low-bit Quantization of Neural Networks for Efficient Inference"
      (OMSE), with the thresholds of the code of OCS (Zhao et al. 2019).
    """
    most = jnp.maximum(-lo, hi)

    def clipped(ratio: Float[Array, ""]) -> Scored:
        c = ratio * most
        return scored(from_range(jnp.maximum(lo, -c), jnp.minimum(hi, c), grid), error)

    return best_ratio(clipped)


def best_shift(lo: Ends, hi: Ends, grid: Grid, error: Error) -> Affine:
    """The grid of a ratio of the width of [lo, hi], and any zero point, with the least error.

    Symmetric grids have no choice of zero point, and values of one sign put theirs at that end.

    Reference:
      The search of QDrop's released code (Wei et al. 2022), `MSEObserver`.
    """
    if grid.symmetric:
        return best_shrinkage(lo, hi, grid, error)
    lo, hi = jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0)
    points = jnp.arange(grid.qmax + 1, dtype=jnp.float32)

    def shifted(ratio: Float[Array, ""], point: Float[Array, "..."]) -> Affine:
        step = ratio * (hi - lo) / grid.qmax
        return from_range(-point * step, (grid.qmax - point) * step, grid)

    def best_point(ratio: Float[Array, ""]) -> Scored:
        def cost(point: Float[Array, ""]) -> Float[Array, "..."]:
            wrong_end = ((lo >= 0) & (point > 0)) | ((hi <= 0) & (point < grid.qmax))
            return jnp.where(wrong_end, jnp.inf, error(shifted(ratio, point)))

        errors = lax.map(cost, points, batch_size=min(AT_ONCE, points.size))
        best = points[jnp.argmin(errors, axis=0)]
        return Scored(jnp.min(errors, axis=0), shifted(ratio, best))

    return best_ratio(best_point)


def scored(affine: Affine, error: Error) -> Scored:
    """A candidate with its error."""
    return Scored(error(affine), affine)


def best_ratio(fit: Callable[[Float[Array, ""]], Scored]) -> Affine:
    """The candidate with the least error of those that `fit` makes of a ratio, elementwise.

    Ratios fall from 1 in equal steps. Clipping only costs more as they do, so the search ends once
    every element's error is hopelessly above its best.
    """
    ratios = jnp.linspace(1.0, 1.0 / CANDIDATES, CANDIDATES, dtype=jnp.float32)
    first = fit(ratios[0])

    def step(carry):
        index, _, best = carry
        found = fit(ratios[index])
        better = found.error < best.error
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), found, best)
        return index + 1, found.error, best

    def promising(carry):
        index, error, best = carry
        return (index < CANDIDATES) & jnp.any(error <= HOPELESS * best.error)

    start = (jnp.ones((), jnp.int32), first.error, first)
    return lax.while_loop(promising, step, start)[2].affine
