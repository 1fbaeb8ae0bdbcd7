"""Operators that slide a window, as shifts, and their gradients by the input.

Forwards each window gathers from its pixels; backwards each pixel from the windows that cover it.
"""

from collections.abc import Callable
from itertools import product
from operator import add, mul

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from dfq_jax.graph.ops import Conv2d, MaxPool, Pair
from dfq_jax.graph.volume_ops import Conv3d

Sizes = tuple[int, ...]
"""Numbers of rows and columns; of volumes planes come first."""
PhaseShare = Callable[[int, int, tuple[Array, ...]], Array]
"""(row and column of a window's entry, what is known of the windows) -> its part of a gradient."""


def shifts(
    padded: Shaped[Array, "n *space c"], op: Conv2d | Conv3d | MaxPool, window: Sizes
) -> dict[Sizes, Shaped[Array, "n *out c"]]:
    """{(row, column) of an entry: that entry of all windows}, row by row; of volumes planes too."""
    axes = zip(padded.shape[1:-1], window, op.strides, op.dilation, strict=True)
    sizes = tuple((n - d * (k - 1) - 1) // s * s + 1 for n, k, s, d in axes)
    starts = {at: tuple(map(mul, at, op.dilation)) for at in product(*map(range, window))}
    return {at: piece(padded, start, sizes, op.strides) for at, start in starts.items()}


def piece(
    x: Shaped[Array, "n *space c"], start: Sizes, size: Sizes, strides: Sizes = (1, 1)
) -> Shaped[Array, "n *out c"]:
    """`x[:, start : start + size : stride, ...]` along all axes but the outer two."""
    last = map(add, start, size)
    return lax.slice(x, (0, *start, 0), (x.shape[0], *last, x.shape[-1]), (1, *strides, 1))


def gathered(
    known: tuple[Shaped[Array, "n oh ow c"], ...],
    empty: tuple[int, ...],
    op: Conv2d | MaxPool,
    window: Pair,
    size: Pair,
    share: PhaseShare,
) -> Shaped[Array, "n h w c"]:
    """`dx[t] = sum_i share(i, known[(t + p - d i) / s])` along both axes, over what divides.

    Pixels `t = s q + a` with equal `a` read the same entries, so each phase `a` is a dense sum of
    shifts; the phases are then interleaved.

    Args:
      known: of each window; the first is the gradient of the output.
      empty: what stands in each of them for windows that do not exist.
      op: strides, padding and dilation.
      window: rows and columns of its window.
      size: of the input.
      share: what an entry of the windows contributes.

    Returns:
      Gradient of the input.
    """
    (sh, sw), (h, w), (n, oh, ow, c) = op.strides, size, known[0].shape
    rows, columns = -(-h // sh), -(-w // sw)
    axes = [
        reads(window[axis], op.strides[axis], op.dilation[axis], op.padding[axis][0])
        for axis in (0, 1)
    ]
    (low, high), (left, right) = (
        margins(each, count, there)
        for each, count, there in zip(axes, (rows, columns), (oh, ow), strict=True)
    )
    edges = ((0, 0), (low, high), (left, right), (0, 0))
    pad = lambda v, value: jnp.pad(v, edges, constant_values=value)
    padded = lax.optimization_barrier(tuple(map(pad, known, empty)))

    def phase(a: int, b: int) -> Array:
        total = jnp.zeros((n, rows, columns, c), known[0].dtype)
        for (i, di), (j, dj) in product(axes[0][a], axes[1][b]):
            top, start = low + di, left + dj
            read = tuple(piece(v, (top, start), (rows, columns)) for v in padded)
            total = lax.add(total, share(i, j, read))
        return total

    if sh == sw == 1:
        return phase(0, 0)
    lines = [jnp.stack([phase(a, b) for b in range(sw)], axis=3) for a in range(sh)]
    return jnp.stack(lines, axis=2).reshape(n, rows * sh, columns * sw, c)[:, :h, :w]


Reads = list[list[tuple[int, int]]]
"""For each phase, (kernel entry, offset into the output's gradient) of what it reads."""


def reads(window: int, stride: int, dilation: int, padding: int) -> Reads:
    """What each phase reads along one axis."""
    found: Reads = [[] for _ in range(stride)]
    for a, i in product(range(stride), range(window)):
        offset, rest = divmod(a + padding - dilation * i, stride)
        if rest == 0:
            found[a].append((i, offset))
    return found


def margins(phases: Reads, count: int, size: int) -> tuple[int, int]:
    """Zeros needed before and after `size` entries so that all reads of `count` pixels exist."""
    offsets = [offset for phase in phases for _, offset in phase]
    return max(0, -min(offsets)), max(0, count - size + max(offsets))
