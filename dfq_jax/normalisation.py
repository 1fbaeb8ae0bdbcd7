"""How pixels become what networks read: `(pixel / 255 - mean) / std`, by which numbers."""

import math
from collections.abc import Iterable

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_GREY = (0.449, 0.226)
"""Mean and deviation of its grey values."""
LEAST_STD = 1e-6
"""Smaller deviations make numbers of pixels that float32 cannot work with."""


def imagenet_like(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the images of ImageNet per channel; of grey values if not 3."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (IMAGENET_GREY[0],) * channels, (IMAGENET_GREY[1],) * channels


def unusable(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    """Why no images are normalised with these numbers, and which were meant; empty if some are.

    Args:
      mean: per channel.
      std: per channel.
    """
    given = f"mean {listed(mean)} and std {listed(std)}"
    if not all(map(math.isfinite, (*mean, *std))):
        return f"{given} are not all finite numbers."
    if min(std) <= 0:
        return f"{given}: images are divided by a positive std."
    if min(mean) >= 0 and max(*mean, *std) <= 1:
        small = min(std) < LEAST_STD
        return f"{given}: a std below {LEAST_STD:g} leaves no usable numbers." if small else ""
    wrong = f"{given} are not those of pixels in [0, 1]: images are (pixel / 255 - mean) / std"
    if min(mean) < 0 or max(*mean, *std) > 255:
        return f"{wrong}."
    spread = tuple(s / 255 for s in std) if max(std) >= 1 else std
    meant = f"mean {listed(v / 255 for v in mean)} and std {listed(spread)}"
    return f"{wrong}. For pixels of 0..255 they are divided by 255: {meant}."


def listed(values: Iterable[float]) -> str:
    """Numbers as `--mean` takes them."""
    return ",".join(f"{v:.6g}" for v in values)
