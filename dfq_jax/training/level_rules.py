"""How a tensor meets its levels while a student learns: which numbers move, and what the slope is.

A rule says three things: what of the levels is trained apart, what the levels are at a step, and
how a tensor is put on them. Rounding has no slope of its own, so every rule lends it one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dfq_jax.errors import PlanError
from dfq_jax.graph.semantics import Tensor
from dfq_jax.numerics.affine import SMALLEST_SCALE, Affine, Grid
from dfq_jax.numerics.basis import Basis, LearnedLevels, assign, refit_basis
from dfq_jax.numerics.levels import Levels, Parameters, on_levels, scales_of, with_scales
from dfq_jax.numerics.ranges import MinMax, weight_affine
from dfq_jax.numerics.signs import Signs, best_alpha
from dfq_jax.values import bound

DONE = 1.0
"""All steps are taken: slopes do not matter any more."""
Share = Tensor | float
"""Of the steps that are taken, in [0, 1]: a traced number, or one that is known."""


class LevelRule(NamedTuple):
    """How one kind of tensor meets its levels.

    Attributes:
      begin: (levels, parameters as calibrated) -> what of them is trained; None for nothing.
      parameters: (tensor, levels, what is trained, parameters as calibrated) -> those of a step;
        the tensor is None once training is over, where it is one that images make.
      snap: (tensor, levels, parameters, share of the steps that are taken) -> the tensor on its
        levels, with a slope, which may depend on the share.
    """

    begin: Callable[[Levels, Parameters], Tensor | None]
    parameters: Callable[[Tensor | None, Levels, Any, Parameters], Parameters]
    snap: Callable[[Tensor, Levels, Parameters, Share], Tensor]


def nothing_trained(levels: Levels, given: Parameters) -> None:
    """Levels of which nothing is trained."""
    del levels, given


def as_given(x: Tensor | None, levels: Levels, trained: None, given: Parameters) -> Parameters:
    """The parameters as calibrated."""
    del x, levels, trained
    return given


def straight_through(
    x: Tensor, levels: Levels, parameters: Parameters, taken: Share = DONE
) -> Tensor:
    """`x` on its levels; the slope is 1 everywhere, also where values are clipped.

    Reference:
      Xu et al. 2020, "Generative Low-bitwidth Data Free Quantization", released code.
    """
    del taken
    return x + jax.lax.stop_gradient(on_levels(x, levels, parameters) - x)


def clipped_through(
    x: Tensor, levels: Levels, parameters: Parameters, taken: Share = DONE
) -> Tensor:
    """`x` on its levels; the slope is 1 between the outer ones, else 0."""
    del taken
    return on_levels(x, levels, parameters)


def as_calibrated() -> LevelRule:
    """Levels stay as calibrated; the slope is 1 everywhere."""
    return LevelRule(nothing_trained, as_given, straight_through)


def within_levels() -> LevelRule:
    """Levels stay as calibrated; the slope is 1 between the outer ones, else 0."""
    return LevelRule(nothing_trained, as_given, clipped_through)


def solved_anew(*, turns: int = 2) -> LevelRule:
    """LQ-Nets' QEM: the basis of a kernel is solved for its values at every step; the slope is 1.

    The paper goes on from the last step's basis by one turn, and averages over steps; this begins
    at the calibrated basis and takes some turns, so a step depends on the kernel alone.

    Args:
      turns: of assigning codes and solving for the basis.

    Reference:
      Zhang et al. 2018, "LQ-Nets", section 3.2.
    """
    return LevelRule(nothing_trained, bound(basis_anew, turns), straight_through)


def basis_anew(
    turns: int, x: Tensor | None, levels: Levels, trained: None, given: Parameters
) -> Parameters:
    """What `solved_anew` finds; levels that are no basis, and what images make, stay as given."""
    del trained
    if x is None or not isinstance(levels, LearnedLevels) or not isinstance(given, Basis):
        return given
    rows = levels.rows(jax.lax.stop_gradient(x))
    share = jnp.full_like(rows, 1 / rows.shape[1])
    for _ in range(turns):
        given = refit_basis(rows, share, assign(rows, given), given)
    return given


def min_max() -> LevelRule:
    """Ends at the extremes of the tensor, found anew at every step; the slope is 1 everywhere.

    Kernels of GDFQ and all that follow it. The slope does not pass through the extremes.
    """
    return LevelRule(nothing_trained, extremes, straight_through)


def extremes(x: Tensor | None, levels: Levels, trained: None, given: Parameters) -> Parameters:
    """Levels that end where a tensor does; of signs, its mean absolute value.

    Raises:
      PlanError: for learned levels, and for what images make.
    """
    del trained
    if x is None:
        return given
    fixed = jax.lax.stop_gradient(x)
    match levels:
        case Grid():
            return weight_affine(fixed, levels, MinMax())
        case Signs():
            return best_alpha(fixed, levels)
        case _:
            raise PlanError(
                f"levels {levels} have no extremes to follow; train their vectors "
                "(`learned_steps`), or quantize to a grid."
            )


def learned_steps(*, scaled: bool = True, images: bool = False) -> LevelRule:
    """LSQ: the step size is trained, zero points stay; the slope by `x` is 1 within the range.

    By the step `s` it is `round(x/s) - x/s` within and the end of the range beyond, as in

        d xq / d s = -x/s + round(x/s)   |   -Q_N   |   Q_P

    Args:
      scaled: slopes by steps are multiplied by `g = 1 / sqrt(N Q_P)`, N values of a step: then
        steps and weights take updates of one relative size. An optimizer that scales by itself,
        as Adam, does not see it.
      images: the tensor is one that images make, and N are the values of one image.

    Reference:
      Esser et al. 2020, "Learned Step Size Quantization", sections 2.1 and 2.2.
    """
    return LevelRule(begin_scales, bound(trained_scales, scaled, images), clipped_through)


def begin_scales(levels: Levels, given: Parameters) -> Tensor:
    """The scales as calibrated."""
    del levels
    return scales_of(given)


def trained_scales(
    scaled: bool,
    images: bool,
    x: Tensor | None,
    levels: Levels,
    trained: Tensor,
    given: Parameters,
) -> Parameters:
    """Parameters with the scales as trained so far, which stay positive."""
    if scaled and x is not None:
        values = x.size // (len(x) if images else trained.size)
        trained = slowed(trained, 1 / (values * top(levels)) ** 0.5)
    if not isinstance(levels, Grid | Signs):  # vectors of a basis have signs
        return with_scales(given, trained)
    return with_scales(given, jnp.maximum(trained, SMALLEST_SCALE))


def slowed(v: Tensor, factor: float) -> Tensor:
    """`v`, whose slope is multiplied by a factor."""
    return v * factor + jax.lax.stop_gradient(v - v * factor)


def top(levels: Levels) -> int:
    """Q_P: the largest code; 1 of signs and learned levels."""
    return levels.qmax if isinstance(levels, Grid) else 1


def clipped() -> LevelRule:
    """PACT: the clip `alpha` of activations behind a ReLU is trained, steps are `alpha / Q_P`.

        y = clip(x, 0, alpha),   d y / d alpha = 1 where x >= alpha, else 0

    Reference:
      Choi et al. 2018, "PACT: Parameterized Clipping Activation for Quantized Neural Networks",
      Eq. 1 to 3. Grids that begin below 0 keep their zero point: both ends move by one factor.
    """
    return LevelRule(begin_scales, bound(trained_scales, False, True), clip_through)


def clip_through(x: Tensor, levels: Levels, parameters: Parameters, taken: Share = DONE) -> Tensor:
    """`x` on its levels; slopes are those of clipping alone."""
    del taken
    if not isinstance(levels, Grid) or not isinstance(parameters, Affine):
        raise PlanError(f"clipping is trained on uniform grids only, not on {levels}.")
    zero = parameters.zero_point.astype(jnp.float32)
    low, high = ((end - zero) * parameters.scale for end in (levels.qmin, levels.qmax))
    y = jnp.clip(x, low, high)
    return y + jax.lax.stop_gradient(on_levels(x, levels, parameters) - y)
