"""Images without their highest frequencies, which synthesis makes and cameras do not."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dfq_jax.synthesis.sources.pixels import Images
from dfq_jax.values import Bound, bound


def low_pass(*, radius: float) -> Bound[Images]:
    """Frequencies fade by `exp(-D^2 / 2 D0^2)`, D their distance from none.

    Args:
      radius: D0 as a share of the image's side, in whole waves of the side: SynQ's 80 at 224
        pixels is 80 / 224, and filters small images as much.

    Returns:
      The augmentation, without randomness.

    Reference:
      Kim et al. 2025, "SynQ: Accurate Zero-shot Quantization by Synthesis-aware Fine-tuning".
    """
    return bound(smoothed, radius)


def smoothed(radius: float, key: Key[Array, ""], images: Images) -> Images:
    """What `low_pass` does."""
    del key
    height, width = images.shape[1:3]
    down, across = np.fft.fftfreq(height) * height, np.fft.rfftfreq(width) * width
    distance = np.hypot(down[:, None] / (radius * height), across[None] / (radius * width))
    kept = np.exp(-(distance**2) / 2).astype(np.complex64)[None, :, :, None]
    spectrum = jnp.fft.rfft2(images, axes=(1, 2))
    return jnp.fft.irfft2(spectrum * kept, (height, width), axes=(1, 2))
