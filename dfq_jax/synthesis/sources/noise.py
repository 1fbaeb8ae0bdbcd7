"""Images that need no network: pink noise and dead leaves."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dfq_jax.synthesis.sources.pixels import Images, imagenet_moments, pink

DISCS = 1000
SMALLEST_SHARE = 1 / 64
LARGEST_SHARE = 1 / 2


def noise(key: Key[Array, ""], shape: tuple[int, ...]) -> Images:
    """Pink noise and dead leaves in turn, in natural units: a Recipe's `init`."""
    smooth, sharp = jax.random.split(key)
    half = (-(-shape[0] // 2), *shape[1:])
    return in_turn(pink(smooth, half), dead_leaves(sharp, half), shape[0])


@partial(jax.jit, static_argnames="count")
def in_turn(
    first: Float[Array, "half h w c"], second: Float[Array, "half h w c"], count: int
) -> Images:
    """So many images of two kinds, one of each after the other."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])[:count]


def dead_leaves(key: Key[Array, ""], shape: tuple[int, ...], *, discs: int = DISCS) -> Images:
    """Discs of random colours that fall on one another, as leaves do: edges at all scales.

    Args:
      key: randomness.
      shape: (images, height, width, channels).
      discs: how many fall; the last ones lie on top.

    Returns:
      Images in natural units. Radii r have the density 1 / r^3 between 1/64 and 1/2 of the longer
      side (at least 1 pixel), so that the picture looks alike at every scale; colours are uniform
      over all pixel values.

    Reference:
      Lee, Mumford & Huang 2001, "Occlusion Models for Natural Images"; as images to learn from
      Baradad et al. 2021, "Learning to See by Looking at Noise".
    """
    b, h, w, c = shape
    ground_key, place_key, size_key, colour_key = jax.random.split(key, 4)
    radii = disc_radii(size_key, (discs, b), max(h, w))
    ground, centres, colours = drawn(ground_key, place_key, colour_key, shape, discs)
    pixels = fallen(ground, centres, radii, colours)
    mean, std = imagenet_moments(c)
    return (pixels - mean) / std


@partial(jax.jit, static_argnames=("shape", "discs"))
def drawn(
    ground_key: Key[Array, ""],
    place_key: Key[Array, ""],
    colour_key: Key[Array, ""],
    shape: tuple[int, ...],
    discs: int,
) -> tuple[Images, Float[Array, "discs 2 b"], Float[Array, "discs b c"]]:
    """The ground that discs fall on, their centres in pixels, and their colours."""
    b, h, w, c = shape
    ground = jnp.broadcast_to(jax.random.uniform(ground_key, (b, 1, 1, c)), shape)
    centres = jax.random.uniform(place_key, (discs, 2, b)) * jnp.array([[h], [w]], jnp.float32)
    return ground, centres, jax.random.uniform(colour_key, (discs, b, c))


@jax.jit
def fallen(
    ground: Images,
    centres: Float[Array, "discs 2 b"],
    radii: Float[Array, "discs b"],
    colours: Float[Array, "discs b c"],
) -> Images:
    """The picture once all discs lie on the ground.

    A program of its own: fused with what places the discs it would round edges otherwise.
    """
    _, h, w, _ = ground.shape

    def fall(image: Images, disc):
        centre, radius, colour = disc
        covered = squared_distances(centre, h, w) < radius[:, None, None] ** 2
        return jnp.where(covered[..., None], colour[:, None, None], image), None

    return jax.lax.scan(fall, ground, (centres, radii, colours))[0]


def squared_distances(
    centres: Float[Array, "2 b"], height: int, width: int
) -> Float[Array, "b height width"]:
    """Of the middles of all pixels from a point (y, x) of each image."""
    y, x = centres
    rows, columns = (jnp.arange(n, dtype=jnp.float32) + 0.5 for n in (height, width))
    return (rows[:, None] - y[:, None, None]) ** 2 + (columns - x[:, None, None]) ** 2


def disc_radii(
    key: Key[Array, ""],
    shape: tuple[int, ...],
    side: int,
    *,
    smallest: float = SMALLEST_SHARE,
    largest: float = LARGEST_SHARE,
) -> Float[Array, "..."]:
    """Radii in pixels with density 1 / r^3, by inversion of its distribution function.

    Args:
      key: randomness.
      shape: of what is drawn.
      side: the longer one of the image, in pixels.
      smallest: radius as a share of it; at least 1 pixel.
      largest: radius as a share of it.
    """
    least = max(1.0, side * smallest)
    most = max(least, side * largest)
    share = jax.random.uniform(key, shape)
    return (least**-2 - share * (least**-2 - most**-2)) ** -0.5
