"""Rounding in closed form, by the Gram matrix of what a layer reads.

A layer with kernel `w` (inputs by outputs, one matrix a group) that reads rows `x` loses
`(w^ - w)^T H (w^ - w)` by becoming `w^`, with `H = x^T x / n`. OBQ rounds one input after the other
and lets those that follow make up for the error; two cheap polishes follow: the best scale for
given codes, and single codes moved where that pays.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dfq_jax.numerics.affine import Affine, Grid, spread

Gram = Float[Array, "k k"]
Weights = Float[Array, "k o"]
PerOutput = Float[Array, "1 o"]
OfRows = Float[Array, "r o"]
"""A number for each output, or for each of its weights (r is 1, or k)."""
DAMPING = 0.01
"""Added to the diagonal of a Gram matrix, in units of its mean."""


class Lattice(NamedTuple):
    """The values that weights may take: `scale * [low, high]`, whole numbers.

    Attributes:
      scale: positive; of each output, or of each weight where inputs are in groups.
      low: smallest code less the zero point.
      high: largest.
    """

    scale: OfRows
    low: OfRows
    high: OfRows

    def nearest(self, w: Float[Array, "... o"]) -> Float[Array, "... o"]:
        """Codes of weights, rounded to nearest."""
        return jnp.clip(jnp.round(w / self.scale), self.low, self.high)


def lattice(affine: Affine, grid: Grid, kernel: tuple[int, ...]) -> Lattice:
    """The lattice of a grid for a kernel of this shape, whatever the rank of its scales."""
    if grid.group is None:
        rows = lambda v: jnp.broadcast_to(v.astype(jnp.float32).reshape(1, -1), (1, kernel[-1]))
    else:
        affine = spread(affine, kernel, grid)
        rows = lambda v: jnp.broadcast_to(v.astype(jnp.float32), kernel).reshape(-1, kernel[-1])
    zero_point = rows(affine.zero_point)
    return Lattice(rows(affine.scale), grid.qmin - zero_point, grid.qmax - zero_point)


def damped(gram: Gram, damping: float = DAMPING) -> Gram:
    """The matrix with some of its mean diagonal added, so that it can be inverted."""
    most = jnp.maximum(jnp.trace(gram) / gram.shape[0], 1e-12)
    return gram + damping * most * jnp.eye(gram.shape[0], dtype=gram.dtype)


def transported(w: Weights, gram: Gram, cross: Float[Array, "k k"], damping: float) -> Weights:
    """The weights that do to quantized inputs what `w` does to exact ones, in least squares.

    Args:
      w: of the float layer.
      gram: of its quantized inputs, `xq^T xq / n`.
      cross: `xq^T x / n`.
      damping: pulls towards `w`, in units of the mean diagonal of `gram`.

    Returns:
      `argmin |xq v - x w|^2 / n + damping * mean diagonal * |v - w|^2`.
    """
    pull = damping * jnp.trace(gram) / gram.shape[0]
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return jax.scipy.linalg.solve(
        damped(gram + pull * eye, 1e-6), cross @ w + pull * w, assume_a="pos"
    )


def rounded_in_order(w: Weights, gram: Gram, grid: Lattice) -> Weights:
    """Codes by OBQ in a fixed order: inputs of much power first.

    Input `i` is rounded to nearest; those not rounded yet take `-U[i, j] / U[i, i]` times its
    error, where `U` is the upper Cholesky factor of the inverse Gram matrix.

    Args:
      w: the weights.
      gram: of the inputs; damped here.
      grid: what values there are.

    Returns:
      Whole numbers, by which the scales are multiplied.

    Reference:
      Frantar & Alistarh 2022, "Optimal Brain Compression" (OBQ); Frantar et al. 2023,
      "GPTQ", algorithm 1 (fixed order, Cholesky factor).
    """
    order = jnp.argsort(-jnp.diag(gram))
    gram = damped(gram)[order][:, order]
    factor = jnp.linalg.cholesky(jnp.linalg.inv(gram), upper=True)
    rows = Lattice(*(jnp.broadcast_to(v, w.shape)[order] for v in grid))

    def step(left: Weights, i: Int[Array, ""]) -> tuple[Weights, Float[Array, " o"]]:
        own = Lattice(*(v[i] for v in rows))
        codes = own.nearest(left[i])
        error = (left[i] - codes * own.scale) / factor[i, i]
        later = jnp.where(jnp.arange(len(factor)) > i, factor[i], 0.0)
        return left - later[:, None] * error, codes

    _, codes = lax.scan(step, w[order], jnp.arange(w.shape[0]))
    return jnp.zeros_like(w).at[order].set(codes)


def best_scale(codes: Weights, w: Weights, gram: Gram) -> PerOutput:
    """`s = c^T H w / c^T H c` for each output: the least error that given codes allow.

    Returns:
      Scales; 0 or less where the codes have nothing to do with the weights.
    """
    spread = gram @ codes
    power = jnp.sum(codes * spread, 0, keepdims=True)
    return jnp.sum(w * spread, 0, keepdims=True) / jnp.maximum(power, 1e-30)


@partial(jax.jit, static_argnames="sweeps")
def polished(
    codes: Weights, w: Weights, gram: Gram, grid: Lattice, sweeps: int = 2
) -> tuple[Weights, OfRows]:
    """Codes moved by one wherever that lowers the error most, and scales refitted, in turns.

    Neither can raise the error: a code moves only if it lowers it, and scales are optimal. Scales
    of groups stay as they are.

    Args:
      codes: whole numbers.
      w: what they stand for.
      gram: of the inputs.
      grid: their bounds and first scales.
      sweeps: a sweep is as many moves for each output as it has inputs, then new scales.

    Returns:
      Codes and scales.
    """
    diagonal, refits = jnp.diag(gram)[:, None], grid.scale.shape[0] == 1

    def move(carry: tuple[Weights, Weights, OfRows], _):
        codes, slope, scale = carry
        gains = lambda d: jnp.where(
            (codes + d < grid.low) | (codes + d > grid.high),
            jnp.inf,
            2 * d * scale * slope + scale**2 * diagonal,
        )
        up, down = gains(1.0), gains(-1.0)
        change = jnp.minimum(up, down)
        chosen = jnp.argmin(change, 0)
        outputs = jnp.arange(codes.shape[1])
        worth = change[chosen, outputs] < 0
        rises = up[chosen, outputs] <= down[chosen, outputs]
        step = jnp.where(worth, jnp.where(rises, 1.0, -1.0), 0.0)
        own = scale[0] if refits else scale[chosen, outputs]
        slope = slope + gram[:, chosen] * (step * own)
        return (codes.at[chosen, outputs].add(step), slope, scale), None

    def sweep(carry: tuple[Weights, OfRows], _):
        codes, scale = carry
        slope = gram @ (scale * codes - w)
        (codes, _, scale), _ = lax.scan(move, (codes, slope, scale), length=codes.shape[0])
        if not refits:
            return (codes, scale), None
        fitted = best_scale(codes, w, gram)
        return (codes, jnp.where(fitted > 0, fitted, scale)), None

    (codes, scale), _ = lax.scan(sweep, (codes, grid.scale), length=sweeps)
    return codes, scale
