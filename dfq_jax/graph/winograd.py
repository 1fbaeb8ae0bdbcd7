"""Convolutions of 3x3 on CPU by minimal filtering: a quarter of the multiplications.

Winograd's F(4x4, 3x3): overlapping tiles of 6x6 pixels and the kernel are transformed, multiplied
entry by entry as 36 matrix products over channels, and transformed back to 4x4 outputs. The result
is rounded differently, by about 1e-5 of its largest value, so only what averages over many pixels
may ask for it, as image synthesis does; integer arithmetic emulated in floats may not.

Reference:
  Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", section 4.3.
"""

from collections.abc import Callable
from functools import partial, reduce
from itertools import compress
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped

from dfq_jax.graph.ops import Conv2d, Pads

Images = Shaped[Array, "n h w cin"]
Kernel = Shaped[Array, "3 3 cin cout"]
Output = Shaped[Array, "n oh ow cout"]

TILE, WINDOW, GROWTH = 4, 6, 4
"""Outputs and inputs of a tile along an axis; how much a transformed kernel grows."""
FEWEST = 32
"""Channels below which the transforms cost more than the multiplications they save."""
INTO_TILES = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float32,
)
OF_KERNEL = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    np.float32,
)
OUT_OF_TILES = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    np.float32,
)


def tileable(x: tuple[int, ...], kernel: tuple[int, ...], op: Conv2d) -> bool:
    """Whether a convolution of these static shapes can be tiled and gains by it."""
    return winnable(kernel[:2], op) and min(kernel[2:]) >= FEWEST and min(x[1:3]) >= TILE


def winnable(window: tuple[int, ...], op: Conv2d) -> bool:
    """Whether tiles can express a convolution."""
    plain = op.strides == op.dilation == (1, 1) and op.groups == 1 and window == (3, 3)
    return plain and all(0 <= side <= 2 for sides in op.padding for side in sides)


def tiles_along(size: int, padding: tuple[int, int]) -> int:
    """How many tiles cover an axis of the output."""
    return -(-(size + sum(padding) - 2) // TILE)


def tile_values(x: tuple[int, ...], kernel: tuple[int, ...], op: Conv2d) -> int:
    """How many values a tiled convolution sets aside: its tiles and their products."""
    count = prod(map(tiles_along, x[1:3], op.padding))
    return WINDOW**2 * x[0] * count * sum(kernel[2:])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve_by_tiles(x: Images, kernel: Kernel, padding: Pads) -> Output:
    """A 3x3 convolution of stride 1.

    Args:
      x: activations, NHWC, float32.
      kernel: HWIO.
      padding: zeros around the images, none negative.

    Returns:
      The convolution. Differentiable in reverse mode, to any order.
    """
    return plainly(x, kernel, padding)


def plainly(x: Images, kernel: Kernel, padding: Pads) -> Output:
    """The convolution as autodiff would differentiate it."""
    weights = tiled_kernel(OF_KERNEL, kernel)
    return filtered(x, padding, lambda tiles: jnp.matmul(tiles, weights))


def tiled_kernel_gradient(x: Images, g: Output, padding: Pads) -> Kernel:
    """The gradient by the kernel: products of tiles and transformed gradients, summed over tiles.

    XLA's own is a convolution whose window is the image, 50 times slower inside a `lax.scan`.
    """
    none = jnp.zeros((3, 3, x.shape[-1], g.shape[-1]), x.dtype)
    return jax.vjp(lambda kernel: plainly(x, kernel, padding), none)[1](g)[0]


def filtered(
    x: Images, padding: Pads, multiply: Callable[[Shaped[Array, "36 p cin"]], Array]
) -> Output:
    """The tiles of padded images, multiplied by a transformed kernel, and put together."""
    (n, h, w, cin), (top, bottom), (left, right) = x.shape, *padding
    th, tw = tiles_along(h, padding[0]), tiles_along(w, padding[1])
    below, beside = th * TILE + 2 - h - top, tw * TILE + 2 - w - left
    padded = separate(jnp.pad(x, ((0, 0), (top, below), (left, beside), (0, 0))))
    tiles = into_tiles(into_tiles(padded, 1, th), 3, tw)
    products = separate(multiply(tiles.reshape(WINDOW**2, n * th * tw, cin)))
    products = products.reshape(WINDOW, WINDOW, n, th, tw, -1)
    columns = separate(jnp.stack(combinations(OUT_OF_TILES, list(products)), axis=4))
    pixels = separate(jnp.stack(combinations(OUT_OF_TILES, list(columns)), axis=2))
    return pixels.reshape(n, th * TILE, tw * TILE, -1)[
        :, : h + top + bottom - 2, : w + left + right - 2
    ]


separate = lax.optimization_barrier
"""Keeps XLA from computing a transform anew for each of its readers."""


def tiled_kernel(factors: Float[np.ndarray, "6 3"], kernel: Kernel) -> Shaped[Array, "36 cin cout"]:
    """The transformed kernel, entries column by column as `into_tiles` leaves them."""
    rows = jnp.stack(combinations(factors, list(kernel)))
    columns = jnp.stack(combinations(factors, [rows[:, j] for j in range(3)]))
    return columns.reshape(WINDOW**2, *kernel.shape[2:])


def into_tiles(x: Shaped[Array, "..."], axis: int, tiles: int) -> Shaped[Array, "..."]:
    """All tiles along an axis, transformed; entries of the tiles come first."""
    last = (tiles - 1) * TILE + 1
    entries = [lax.slice_in_dim(x, i, i + last, TILE, axis) for i in range(WINDOW)]
    return separate(jnp.stack(combinations(INTO_TILES, entries)))


def combinations(
    factors: Float[np.ndarray, "m k"], parts: list[Shaped[Array, "..."]]
) -> list[Shaped[Array, "..."]]:
    """`factors @ parts`, without the zeros."""

    def combined(row: np.ndarray) -> Shaped[Array, "..."]:
        used = compress(zip(row, parts, strict=True), row)
        return reduce(jnp.add, (p if f == 1 else f * p for f, p in used))

    return [combined(row) for row in factors]


def forward(x: Images, kernel: Kernel, padding: Pads) -> tuple[Output, tuple[Images, Kernel]]:
    """Output, and what the gradient needs."""
    return convolve_by_tiles(x, kernel, padding), (x, kernel)


def backward(padding: Pads, saved: tuple[Images, Kernel], g: Output) -> tuple[Images, Kernel]:
    """Gradients: by the input, the tiled convolution with the flipped kernel; by the kernel."""
    x, kernel = saved
    (top, bottom), (left, right) = padding
    weights = tiled_kernel(OF_KERNEL[:, ::-1], kernel)
    by_weights = lambda tiles: jnp.einsum("epo,eco->epc", tiles, weights)
    dx = filtered(g, ((2 - top, 2 - bottom), (2 - left, 2 - right)), by_weights)
    return dx, tiled_kernel_gradient(x, g, padding)


convolve_by_tiles.defvjp(forward, backward)
