"""Second moments of what a layer reads in two networks, by group of its channels.

A convolution is a linear layer over unfolded windows; every group is a layer of its own.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped

from dfq_jax.errors import PlanError
from dfq_jax.graph.ops import Conv2d, ConvTranspose2d, Linear
from dfq_jax.graph.phases import shifts
from dfq_jax.graph.volume_ops import Conv3d
from dfq_jax.numerics.affine import Affine, Grid, fake_quantize

ExactAndRough = tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]
WindowLayer = Conv2d | ConvTranspose2d | Conv3d | Linear
"""Layers as sums over windows."""
MOST_VALUES = 2**25
"""Numbers that unfolded windows may take at a time."""


class Grams(NamedTuple):
    """First and second moments of what a layer reads, by group.

    Attributes:
      gram: of its quantized inputs with themselves.
      cross: of its quantized inputs with the exact ones.
      mean: of its quantized inputs.
      wanted: mean of the exact ones.
    """

    gram: Float[Array, "g k k"]
    cross: Float[Array, "g k k"]
    mean: Float[Array, "g k"]
    wanted: Float[Array, "g k"]

    def shrunk(self, share: float | Float[Array, ""]) -> "Grams":
        """As if so many samples of white noise of equal power, unharmed, had been seen for each.

        With fewer samples than inputs, weights could otherwise do as they like in all directions
        but those few (`share` is the number of inputs for each sample).
        """
        inputs = self.gram.shape[-1]
        power = jnp.trace(self.gram, axis1=1, axis2=2) / inputs
        noise = share * power[:, None, None] * jnp.eye(inputs, dtype=self.gram.dtype)
        return self._replace(gram=self.gram + noise, cross=self.cross + noise)

    def centred(self) -> "Grams":
        """Second moments about the means: what is left for kernels where a bias does the rest."""
        outer = lambda a, b: a[:, :, None] * b[:, None, :]
        gram = self.gram - outer(self.mean, self.mean)
        return self._replace(gram=gram, cross=self.cross - outer(self.mean, self.wanted))


def moments_of(
    op: WindowLayer,
    kernel: tuple[int, ...],
    read: Iterable[ExactAndRough],
    inputs: tuple[Affine, Grid] | None,
) -> tuple[Grams, Float[Array, ""]]:
    """Second moments over all images and positions, a few images at a time; and their number."""
    affine, grid = (None, None) if inputs is None else inputs
    window, total = unfolding(op, kernel), None
    for rough, exact in read:
        size = images_at_a_time(rough, window)
        for x, y in zip(pieces(rough, size), pieces(exact, size), strict=True):
            part = second_moments(jax.device_put(x), jax.device_put(y), affine, op, kernel, grid)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
    if total is None:
        raise PlanError("moments_of() needs at least one image.")
    sums, count = total
    return jax.tree.map(lambda v: v / count, sums), count


def unfolding(op: WindowLayer, kernel: tuple[int, ...]) -> int:
    """How many times as many numbers as a layer reads its unfolded windows have, at the most."""
    between = prod(op.strides) if isinstance(op, ConvTranspose2d) else 1
    return prod(kernel[:-2]) * between


def images_at_a_time(data: Float[np.ndarray, "n ..."], window: int) -> int:
    """As many images as fit when each position is unfolded into a window."""
    return max(MOST_VALUES // (data[0].size * window), 1)


@partial(jax.jit, static_argnames=("op", "kernel", "grid"))
def second_moments(
    rough: Float[Array, "n ..."],
    exact: Float[Array, "n ..."],
    affine: Affine | None,
    op: WindowLayer,
    kernel: tuple[int, ...],
    grid: Grid | None,
) -> tuple[Grams, Float[Array, ""]]:
    """Sums of products of unfolded inputs, and over how many positions."""
    if affine is not None and grid is not None:
        rough = fake_quantize(rough, affine, grid)
    rows, wanted = (unfolded(v, op, kernel) for v in (rough, exact))
    product = lambda a, b: jnp.einsum("rgk,rgl->gkl", a, b, precision="highest")
    sums = Grams(product(rows, rows), product(rows, wanted), jnp.sum(rows, 0), jnp.sum(wanted, 0))
    return sums, jnp.float32(rows.shape[0])


def unfolded(
    x: Float[Array, "n ..."], op: WindowLayer, kernel: tuple[int, ...]
) -> Float[Array, "rows g k"]:
    """What each output position reads, by group, in the order of the kernel's entries."""
    if isinstance(op, Linear):
        return x.reshape(-1, 1, x.shape[-1])
    if isinstance(op, ConvTranspose2d):
        entries = jnp.stack(list(painted(x, op, kernel[:-2])))
    else:
        padded = jnp.pad(x, ((0, 0), *op.padding, (0, 0)))
        entries = jnp.stack(list(shifts(padded, op, kernel[:-2]).values()))
    split = entries.reshape(entries.shape[0], -1, op.groups, kernel[-2])
    return jnp.moveaxis(split, 0, 2).reshape(split.shape[1], op.groups, -1)


def painted(
    x: Float[Array, "n h w c"], op: ConvTranspose2d, window: tuple[int, ...]
) -> Iterator[Float[Array, "n oh ow c"]]:
    """For each entry of a transposed kernel the pixels it is applied to, zero where there is none.

    It is a convolution, its kernel turned round, of pixels with zeros between them.
    """
    reach = tuple(d * (k - 1) for d, k in zip(op.dilation, window, strict=True))
    edges = zip(reach, op.padding, op.extra, op.strides, strict=True)
    spaces = [(r - low, r - high + extra, s - 1) for r, (low, high), extra, s in edges]
    apart = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *spaces, (0, 0, 0)))
    yield from reversed(shifts(apart, Conv2d(dilation=op.dilation), window).values())


def pieces(data: Shaped[np.ndarray, "..."], size: int) -> Iterator[Shaped[np.ndarray, "..."]]:
    """Consecutive batches of what passes through a network."""
    for start in range(0, len(data), size):
        yield data[start : start + size]
