"""Contact sheets of synthesized images."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, PngImagePlugin

from dfq_jax.examples import Examples
from dfq_jax.synthesis.sources.pixels import to_pixels

GAP = 2
SMALLEST_TILE = 64
MADE_BY = {"Software": "dfq_jax"}
"""Text in every PNG, by which it is known that it may be replaced."""
BEGINNING = 4096
"""Bytes of a PNG among which that text is."""


def grid_png(images: Examples, *, most: int = 64) -> bytes:
    """A PNG of up to `most` images side by side.

    Args:
      images: at least one image.
      most: how many to show, evenly spaced over the set.

    Returns:
      The bytes of the PNG; small images are enlarged by whole factors.
    """
    count = min(most, len(images))
    picks = np.linspace(0, len(images) - 1, count).round().astype(int)
    sheet = tiled(to_pixels(np.asarray(images.images)[picks], images.contract))
    picture = Image.fromarray(sheet if sheet.shape[2] == 3 else sheet[:, :, 0])
    buffer = io.BytesIO()
    about = PngImagePlugin.PngInfo()
    for key, text in MADE_BY.items():
        about.add_text(key, text)
    picture.save(buffer, format="PNG", optimize=True, pnginfo=about)
    return buffer.getvalue()


def is_our_picture(path: Path) -> bool:
    """Whether a file is a PNG that was written here."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            begin = file.read(BEGINNING)
    except OSError:
        return False
    told = (f"tEXt{key}\0{text}".encode() for key, text in MADE_BY.items())
    return begin.startswith(b"\x89PNG\r\n") and all(text in begin for text in told)


def tiled(pixels: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "rows columns c"]:
    """Images in reading order on white, about twice as many columns as rows."""
    factor = max(1, SMALLEST_TILE // pixels.shape[2])
    pixels = pixels.repeat(factor, 1).repeat(factor, 2)
    n, h, w, c = pixels.shape
    columns = min(n, max(1, round((2 * n) ** 0.5)))
    rows = -(-n // columns)
    sheet = np.full((rows * (h + GAP) - GAP, columns * (w + GAP) - GAP, c), 255, np.uint8)
    for index, picture in enumerate(pixels):
        top, left = (index // columns) * (h + GAP), (index % columns) * (w + GAP)
        sheet[top : top + h, left : left + w] = picture
    return sheet
