"""Images with the surfaces and edges of photographs, cut from images that have neither.

Images that match the statistics of batch norms have texture everywhere. In a photograph most
surfaces are smooth and bounded by edges: what the first layers of a network make of it is mostly
near zero and at times large (kurtosis 16 behind the second expansion of MobileNetV2; 6 of images
made for it). Rounding learned on texture does not fit such values. Here discs fall on an image as
in dead leaves, each a colour with more or less of the texture of an image made for the network.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from dfq_jax.synthesis.sources.noise import disc_radii, squared_distances
from dfq_jax.synthesis.sources.pixels import Images, imagenet_moments, pink
from dfq_jax.values import Bound, bound

DISCS = 25
SMALLEST, LARGEST = 1 / 12, 0.6
"""Radii of discs as shares of the longer side."""
GREY, TINT = 2.0, 0.7
"""Largest deviation of a disc's colour from grey's mean, common to channels and of each."""
SMOOTH = 0.4
"""Share of the discs that are smooth."""
FAINT, STRONG = 0.03, 1.2
"""Texture of smooth discs, and most of others, in units of the image's own."""


def collage(*, discs: int = DISCS) -> Bound[Images]:
    """Discs on each image of a batch: coloured, with texture of the image itself or another.

    Args:
      discs: how many fall on an image; the last ones lie on top.

    Returns:
      The augmentation of images in natural units; what it makes are pixels a camera can deliver.
      Radii have the density 1 / r^3, as in `noise.dead_leaves`, edges are one pixel wide.

    Reference:
      Lee, Mumford & Huang 2001, "Occlusion Models for Natural Images" (the discs).
    """
    return bound(covered_by_discs, discs=discs)


def covered_by_discs(key: Key[Array, ""], images: Images, *, discs: int) -> Images:
    """What `collage` does."""
    count, height, width, channels = images.shape
    other_key, *keys = jax.random.split(key, 8)
    centred = images - jnp.mean(images, (1, 2), keepdims=True)
    other = centred[jax.random.permutation(other_key, count)]
    falling = drawn(keys, (discs, count), height, width, channels)

    def fall(below: Images, disc) -> tuple[Images, None]:
        centre, radius, colour, strength, own = disc
        distance = jnp.sqrt(squared_distances(centre, height, width))
        covered = jnp.clip(radius[:, None, None] - distance + 0.5, 0, 1)[..., None]
        texture = jnp.where(own[:, None, None, None], centred, other)
        surface = colour[:, None, None] + strength[:, None, None, None] * texture
        return below + covered * (surface - below), None

    mean, std = imagenet_moments(channels)
    pixels, _ = jax.lax.scan(fall, images, falling)
    return jnp.clip(pixels, -mean / std, (1 - mean) / std)


def scenes(key: Key[Array, ""], shape: tuple[int, ...]) -> Images:
    """Pink noise, and collages of pink noise, in turn, in natural units: a Recipe's `init`.

    Both have the spectrum of photographs, collages their surfaces and edges too. Edges are as
    strong as those of photographs; leaves of all colours (`noise.dead_leaves`) have far stronger
    ones, and make ranges several times as wide.
    """
    smooth, falling = jax.random.split(key)
    noise = pink(smooth, shape)
    covered = collage()(falling, noise)
    second = jnp.arange(shape[0])[:, None, None, None] % 2 == 1
    return jnp.where(second, covered, noise)


def drawn(
    keys: Sequence[Array], shape: tuple[int, int], height: int, width: int, channels: int
) -> tuple[Array, ...]:
    """Centres, radii, colours and textures of discs, and whether texture is the image's own."""
    place, size, grey, tint, smooth, texture, own = keys
    discs, count = shape
    sides = jnp.array([[height], [width]], jnp.float32)
    centres = jax.random.uniform(place, (discs, 2, count)) * sides
    radii = disc_radii(size, shape, max(height, width), smallest=SMALLEST, largest=LARGEST)
    deviation = lambda key, of: jax.random.uniform(key, (*shape, of), minval=-1.0)
    colours = GREY * deviation(grey, 1) + TINT * deviation(tint, channels)
    faint = jax.random.bernoulli(smooth, SMOOTH, shape)
    strengths = jnp.where(faint, FAINT, STRONG * jax.random.uniform(texture, shape))
    return centres, radii, colours, strengths, jax.random.bernoulli(own, 0.5, shape)
