"""Images that are the blurred middle of larger canvases, shown a random window at a time.

Dikstein et al. 2025, "Data Generation for Hardware-Friendly Post-Training Quantization".
"""

import jax
from jaxtyping import Array, Key

from dfq_jax.synthesis.recipe import Source
from dfq_jax.synthesis.sources.augment import Sized, blur, centre_crop, random_crop
from dfq_jax.synthesis.sources.pixels import Images, gaussian
from dfq_jax.values import bound


def canvas(margin: int, sigma: float) -> Source:
    """Gaussian noise beyond the edges of the images, which are its blurred middle."""
    return Source(bound(larger_noise, margin), finish=bound(smooth_middle, margin, sigma))


def larger_noise(margin: int, key: Key[Array, ""], shape: tuple[int, ...]) -> Sized:
    """Gaussian noise, so much higher and wider than asked for."""
    b, h, w, c = shape
    return gaussian(key, (b, h + margin, w + margin, c))


def smooth_middle(margin: int, sigma: float, images: Images) -> Sized:
    """What is within the margin of blurred images."""
    smooth = blur(sigma)(jax.random.key(0), images)
    return centre_crop(smooth, *inside(images, margin))


def crop_at_random(margin: int, key: Key[Array, ""], images: Images) -> Sized:
    """A window smaller by `margin` at a random place, the same for the whole batch."""
    return random_crop(*inside(images, margin))(key, images)


def inside(canvases: Images, margin: int) -> tuple[int, int]:
    """Height and width of what is within a margin in all."""
    return canvases.shape[1] - margin, canvases.shape[2] - margin
