"""How much the images of a finished batch differ, and when that is too little to be of use.

Only pixels are judged. What a network makes of its images says nothing here: methods that match
every image to the same statistics make features alike on purpose, a network may know one class
only, and a batch of one class is no failure.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.synthesis.sources.pixels import Images, clip_to_pixels, to_natural
from dfq_jax.types import InputContract

ALIKE = 0.99
"""Similarity above which a batch tells no more than one of its images: what differs has less than
a tenth of the contrast."""
BLANK = 1e-3
"""Contrast below which an image shows nothing, in deviations of natural images: a seventeenth of
the smallest step that 8 bits tell apart."""
FEWEST_PIXELS = 16
"""Smaller images are not judged: statistics leave them no freedom to differ."""


class Variety(NamedTuple):
    """What tells a useful batch from one that is not.

    Attributes:
      similarity: 1 where all images are equal, about 0 where they have nothing in common.
      contrast: of the image that has most.
    """

    similarity: Float[Array, ""]
    contrast: Float[Array, ""]


def similarity(images: Images) -> Float[Array, ""]:
    """How alike images are: 1 less the variance between them in units of that within them.

    For images of mean 0 and equal length it is the mean cosine of all pairs,
    `(|sum of unit vectors|^2 - b) / (b (b - 1))`. Differences in brightness or contrast make it
    less; an image alone resembles none, and blank images all do if they are equal.
    """
    b = images.shape[0]
    if b == 1:
        return jnp.zeros(())
    between = jnp.mean(jnp.sum((images - jnp.mean(images, 0)) ** 2, 0)) / (b - 1)
    within = jnp.mean(jnp.var(images, (1, 2)))
    return 1 - between / jnp.maximum(within, BLANK**2)


def contrast(images: Images) -> Float[Array, ""]:
    """Largest deviation over positions that any image has in any channel."""
    return jnp.max(jnp.std(images, (1, 2)))


@partial(jax.jit, static_argnames="contract")
def variety(images: Images, contract: InputContract) -> Variety:
    """Measures finished images; contrast is that of the pixels a camera could deliver.

    Args:
      images: normalised.
      contract: by what.

    Returns:
      Both measures. NaN where pixels are NaN.
    """
    natural = to_natural(images, contract)
    return Variety(similarity(natural), contrast(clip_to_pixels(natural, contract)))


def fault_of(images: Images, contract: InputContract) -> str | None:
    """What is wrong with a finished batch, in words that follow "batch 3"; None if nothing is.

    Args:
      images: normalised.
      contract: by what.

    Returns:
      That it is blank (all images constant, or beyond one end of the range of pixels), that it
      collapsed (all images practically equal), or None.
    """
    if images.shape[1] * images.shape[2] < FEWEST_PIXELS:
        return None
    alike, most = (float(v) for v in variety(images, contract))
    if not most > BLANK:
        return f"came out blank (contrast {most:.2g})"
    if not alike <= ALIKE:
        return f"collapsed (similarity {alike:.3f})"
    return None
