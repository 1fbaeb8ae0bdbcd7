"""Images as free pixels: units, initial values."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from dfq_jax.normalisation import imagenet_like
from dfq_jax.types import InputContract

Images = Float[Array, "b h w c"]


def natural_moments(contract: InputContract) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std of natural images per channel, on pixels in [0, 1].

    A prior that a contract can replace (`InputContract.natural`); else that of ImageNet.
    """
    mean, std = contract.photographs
    return np.array(mean, np.float32), np.array(std, np.float32)


def imagenet_moments(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """The same of ImageNet, for images that are drawn as pixels of no network."""
    means, stds = imagenet_like(channels)
    return np.array(means, np.float32), np.array(stds, np.float32)


def to_natural(images: Images, contract: InputContract) -> Images:
    """Network input to units in which natural images have mean 0 and std 1 per channel.

    For a network that takes ImageNet normalisation this is the identity.
    """
    mean, std = natural_moments(contract)
    scale = np.array(contract.std, np.float32) / std
    shift = (np.array(contract.mean, np.float32) - mean) / std
    return images * scale + shift


def from_natural(natural: Images, contract: InputContract) -> Images:
    """The inverse of `to_natural`."""
    mean, std = natural_moments(contract)
    scale = std / np.array(contract.std, np.float32)
    shift = (mean - np.array(contract.mean, np.float32)) / np.array(contract.std, np.float32)
    return natural * scale + shift


def nearly_black(key: Key[Array, ""], shape: tuple[int, ...]) -> Images:
    """ZeroQ's start: integers 0..254, centred and divided by 5418.75; std about 0.0136.

    Reference:
      ZeroQ, released code: 5418.75 is the variance of the uniform distribution over -128..127.
    """
    noise = jax.random.randint(key, shape, 0, 255).astype(jnp.float32)
    return (noise - 127.5) / 5418.75


def gaussian(key: Key[Array, ""], shape: tuple[int, ...]) -> Images:
    """Standard normal noise, the start in the papers' text."""
    return jax.random.normal(key, shape)


def uniform(key: Key[Array, ""], shape: tuple[int, ...]) -> Images:
    """Uniform noise in [0, 1), the start in DSG's released code."""
    return jax.random.uniform(key, shape)


def pink(key: Key[Array, ""], shape: tuple[int, ...]) -> Images:
    """Noise with the 1/f amplitude spectrum of natural images; mean 0, std 1 per channel.

    Channels share most of their variation, as the colours of a scene do.

    Reference:
      Field 1987, "Relations between the statistics of natural images and the response properties
      of cortical cells" (the spectrum).
    """
    _, h, w, _ = shape
    own, common = with_falling_spectrum(key, cycles(h), cycles(w)[: w // 2 + 1], shape)
    mixed = channels_last(own, common)
    centred = mixed - jnp.mean(mixed, (1, 2), keepdims=True)
    return in_deviations(centred, jnp.std(centred, (1, 2), keepdims=True))


def cycles(side: int) -> Float[np.ndarray, " side"]:
    """Frequencies of a discrete Fourier transform without their signs, in cycles a pixel."""
    numbers = np.arange(side)
    return np.minimum(numbers, side - numbers).astype(np.float32) * (np.float32(1) / side)


@partial(jax.jit, static_argnames="shape")
def with_falling_spectrum(
    key: Key[Array, ""],
    rows: Float[Any, " h"],
    columns: Float[Any, " half"],
    shape: tuple[int, ...],
) -> tuple[Float[Array, "b c h w"], Float[Array, "b 1 h w"]]:
    """Noise whose amplitudes fall as 1/f: a little of each channel's own, and what all share.

    Args:
      key: randomness.
      rows: vertical frequencies. Arguments, since constants are folded by other arithmetic.
      columns: horizontal ones, those of a transform of real numbers.
      shape: of the images, channels last.
    """
    b, h, w, c = shape
    falloff = 1 / jnp.maximum(jnp.hypot(rows[:, None], columns[None]), 1 / max(h, w))
    drawn = jax.random.normal(key, (b, c + 1, h, w))
    spectrum = jnp.fft.rfft2(drawn) * falloff.astype(jnp.complex64)
    noise = jnp.fft.irfft2(spectrum, (h, w)).astype(jnp.float32)
    return noise[:, :c] * 0.2, noise[:, c:]


@jax.jit
def channels_last(own: Float[Array, "b c h w"], common: Float[Array, "b 1 h w"]) -> Images:
    """Images of what channels have for themselves and of what they share."""
    return jnp.moveaxis(own + common, 1, 3)


@jax.jit
def in_deviations(centred: Images, deviation: Float[Array, "b 1 1 c"]) -> Images:
    """Images of deviation 1; black ones stay black."""
    return centred / (deviation + 1e-6)


def clip_to_pixels(natural: Images, contract: InputContract) -> Images:
    """Natural units clipped to what pixels 0..255 can be; the gradient passes unchanged."""
    mean, std = natural_moments(contract)
    clipped = jnp.clip(natural, -mean / std, (1 - mean) / std)
    return natural + jax.lax.stop_gradient(clipped - natural)


def to_pixels(
    images: Float[Any, "n h w c"], contract: InputContract
) -> UInt8[np.ndarray, "n h w c"]:
    """Network input as the 8-bit pixels a camera would deliver; what is out of range clips."""
    mean, std = np.array(contract.mean, np.float32), np.array(contract.std, np.float32)
    pixels = np.asarray(images, np.float32) * std + mean
    return np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)


def from_pixels(pixels: UInt8[np.ndarray, "n h w c"], contract: InputContract) -> Images:
    """8-bit pixels as network input."""
    mean, std = np.array(contract.mean, np.float32), np.array(contract.std, np.float32)
    return jax.device_put((pixels.astype(np.float32) / np.float32(255) - mean) / std)
