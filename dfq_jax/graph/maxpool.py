"""Maximum pooling on CPU by shifts, with a gradient of its own.

The gradient of XLA's window reduction writes down the place of every value, four whole numbers
each, reduces them again and scatters: a fifth of a gradient step of ResNet-18. Here the forward
pass notes which entry of its window won, and each pixel gathers from the windows that cover it.
"""

from functools import partial, reduce
from itertools import product

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from dfq_jax.graph.depthwise import margins, reads
from dfq_jax.graph.ops import MaxPool, Pair

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
    return lax.optimization_barrier(reduce(jnp.maximum, shifts(x, op)))


def shifts(x: Images, op: MaxPool) -> list[Output]:
    """The entries of all windows: the first of each, the second of each, ..., row by row."""
    (kh, kw), (sh, sw), (dh, dw) = op.window, op.strides, op.dilation
    edges = ((0, 0), *op.padding, (0, 0))
    x = lax.optimization_barrier(jnp.pad(x, edges, constant_values=jnp.array(-jnp.inf, x.dtype)))
    oh = (x.shape[1] - dh * (kh - 1) - 1) // sh + 1
    ow = (x.shape[2] - dw * (kw - 1) - 1) // sw + 1
    rows, columns = (oh - 1) * sh + 1, (ow - 1) * sw + 1
    corners = ((i * dh, j * dw) for i, j in product(range(kh), range(kw)))
    return [x[:, i : i + rows : sh, j : j + columns : sw] for i, j in corners]


def forward(x: Images, op: MaxPool, size: Pair) -> tuple[Output, Winner]:
    """The largest value of each window, and which entry of the window it is."""
    del size
    most, *others = shifts(x, op)
    winner = jnp.zeros(most.shape, jnp.int32)
    for entry, value in enumerate(others, 1):
        winner = jnp.where(value > most, entry, winner)
        most = jnp.maximum(most, value)
    return lax.optimization_barrier((most, winner))


def backward(op: MaxPool, size: Pair, winner: Winner, g: Output) -> tuple[Images]:
    """`dx[t] = sum_i g[q] [winner[q] = i]`, `q = (t + p - d i) / s` along both axes, where whole.

    As in the gradient of a depthwise convolution, pixels `t = s q + a` with equal `a` read the same
    entries: each phase `a` is a dense sum of shifts, and the phases are interleaved.
    """
    (sh, sw), (h, w), (n, _, _, c) = op.strides, size, g.shape
    rows, columns = -(-h // sh), -(-w // sw)
    axes = [
        reads(op.window[axis], op.strides[axis], op.dilation[axis], op.padding[axis][0])
        for axis in (0, 1)
    ]
    (low, high), (left, right) = (
        margins(each, count, size)
        for each, count, size in zip(axes, (rows, columns), g.shape[1:3], strict=True)
    )
    edges = ((0, 0), (low, high), (left, right), (0, 0))
    padded = jnp.pad(g, edges), jnp.pad(winner, edges, constant_values=-1)
    g, winner = lax.optimization_barrier(padded)

    def phase(a: int, b: int) -> Array:
        total = jnp.zeros((n, rows, columns, c), g.dtype)
        for (i, di), (j, dj) in product(axes[0][a], axes[1][b]):
            top, start = low + di, left + dj
            here = (slice(None), slice(top, top + rows), slice(start, start + columns))
            total = total + jnp.where(winner[here] == i * op.window[1] + j, g[here], 0)
        return total

    lines = [jnp.stack([phase(a, b) for b in range(sw)], axis=3) for a in range(sh)]
    return (jnp.stack(lines, axis=2).reshape(n, rows * sh, columns * sw, c)[:, :h, :w],)


maximum_by_shifts.defvjp(forward, backward)
