"""Binary weights: every one is plus or minus one number, which an output channel shares."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from dfq_jax.numerics.affine import NumpyOrJax


@dataclasses.dataclass(frozen=True)
class Signs:
    """Two levels, `-alpha` and `alpha`; codes are -1 and 1.

    Attributes:
      axis: the axis with one `alpha` per index (`-1` for output channels), None for one.
    """

    axis: int | None = -1

    @property
    def bits(self) -> int:
        """Of a code."""
        return 1

    @property
    def dtype(self) -> np.dtype:
        """Storage type of codes."""
        return np.dtype(np.int8)


class Alpha(NamedTuple):
    """The traced half of `Signs`.

    Attributes:
      scale: positive, of the rank of the tensor.
    """

    scale: Float[Array, "..."]


def best_alpha(x: Float[Array, "..."], signs: Signs) -> Alpha:
    """The mean absolute value of each channel, which leaves the least squared error.

    Reference:
      Rastegari et al. 2016, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
      Networks".
    """
    kept = None if signs.axis is None else signs.axis % x.ndim
    axes = tuple(i for i in range(x.ndim) if i != kept)
    return Alpha(jnp.maximum(jnp.mean(jnp.abs(x), axes, keepdims=True), 1e-12))


def signs_of(x: Float[NumpyOrJax, "..."]) -> Int8[NumpyOrJax, "..."]:
    """-1 or 1; zero counts as positive, as a sign of 0 would be a third level."""
    return 1 - 2 * (x < 0).astype(jnp.int8)


def on_signs(x: Float[Array, "..."], alpha: Alpha) -> Float[Array, "..."]:
    """`alpha sign(x)`, differentiable.

    The gradient by `alpha` is the sign; by `x` it is 1 where `|x| <= alpha` and 0 beyond, the
    clipped identity.

    Reference:
      Courbariaux et al. 2016, "Binarized Neural Networks"; here in units of `alpha`.
    """
    units = jnp.clip(x / jax.lax.stop_gradient(alpha.scale), -1.0, 1.0)
    steps = units + jax.lax.stop_gradient(signs_of(x).astype(x.dtype) - units)
    return steps * alpha.scale
