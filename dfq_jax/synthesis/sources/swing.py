"""Swing convolution: strided convolutions that look at a randomly shifted input."""

import zlib

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from dfq_jax.graph.evaluate import Hook
from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import Conv2d
from dfq_jax.graph.semantics import Slots, Tensor
from dfq_jax.values import Bound, bound


def swing(reach: int = 1) -> Bound[Hook]:
    """A recipe's `distort`: every strided convolution reads its input shifted at random.

    A convolution that skips pixels passes its gradient to the others alone, which shows in images
    as a checkerboard; shifts let every pixel have its turn. Each layer draws its own shift, for
    the whole batch. An input no larger than `reach` stays where it is: it has nothing to mirror.

    Args:
      reach: most pixels along each axis, either way.

    Returns:
      (key, graph) -> hook.

    Raises:
      ValueError: if reach < 1.

    Reference:
      Jeon et al. 2023, "GENIE: Show Me the Data for Quantization", swing convolution, as
      released.
    """
    if reach < 1:
        raise ValueError(f"swing() needs reach >= 1, got {reach}.")
    return bound(swung, reach)


def swung(reach: int, key: Key[Array, ""], graph: Graph) -> Hook:
    """What `swing` gives for one step."""
    del graph

    def hook(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        if not skips_pixels(node) or min(args[0].shape[1:3]) <= reach:
            return slots, args
        own = jax.random.fold_in(key, zlib.crc32(node.name.encode()))
        offset = jax.random.randint(own, (2,), 0, 2 * reach + 1)
        return slots, (shifted(args[0], offset, reach), *args[1:])

    return hook


def skips_pixels(node: Node) -> bool:
    """Whether a node is a convolution with a stride."""
    return isinstance(node.op, Conv2d) and node.op.strides != (1, 1)


def shifted(
    images: Float[Array, "b h w c"], offset: Int[Array, "2"], reach: int
) -> Float[Array, "b h w c"]:
    """The window at `offset` of images that were mirrored at their edges, of the same size.

    Args:
      images: larger than `reach` along both axes.
      offset: from the top and from the left, 0..2 * reach; `reach` gives the images themselves.
      reach: pixels mirrored at each edge, which itself is not repeated.

    Returns:
      Pixel (i, j) is pixel (i + offset[0] - reach, j + offset[1] - reach) of the images.
    """
    around = ((0, 0), (reach, reach), (reach, reach), (0, 0))
    mirrored = jnp.pad(images, around, mode="reflect")
    return lax.dynamic_slice(mirrored, (0, offset[0], offset[1], 0), images.shape)
