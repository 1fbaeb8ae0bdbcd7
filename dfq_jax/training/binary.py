"""Kernels and activations of one bit while they are trained: what is signed, and by which slope.

A student keeps kernels of real numbers, of which the signs are what layers multiply by. A *view*
says what of them meets the two levels (`StudentKind.signs`), before live batch norms become part of
it: so it is the kernel of the paper, and codes and scales of the deployed one follow.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dfq_jax.graph.semantics import Tensor
from dfq_jax.numerics.levels import Levels, Parameters, on_levels
from dfq_jax.numerics.signs import Alpha, Signs, best_alpha, signs_of
from dfq_jax.training.level_rules import DONE, LevelRule, Share, as_given, nothing_trained
from dfq_jax.training.student import StudentStart, binary_layers
from dfq_jax.values import Bound, bound

SMALLEST_DEVIATION = 1e-8


def held_signs(*, delta: float | None = None) -> Bound[Array]:
    """`Delta sign(theta)` of kernels `theta`; the slope is 1 everywhere.

    Args:
      delta: the one number of all layers; None for the mean absolute weight of each output channel
        of the float network (ours), which norms that keep their statistics fit.

    Reference:
      Zhu et al. 2020, "Towards Accurate Quantization and Pruning via Data-free Knowledge Transfer",
      binary weights.
    """
    return bound(held_at, delta)


def held_at(delta: float | None, kernel: Tensor, first: Tensor, taken: Share) -> Tensor:
    """What `held_signs` makes of a kernel."""
    del taken
    exact = delta_of(delta, first) * signs_of(kernel).astype(kernel.dtype)
    return exact + (kernel - jax.lax.stop_gradient(kernel))


def delta_of(delta: float | None, first: Tensor) -> Tensor:
    """`Delta` of a kernel, in a shape that broadcasts to it."""
    return best_alpha(first, Signs()).scale if delta is None else jnp.full((1,), delta)


def within_delta(*, delta: float | None = None) -> Bound[PyTree]:
    """After every step kernels on signs end at `Delta` on both sides: `|theta| <= Delta`."""
    return bound(clipped_kernels, delta)


def clipped_kernels(delta: float | None, x: PyTree, start: StudentStart) -> PyTree:
    """What `within_delta` makes of what is trained."""
    weights = dict(x["weights"])
    for name in binary_layers(start):
        most = delta_of(delta, start.model.params[name]["kernel"])
        kernel = jnp.clip(weights[name]["kernel"], -most, most)
        weights[name] = {**weights[name], "kernel": kernel}
    return {**x, "weights": weights}


def error_decay(
    *, low: float = 1e-3, high: float = 10.0, rest: float = 0.0
) -> Bound[tuple[Array, Array]]:
    """EDE: how steep the estimator of a sign is, by the share of the steps that are taken.

        t = t_min (t_max / t_min)^p,   k = max(1 / t, 1)

    Args:
      low: t_min.
      high: t_max.
      rest: share of the steps in which it stays at `low` first (DIR-Net's two stages, as its
        abstract can be read); `p` runs through the others.

    Reference:
      Qin et al. 2020, "Forward and Backward Information Retention for Accurate Binary Neural
      Networks" (IR-Net), Eq. 9 to 11, with the released `t_min`.
    """
    return bound(steepness, low, high, rest)


def steepness(low: float, high: float, rest: float, taken: Share) -> tuple[Tensor, Tensor]:
    """What `error_decay` gives: `t` and `k`."""
    passed = jnp.clip((jnp.asarray(taken, jnp.float32) - rest) / (1 - rest), 0.0, 1.0)
    t = low * jnp.power(jnp.float32(high / low), passed)
    return t, jnp.maximum(1 / t, 1.0)


def estimated_sign(x: Tensor, t: Tensor, k: Tensor) -> Tensor:
    """-1 or 1, that of 0 being 1; the slope is `k t (1 - tanh^2(t x))`."""
    soft = k * jnp.tanh(t * x)
    return signs_of(x).astype(x.dtype) + (soft - jax.lax.stop_gradient(soft))


def balanced_signs(decay: Bound[Any]) -> Bound[Array]:
    """Libra parameter binarization: signs of standardised kernels times a power of two.

        w = (W - mean W) / std W,   sign(w) 2^round(log2 mean |w|) std W_0

    of each output channel; `std W_0` is that of the float network, so that norms which keep their
    statistics meet what they know: the paper trains norms from scratch. Slopes pass through mean
    and deviation.

    Args:
      decay: of `error_decay`.

    Reference:
      Qin et al. 2020 (IR-Net), Eq. 5 to 8.
    """
    return bound(balanced, decay)


def balanced(decay: Bound[Any], kernel: Tensor, first: Tensor, taken: Share) -> Tensor:
    """What `balanced_signs` makes of a kernel."""
    unit = standardised_kernel(kernel)
    scale = jnp.exp2(jnp.round(jnp.log2(best_alpha(unit, Signs()).scale)))
    scale = jax.lax.stop_gradient(scale * deviation(first))
    return estimated_sign(unit, *decay(taken)) * scale


def standardised_kernel(kernel: Tensor) -> Tensor:
    """Mean 0 and deviation 1 of each output channel."""
    return centred_kernel(kernel) / deviation(kernel)


def centred_kernel(kernel: Tensor) -> Tensor:
    """Mean 0 of each output channel."""
    return kernel - jnp.mean(kernel, range(kernel.ndim - 1), keepdims=True)


def deviation(kernel: Tensor) -> Float[Array, "..."]:
    """Unbiased deviation of each output channel, in a shape that broadcasts to the kernel."""
    count = max(kernel.size // kernel.shape[-1] - 1, 1)
    squares = jnp.sum(centred_kernel(kernel) ** 2, range(kernel.ndim - 1), keepdims=True)
    return jnp.sqrt(squares / count + SMALLEST_DEVIATION**2)


def signed_activations(decay: Bound[Any], *, in_deviations: bool = False) -> LevelRule:
    """Activations on signs, with the slope of `error_decay`; others with that of clipping.

    Args:
      decay: of `error_decay`.
      in_deviations: the estimator reads them in units of their own deviation in the batch.

    Reference:
      Qin et al. 2020 (IR-Net), Eq. 9; Qin et al. 2023, "Distribution-sensitive Information
      Retention for Accurate Binary Neural Network" (DIR-Net), whose formulas are not public.
    """
    return LevelRule(nothing_trained, as_given, bound(signed, decay, in_deviations))


def signed(
    decay: Bound[Any],
    in_deviations: bool,
    x: Tensor,
    levels: Levels,
    parameters: Parameters,
    taken: Share = DONE,
) -> Tensor:
    """What `signed_activations` makes of a tensor."""
    if not isinstance(levels, Signs) or not isinstance(parameters, Alpha):
        return on_levels(x, levels, parameters)
    unit = jax.lax.stop_gradient(jnp.std(x) + SMALLEST_DEVIATION) if in_deviations else 1.0
    return estimated_sign(x / unit, *decay(taken)) * parameters.scale
