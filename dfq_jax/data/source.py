"""What an image set is to evaluation: a length, class names, and a read by index."""

import dataclasses
import io
from collections.abc import Callable

import PIL.Image

from dfq_jax.errors import DataError, UnsafeInputError

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Decoders that a picture may reach; Pillow has many more, some of which start other programs."""
MOST_PIXELS = 1 << 26
"""Of a picture: what is larger is not decoded."""


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Labelled images, addressable by index, in an order that never changes.

    Attributes:
      name: where the images come from, as the user wrote it.
      classes: class names; a label is an index into them.
      size: number of examples.
      read: `read(i) -> (image, label)` for 0 <= i < size; called from several threads at once.
      kind: the word messages use: folder, archive, dataset.
    """

    name: str
    classes: tuple[str, ...]
    size: int
    read: Callable[[int], tuple[PIL.Image.Image, int]] = dataclasses.field(repr=False)
    kind: str = "dataset"

    def __len__(self) -> int:
        """Number of examples."""
        return self.size

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        """The decoded image and its label; negative indices count from the end.

        Raises:
          IndexError: if there is no such example.
          DataError: if the example cannot be read or decoded; the message names the file.
        """
        if not -self.size <= index < self.size:
            raise IndexError(f"{self.name} has {self.size} examples, asked for number {index}.")
        return self.read(index % self.size)


def decode(data: bytes, where: str) -> PIL.Image.Image:
    """Decodes an encoded image completely, with Pillow.

    One decoder for every kind of source: JPEG decoders differ by a grey level here and there, and
    accuracies with them.

    Args:
      data: the bytes of a file in one of `FORMATS`, whatever its name ends in.
      where: what to call it in messages.

    Returns:
      The image with its pixels in memory, in the mode the file has; its `filename` is `where`.

    Raises:
      DataError: if the bytes are damaged or no such image.
      UnsafeInputError: if the image has more than 64 million pixels.
    """
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        check_pixels(image.size, where)
        image.load()
        image.filename = where
    except UnsafeInputError:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise UnsafeInputError(f"refused to decode {where}: {error}") from error
    except Exception as error:  # damaged input makes decoders raise nearly anything
        raise DataError(
            f"cannot decode {where} as an image ({len(data)} bytes): "
            f"{type(error).__name__}: {error}. Replace or remove the file; "
            f"{', '.join(FORMATS)} are read."
        ) from error
    return image


def check_pixels(size: tuple[int, int], where: str) -> None:
    """Refuses a picture that is too large to decode.

    Raises:
      UnsafeInputError: with its size.
    """
    width, height = size
    if width * height > MOST_PIXELS:
        raise UnsafeInputError(
            f"refused to decode {where}: {height}x{width} (height x width) is more than "
            f"{MOST_PIXELS:,} pixels. Make it smaller, or remove it."
        )
