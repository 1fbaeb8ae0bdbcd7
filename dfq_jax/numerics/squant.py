"""SQuant: rounding that keeps the sums of errors small, without data.

A kernel rounded to nearest is as close as it gets, but its errors add up: by chance to several
steps over a kernel of one input channel, more over an output channel. What follows a layer feels
the sums. So some weights are rounded the other way: first within each kernel, until its errors sum
to half a step at most, then over each output channel, where each kernel gives one weight.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dfq_jax.numerics.affine import Affine, Grid, spread

Steps = Float[Array, "out cin taps"]
Kernels = Float[Array, "out cin"]


class Rounded(NamedTuple):
    """Codes, and what each kernel may still give.

    Attributes:
      codes: without zero point.
      errors: codes less the exact number of steps.
      spare: which weight of each kernel may move by one more step, as a mask of at most one.
      direction: by how much, +1 or -1.
    """

    codes: Steps
    errors: Steps
    spare: Bool[Array, "out cin taps"]
    direction: Kernels


def squant_kernel(w: Float[Array, "..."], affine: Affine, grid: Grid) -> Float[Array, "..."]:
    """A kernel on its grid with small sums of errors.

    Args:
      w: channels last: (h, w, in, out) or (in, out).
      affine: scales and zero points, the rank of `w`; of groups of inputs too.
      grid: the integers to use.

    Returns:
      The kernel, each weight less than one step from where it was unless the grid ends before.
      Errors sum to at most half a step over each kernel of one input and one output channel, less
      than one after output channels have theirs summing to half a step at most; both where the
      ends of the grid leave enough weights to move.

    Reference:
      Guo et al. 2022, "SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian
      Approximation", as its released code does it.
    """
    affine = spread(affine, w.shape, grid)
    zero_point = affine.zero_point.astype(jnp.float32)
    steps = by_kernel(w / affine.scale)
    ends = by_kernel(jnp.broadcast_to(-zero_point, w.shape))
    found = balanced_kernels(steps, grid.qmin + ends, grid.qmax + ends)
    codes = balanced_channels(found)
    return restored(codes, w.shape) * affine.scale


def by_kernel(w: Float[Array, "..."]) -> Steps:
    """Weights as (output channel, input channel, tap)."""
    return w.reshape(-1, *w.shape[-2:]).transpose(2, 1, 0)


def restored(w: Steps, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Weights in the shape they had before `by_kernel`."""
    return w.transpose(2, 1, 0).reshape(shape)


def balanced_kernels(steps: Steps, low: Steps, high: Steps) -> Rounded:
    """Rounds to nearest, then moves weights until the errors of each kernel sum to half a step.

    Those move that are most wrongly rounded, `round(|sum|)` of them. The kernel's spare weight is
    the last of them if that was too many, else the next. A kernel of one weight has that to spare.

    Args:
      steps: weights over their scales.
      low: smallest code.
      high: largest.
    """
    codes = jnp.clip(jnp.round(steps), low, high)
    errors = codes - steps
    total = jnp.sum(errors, -1, keepdims=True)
    toward = -jnp.sign(total)
    moved = codes + toward
    free = (errors * toward < 0) & (moved >= low) & (moved <= high)
    order = ranks(jnp.where(free, jnp.abs(errors), -1.0))
    count = jnp.round(jnp.abs(total))
    flips = free & (order < count)
    flip = jnp.where(flips, toward, 0.0)
    over = (count >= jnp.abs(total)) & (count > 0)
    spare = jnp.where(over, flips & (order == count - 1), free & (order == count))
    direction = jnp.where(over, -toward, toward)[..., 0]
    return Rounded(codes + flip, errors + flip, spare, direction)


def balanced_channels(found: Rounded) -> Steps:
    """Codes after moving spare weights until the errors of each output channel sum to half a step.

    Of the kernels whose spare weight moves the right way, those give it whose weight is most
    wrongly rounded.
    """
    total = jnp.sum(found.errors, (1, 2))[:, None]
    toward = -jnp.sign(total)
    wrong = jnp.sum(jnp.where(found.spare, jnp.abs(found.errors), 0.0), -1)
    willing = jnp.any(found.spare, -1) & (found.direction == toward)
    order = ranks(jnp.where(willing, wrong, -1.0))
    giving = willing & (order < jnp.round(jnp.abs(total)))
    return found.codes + jnp.where(found.spare & giving[..., None], toward[..., None], 0.0)


def ranks(x: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
    """The place of each value along the last axis, 0 for the largest."""
    return jnp.argsort(jnp.argsort(-x, -1), -1).astype(jnp.float32)
