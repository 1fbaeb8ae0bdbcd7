"""What becomes of images before the network sees them: flips, shifts, crops, windows, blur.

Every augmentation is a pure function of a key and images in natural units, with static output
sizes; gradients flow through all of them. `compose` makes one of several.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from dfq_jax.synthesis.sources.pixels import Images
from dfq_jax.values import Bound, bound

Augment = Callable[[Key[Array, ""], Images], Images]
"""(key, images) -> what the network is shown, drawn anew at every step."""
Sized = Float[Array, "b height width c"]
"""Images of a size of their own."""


def unchanged(key: Key[Array, ""], images: Images) -> Images:
    """No augmentation."""
    del key
    return images


def compose(*augments: Augment) -> Bound[Sized]:
    """One augmentation after the other, each with randomness of its own."""
    return bound(composed, augments)


def composed(augments: tuple[Augment, ...], key: Key[Array, ""], images: Images) -> Sized:
    """What `compose` does."""
    for index, each in enumerate(augments):
        images = each(jax.random.fold_in(key, index), images)
    return images


def flip(*, chance: float = 0.5, together: bool = True) -> Bound[Images]:
    """Mirrors left and right, the whole batch with one coin or each image with its own."""
    return bound(flipped, chance=chance, together=together)


def flipped(key: Key[Array, ""], images: Images, *, chance: float, together: bool) -> Images:
    """What `flip` does."""
    shape = (1 if together else images.shape[0], 1, 1, 1)
    return jnp.where(jax.random.bernoulli(key, chance, shape), images[:, :, ::-1], images)


def jitter(reach: int, *, same: bool = False) -> Bound[Images]:
    """Rolls the whole batch by up to `reach` pixels along each axis, or by the `same` along both.

    Reference:
      Yin et al. 2020, "Dreaming to Distill", released code; `same` as in PSAQ-ViT's.
    """
    return bound(rolled, reach=reach, same=same)


def rolled(key: Key[Array, ""], images: Images, *, reach: int, same: bool) -> Images:
    """What `jitter` does."""
    down, right = jax.random.randint(key, (2,), -reach, reach + 1)
    return jnp.roll(jnp.roll(images, down, axis=1), down if same else right, axis=2)


def random_crop(height: int, width: int) -> Bound[Sized]:
    """A window at a random place, the same for the whole batch."""
    return bound(cropped, height=height, width=width)


def cropped(key: Key[Array, ""], images: Images, *, height: int, width: int) -> Sized:
    """What `random_crop` does."""
    b, h, w, c = images.shape
    room = jnp.array([h - height + 1, w - width + 1])
    top, left = jax.random.randint(key, (2,), 0, room)
    return lax.dynamic_slice(images, (0, top, left, 0), (b, height, width, c))


def centre_crop(images: Images, height: int, width: int) -> Sized:
    """The window in the middle."""
    top, left = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
    return images[:, top : top + height, left : left + width]


def resized_crop(
    *, smallest: float, ratios: tuple[float, float] = (3 / 4, 4 / 3), attempts: int = 10
) -> Bound[Images]:
    """Of each image a random window, resized to the whole by bilinear interpolation.

    Args:
      smallest: least share of the area, in (0, 1]; uniform up to 1.
      ratios: range of width to height, log-uniform.
      attempts: a window that does not fit is drawn again so often, and is then the whole image, as
        torchvision's `RandomResizedCrop` has it; 0 cuts off what does not fit (ours).

    Returns:
      The augmentation.

    Reference:
      Zhong et al. 2022, "IntraQ" (local object reinforcement).
    """
    return bound(windowed, smallest=smallest, ratios=ratios, attempts=attempts)


def windowed(
    key: Key[Array, ""],
    images: Images,
    *,
    smallest: float,
    ratios: tuple[float, float],
    attempts: int,
) -> Images:
    """What `resized_crop` does."""
    windows = random_windows(key, images.shape[0], smallest, ratios, attempts)
    return jax.vmap(resized_window)(images, windows)


def random_windows(
    key: Key[Array, ""], count: int, smallest: float, ratios: tuple[float, float], attempts: int
) -> Float[Array, "b 4"]:
    """Windows (top, left, height, width) as shares of the image."""
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    drawn = (max(attempts, 1), count)
    area = jax.random.uniform(area_key, drawn, minval=smallest, maxval=1.0)
    low, high = np.log(ratios)
    ratio = jnp.exp(jax.random.uniform(ratio_key, drawn, minval=low, maxval=high))
    sizes = jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)], axis=2)
    fits = jnp.all(sizes <= 1, axis=2)
    first = jnp.argmax(fits, axis=0)
    size = jnp.minimum(sizes[first, jnp.arange(count)], 1.0)
    if attempts:
        size = jnp.where(jnp.any(fits, axis=0)[:, None], size, 1.0)
    corner = jax.random.uniform(place_key, (count, 2)) * (1 - size)
    return jnp.concatenate([corner, size], axis=1)


def resized_window(
    image: Float[Array, "h w c"], window: Float[Array, "4"]
) -> Float[Array, "h w c"]:
    """A window (top, left, height, width as shares) resized to the whole, bilinearly."""
    h, w, _ = image.shape
    corner, size = window[:2] * jnp.array([h, w], jnp.float32), window[2:]
    return jax.image.scale_and_translate(
        image, image.shape, (0, 1), 1 / size, -corner / size, method="linear", antialias=False
    )


def cutmix(*, chance: float = 0.5) -> Bound[Images]:
    """Some images get a window of the image before them, at its own place.

    The window's share of the area is uniform in [0, 1], its shape that of the image, its centre
    uniform; what lies outside is cut off. Labels stay as they are: for teachers, which look at what
    the student is shown.

    Args:
      chance: of each image.

    Reference:
      Yun et al. 2019, "CutMix", section 3.1 (lambda ~ U(0, 1)).
    """
    return bound(pasted, chance=chance)


def pasted(key: Key[Array, ""], images: Images, *, chance: float) -> Images:
    """What `cutmix` does."""
    coin_key, area_key, place_key = jax.random.split(key, 3)
    count, height, width, _ = images.shape
    half = jnp.sqrt(jax.random.uniform(area_key, (count, 1))) / 2
    half = jnp.where(jax.random.bernoulli(coin_key, chance, (count, 1)), half, -1.0)
    centres = jax.random.uniform(place_key, (2, count, 1))
    down, right = (((np.arange(n) + 0.5) / n).astype(np.float32) for n in (height, width))
    inside = [
        jnp.abs(at - centre) < half for at, centre in zip((down, right), centres, strict=True)
    ]
    window = inside[0][:, :, None, None] & inside[1][:, None, :, None]
    return jnp.where(window, jnp.roll(images, 1, axis=0), images)


def blur(sigma: float, *, window: int = 3) -> Bound[Images]:
    """Convolves with a Gaussian; beyond the edge is zero.

    Reference:
      Dikstein et al. 2025, "Data Generation for Hardware-Friendly Post-Training Quantization".
    """
    return bound(blurred, sigma=sigma, window=window)


def blurred(key: Key[Array, ""], images: Images, *, sigma: float, window: int) -> Images:
    """What `blur` does."""
    del key
    offsets = np.arange(window) - (window - 1) / 2
    line = np.exp(-(offsets**2) / (2 * sigma**2))
    line, pad = (line / line.sum()).astype(np.float32), window // 2
    for axis in (1, 2):
        around = [(0, 0)] * 4
        around[axis] = (pad, pad)
        padded, length = jnp.pad(images, around), images.shape[axis]
        slices = [lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(window)]
        images = sum((s * weight for s, weight in zip(slices, line, strict=True)), 0 * images)
    return images


def halve(key: Key[Array, ""], images: Images) -> Sized:
    """Averages of 2x2 pixels; an odd last row or column is left out."""
    del key
    b, h, w, c = images.shape
    even = images[:, : h // 2 * 2, : w // 2 * 2]
    return even.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def at_random(augment: Augment, chance: float) -> Bound[Images]:
    """An augmentation that happens with a chance, one coin for the whole batch."""
    return bound(maybe, augment=augment, chance=chance)


def maybe(key: Key[Array, ""], images: Images, *, augment: Augment, chance: float) -> Images:
    """What `at_random` does."""
    coin_key, own_key = jax.random.split(key)
    coin = jax.random.bernoulli(coin_key, chance)
    return lax.cond(coin, partial(augment, own_key), lambda images: images, images)
