"""From a decoded picture to the array a network reads."""

import numpy as np
import PIL.Image
from jaxtyping import Float32

from dfq_jax.errors import DataError, UnsafeInputError, UsageError
from dfq_jax.types import InputContract

FILTERS = {
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
}
COLOUR_MODES = {1: "L", 3: "RGB"}
MAX_PIXELS = 1 << 27
ROWS = 64
"""Of a picture of 16 bits, that are rounded at once."""


def preprocess(
    image: PIL.Image.Image, contract: InputContract
) -> Float32[np.ndarray, "height width chan"]:
    """Converts, resizes, crops and normalises one image as `contract` asks.

    Geometry follows torchvision on PIL images: the short side becomes `contract.resize` with an
    antialiasing filter, the long side is truncated to whole pixels, and the crop is centred. With
    `resize=None` an image of another size is resized to (height, width), aspect ratio ignored;
    nothing is cropped. An image that already has its target size is never resampled.

    Args:
      image: any PIL image of 8-bit colour, grey, palette, CMYK or 16-bit grey values. Transparency
        is dropped, not blended; an EXIF rotation is not applied.
      contract: size, resizing, mean and std. One channel reads luma, three read RGB.

    Returns:
      `(pixel / 255 - mean) / std`, float32, shape (height, width, channels).

    Raises:
      DataError: if the colour mode has no 8-bit meaning (float pixels, values beyond
        16 bits, premultiplied grey).
      UnsafeInputError: if the image is so elongated that resizing it would exhaust memory.
      UsageError: if the contract wants neither 1 nor 3 channels, or a crop larger than the resized
        image.
    """
    pixels = np.asarray(fit(to_colour(image, contract.channels), contract), np.float32)
    pixels = pixels.reshape(contract.shape)
    mean, std = np.asarray(contract.mean, np.float32), np.asarray(contract.std, np.float32)
    return (pixels / np.float32(255) - mean) / std


def to_colour(image: PIL.Image.Image, channels: int) -> PIL.Image.Image:
    """The image as 8-bit RGB (3 channels) or luma (1 channel).

    Args:
      image: any PIL image; 16-bit grey is divided by 257 and rounded, so 65535 becomes 255.
      channels: 1 or 3.

    Returns:
      The same object when it already has that mode.

    Raises:
      DataError: if the pixels have no 8-bit meaning.
      UsageError: if `channels` is neither 1 nor 3.
    """
    if channels not in COLOUR_MODES:
        raise UsageError(
            f"preprocess() got a contract with {channels} channels; images have 1 (grey) or 3 "
            f"(RGB). Give the contract one mean and one std per channel."
        )
    mode = COLOUR_MODES[channels]
    if image.mode == mode:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = sixteen_to_eight(image)
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode == "F":
        raise DataError("preprocess() got float pixels (mode F) of unknown range; save as 8-bit.")
    try:
        return image.convert(mode)
    except ValueError as error:
        raise DataError(
            f"preprocess() cannot turn mode {image.mode} into {mode}; save the image as RGB."
        ) from error


def sixteen_to_eight(image: PIL.Image.Image) -> PIL.Image.Image:
    """Grey values 0..65535 as mode L, rounded to nearest.

    Older Pillow opens a 16-bit PNG as 32-bit mode I, so both arrive here.

    Raises:
      DataError: if a value lies outside 0..65535.
    """
    wide = np.asarray(image)
    least, most = int(wide.min()), int(wide.max())
    if least < 0 or most > 65535:
        raise DataError(
            f"preprocess() got {image.mode} pixels from {least} to {most}, expected 0..65535; save "
            "the image with 8 or 16 bits."
        )
    grey = np.empty(wide.shape, np.uint8)
    for start in range(0, len(wide), ROWS):  # what is computed takes four times the image
        rows = wide[start : start + ROWS].astype(np.uint32)
        grey[start : start + ROWS] = (rows + 128) // 257
    return PIL.Image.fromarray(grey)


def fit(image: PIL.Image.Image, contract: InputContract) -> PIL.Image.Image:
    """Brings an image to (contract.height, contract.width).

    Args:
      image: mode L or RGB.
      contract: the target size and how to reach it.

    Raises:
      UnsafeInputError: if the resized image would have more than 2^27 pixels.
      UsageError: if `contract.resize` leaves the image smaller than the crop.
    """
    width, height = image.size
    want = (contract.width, contract.height)
    if contract.resize is None:
        return resized(image, want, contract.interpolation)
    short = contract.resize
    if width <= height:
        size = (short, int(short * height / width))
    else:
        size = (int(short * width / height), short)
    if size[0] < want[0] or size[1] < want[1]:
        raise UsageError(
            f"preprocess() cannot crop {want[1]}x{want[0]} (height x width) out of "
            f"{size[1]}x{size[0]}: the contract resizes the short side to {short}. "
            f"Set resize to at least {max(want)}, or to None."
        )
    if size[0] * size[1] > MAX_PIXELS:
        raise UnsafeInputError(
            f"refused to resize {height}x{width} (height x width) to {size[1]}x{size[0]}: more "
            f"than {MAX_PIXELS} pixels. Crop or remove the image."
        )
    image = resized(image, size, contract.interpolation)
    left, top = (round((have - need) / 2) for have, need in zip(size, want, strict=True))
    return image.crop((left, top, left + want[0], top + want[1]))


def resized(image: PIL.Image.Image, size: tuple[int, int], interpolation: str) -> PIL.Image.Image:
    """The image at `size` (width, height in pixels); untouched when it has that size."""
    return image if image.size == size else image.resize(size, FILTERS[interpolation])
