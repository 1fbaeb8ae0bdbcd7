"""Maximum pooling on CPU by shifts, with a gradient of its own.

The gradient of XLA's window reduction writes down the place of every value, four whole numbers
each, reduces them again and scatters: a fifth of a gradient step of ResNet-18. Here the forward
pass notes which entry of its window won, and each pixel gathers from the windows that cover it.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from dfq_jax.graph.ops import MaxPool, Pair
from dfq_jax.graph.phases import gathered, shifts

Images = Shaped[Array, "n h w c"]
Output = Shaped[Array, "n oh ow c"]
Winner = Int[Array, "n oh ow c"]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def maximum_by_shifts(x: Images, op: MaxPool, size: Pair) -> Output:
    """The largest value of each window.

    Args:
      x: activations, NHWC, floating.
      op: window, strides, padding (none negative) and dilation.
      size: height and width of `x`, which its gradient shall have.

    Returns:
      The maximum, NaN where a window has one. Differentiable in reverse mode, to any order; of
      equal values the first of a window, row by row, gets the gradient.
    """
    del size
    return lax.optimization_barrier(reduce(jnp.maximum, entries(x, op)))


def entries(x: Images, op: MaxPool) -> list[Output]:
    """The first entry of all windows, the second, ..., row by row."""
    edges = ((0, 0), *op.padding, (0, 0))
    padded = jnp.pad(x, edges, constant_values=jnp.array(-jnp.inf, x.dtype))
    return list(shifts(lax.optimization_barrier(padded), op, op.window).values())


def forward(x: Images, op: MaxPool, size: Pair) -> tuple[Output, Winner]:
    """The largest value of each window, and which entry of the window it is."""
    del size
    most, *others = entries(x, op)
    winner = jnp.zeros(most.shape, jnp.int32)
    for entry, value in enumerate(others, 1):
        winner = jnp.where(value > most, entry, winner)
        most = jnp.maximum(most, value)
    return lax.optimization_barrier((most, winner))


def backward(op: MaxPool, size: Pair, winner: Winner, g: Output) -> tuple[Images]:
    """`dx[t] = sum_i g[q] [winner[q] = i]`, `q = (t + p - d i) / s` on both axes, where whole."""

    def share(i: int, j: int, read: tuple[Array, ...]) -> Array:
        return jnp.where(read[1] == i * op.window[1] + j, read[0], 0)

    return (gathered((g, winner), (0, -1), op, op.window, size, share),)


maximum_by_shifts.defvjp(forward, backward)
