"""What is done to a loss before it is descended: noise against images, or against variables.

A wrapper is a function of the loss as a function of variables and images; wrappers compose.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree, Shaped

from dfq_jax.values import Bound, bound


class Heard(NamedTuple):
    """What there is to know of a loss beside its value.

    Attributes:
      parts: its terms, unweighted.
      extremes: {tensor: its smallest and largest value}, of those that are tracked.
    """

    parts: Mapping[str, Array]
    extremes: Mapping[str, tuple[Array, Array]]


LossParts = tuple[Float[Array, ""], Heard]
"""A loss, and what there is to know of it."""
Shown = Callable[[PyTree, Shaped[Array, "b ..."]], LossParts]
"""The loss of variables on images."""
Wrapper = Callable[[Shown, PyTree, Shaped[Array, "b ..."]], LossParts]
"""(loss, variables, images) -> the loss that is descended, and what there is to know."""


def wrapped(wrappers: tuple[Wrapper, ...], loss: Shown) -> Shown:
    """A loss inside wrappers, the first of them innermost."""
    for wrapper in wrappers:
        loss = enclosed(wrapper, loss)
    return loss


def enclosed(wrapper: Wrapper, loss: Shown) -> Shown:
    """A loss inside one wrapper."""
    return lambda x, images: wrapper(loss, x, images)


def perturbed_images(*, reach: float) -> Bound[LossParts]:
    """The loss on images, and on images moved in the direction in which it grows.

        x' = x + eps sign(d L(x) / d x),   L(x) + L(x')

    The slope is that of teacher and student together, and none passes through the sign. The one
    pass back that finds it finds the slope of `L(x)` by the variables too: use it to first order.

    Args:
      reach: `eps`, of normalised images.

    Reference:
      Li et al. 2023, "Hard Sample Matters a Lot in Zero-Shot Quantization" (HAST), as released.
    """
    return bound(with_perturbed, reach)


def with_perturbed(reach: float, loss: Shown, x: PyTree, images: Array) -> LossParts:
    """What `perturbed_images` does."""
    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (clean, heard), (by_variables, by_images) = both(jax.lax.stop_gradient(x), images)
    moved = jax.lax.stop_gradient(images + reach * jnp.sign(by_images))
    rough, _ = loss(x, moved)
    parts = {**heard.parts, "perturbed": rough}
    return with_slope(clean, x, by_variables) + rough, heard._replace(parts=parts)


def with_slope(value: Float[Array, ""], x: PyTree, slope: PyTree) -> Float[Array, ""]:
    """A number as it is, whose slope by variables is known already: `<x - x, slope>` is added."""
    known: Any = jax.lax.stop_gradient((value, x, slope))
    apart = jax.tree.map(lambda v, at, g: jnp.vdot(v - at, g), x, *known[1:])
    return jax.tree.reduce(jnp.add, apart, known[0])


def sharpness_aware(*, reach: float = 0.05) -> Bound[LossParts]:
    """The loss at the variables moved, by a length, in the direction in which it grows.

        e = rho g / |g|,   L(w + e)

    Args:
      reach: `rho`.

    Reference:
      Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving Generalization",
      Eq. 2 and 3.
    """
    return bound(at_sharpest, reach)


def at_sharpest(reach: float, loss: Shown, x: PyTree, images: Array) -> LossParts:
    """What `sharpness_aware` does."""
    slope: Any = jax.grad(lambda v: loss(v, images)[0])(jax.lax.stop_gradient(x))
    length = jnp.maximum(optax.tree.norm(slope), 1e-12)
    moved = jax.tree.map(lambda v, g: v + jax.lax.stop_gradient(reach * g / length), x, slope)
    return loss(moved, images)
