"""Images that users bring: pictures in folders or archives, arrays, sets that were made here."""

import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from dfq_jax.api.delivered import check_rows
from dfq_jax.data.accuracy import load_example as load_example
from dfq_jax.data.accuracy import pick
from dfq_jax.data.folders import is_image, open_folder, open_zip, unsorted
from dfq_jax.data.source import LabelledImages
from dfq_jax.data.sources import TFDS, open_source
from dfq_jax.errors import UsageError
from dfq_jax.examples import Examples
from dfq_jax.io.artifacts.images import Bare, holds_shards, load_bare, load_images
from dfq_jax.normalisation import listed
from dfq_jax.types import NCHW, NHWC, Input, InputContract

MOST_PICTURES = 256
"""Pictures of a larger collection that are looked at, evenly spaced."""
NEARLY_BLACK = -0.1
"""Where black pixels lie below this, images without negative values are not normalised."""
OUTSIDE = 1.05
"""How far beyond the value of a white pixel the values of normalised images go."""
DARKEST = 32
"""Below this a set of images holds no pixels of 0..255: it would be all but black."""
TO_GIVE = (
    "give a folder or a zip of pictures, an array or an .npz with `images` (n, height, width, "
    "channels), or what `dfq synthesize` made"
)

GivenImages = Examples | np.ndarray | Array | str | Path
"""What `quantize` takes for images."""


class ReadImages(NamedTuple):
    """An array of images as the library has them.

    Attributes:
      images: NHWC float32, normalised.
      told: how they were understood.
    """

    images: np.ndarray
    told: str


def image_set(
    given: GivenImages,
    read: Input,
    on_note: Callable[[str], object] = lambda _: None,
    most: int = MOST_PICTURES,
) -> Examples:
    """Images in a network's normalised input space, whatever they were given as.

    Args:
      given: `Examples`; an array of images, or of rows of what else is read; or a path: a file or
        folder of `dfq synthesize`, an `.npz` or `.npy`, a folder or zip of pictures, `tfds:NAME`.
      read: what the network reads.
      on_note: told how they were understood.
      most: pictures of a larger collection that are looked at, evenly spaced.

    Returns:
      The images. Those that nothing here made say so (`Examples.given`).

    Raises:
      UsageError: if they fit no input of this network, or nothing there holds images.
      DataError: for a file or picture that cannot be read.
      UnsafeInputError: for one that would exhaust the machine.
    """
    if isinstance(given, Examples):
        return given
    if not isinstance(read, InputContract):
        return given_rows(given, read, on_note)
    contract = read
    if not isinstance(given, str | Path):
        return of_array(Bare(np.asarray(given), "the array given"), contract, on_note)
    path = Path(given)
    if str(given).startswith(TFDS):
        return of_pictures(open_source(str(given)), contract, on_note, most)
    if path.is_dir() and not holds_shards(path):
        return of_pictures(open_folder(path, unsorted), contract, on_note, most)
    if path.suffix.lower() in (".npz", ".npy") and path.is_file():
        bare = load_bare(path)
        return load_images(path) if bare is None else of_array(bare, contract, on_note)
    if path.is_file() and is_image(path.name):
        raise UsageError(f"{path} is one picture; {TO_GIVE}.")
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise UsageError(f"{path} holds no images; {TO_GIVE}.")
        return of_pictures(open_zip(path, unsorted), contract, on_note, most)
    return load_images(path)


def given_rows(
    given: np.ndarray | Array | str | Path, read: Input, on_note: Callable[[str], object]
) -> Examples:
    """Rows of ids or values: an array, an `.npy`, or an `.npz` that has them under `rows`.

    Raises:
      UsageError: if nothing there holds rows of what the network reads.
      DataError: for a file that cannot be read.
    """
    name = str(given) if isinstance(given, str | Path) else "the array given"
    if not isinstance(given, str | Path):
        found = np.asarray(given)
    elif Path(given).suffix.lower() in (".npy", ".npz") and Path(given).is_file():
        found = bare_rows(Path(given)).values
    else:
        raise UsageError(
            f"{given} holds no rows; give an array, an .npy, or an .npz with `rows`, of {read}."
        )
    whole = found.dtype.kind in "iu" and read.dtype.kind == "i"
    made = found.astype(read.dtype) if whole or read.dtype.kind == "f" else found
    about = {"method": "given", "source": name, "n": len(made)}
    examples = Examples((jax.device_put(made),), (read,), about, "given")
    check_rows(examples, read)
    on_note(f"{name}: {len(made)} rows, each {read}")
    return examples


def bare_rows(path: Path) -> Bare:
    """The rows of an `.npy` file, or of an `.npz` that has them under `rows`.

    Raises:
      UsageError: for a set of images.
      DataError: for a file that cannot be read.
    """
    found = load_bare(path, "rows")
    if found is None:
        raise UsageError(f"{path} is a set of images; this network reads none.")
    return found


def of_pictures(
    source: LabelledImages,
    contract: InputContract,
    on_note: Callable[[str], object],
    most: int,
) -> Examples:
    """Pictures of any size, as the network's contract reads them; at most so many.

    Raises:
      DataError: naming a picture that cannot be read.
    """
    chosen = pick(len(source), most)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        read = list(pool.map(lambda i: load_example(source, i, contract)[0], chosen))
    count = f"{len(read)} pictures"
    if len(read) < len(source):
        count = f"{len(read)} of {len(source)} pictures, evenly spaced,"
    shape = f"{contract.height}x{contract.width} {contract.colours}"
    on_note(f"{count} of {source.name} as {shape}, normalised with {in_words(contract)}")
    return brought(np.stack(read), contract, source.name)


def of_array(bare: Bare, contract: InputContract, on_note: Callable[[str], object]) -> Examples:
    """An array of images, whose values say whether they are pixels or normalised.

    Raises:
      UsageError: if its shape or values are those of no images for this network.
    """
    images = in_library_order(bare, contract)
    read = understood(images, bare.name, contract)
    on_note(f"{bare.name}: {len(images)} images, {read.told}")
    return brought(read.images, contract, bare.name)


def in_words(contract: InputContract) -> str:
    """How images are normalised."""
    return f"mean {listed(contract.mean)}, std {listed(contract.std)}"


def brought(images: np.ndarray, contract: InputContract, name: str) -> Examples:
    """The set of these images."""
    about = {"method": "given", "source": name, "n": len(images)}
    return Examples((jax.device_put(images),), (contract,), about, "given")


def in_library_order(bare: Bare, contract: InputContract) -> np.ndarray:
    """The images as NHWC.

    Raises:
      UsageError: if they are neither that nor NCHW for this network.
    """
    found = bare.values
    height, width, channels = contract.shape
    if channels == 1 and found.shape[1:] == (height, width):
        found = found[..., None]
    if height == 1:
        found = of_lines(found, contract)
    if found.ndim == 3:
        found = found[None]
    if found.shape[1:] == (channels, height, width) != contract.shape:
        found = found.transpose(0, 2, 3, 1)
    if found.shape[1:] != contract.shape or len(found) == 0:
        also = "" if height > 1 else f", or as its file has them ({contract.layout})"
        raise UsageError(
            f"{bare.name} has shape {bare.values.shape}; the network reads (n, {height}, {width}, "
            f"{channels}): n images, height, width, channels{also}. Pictures of any size can be "
            "given as a folder."
        )
    return found


def of_lines(found: np.ndarray, contract: InputContract) -> np.ndarray:
    """Lines (n, length, channels) and vectors (n, values), as files have them, as rows of pixels.

    Lines with their channels first are turned; where both orders would do, the file's counts.
    """
    _, length, channels = contract.shape
    orders = {NHWC: (length, channels), NCHW: (channels, length)}
    last = found.shape[1:] == orders[NHWC]
    if length == 1 and found.shape[1:] == (channels,):
        return found[:, None, None]
    if found.shape[1:] == orders[NCHW] and not (last and contract.layout == NHWC):
        return found.transpose(0, 2, 1)[:, None]
    return found[:, None] if last else found


def understood(found: np.ndarray, name: str, contract: InputContract) -> ReadImages:
    """Images as normalised float32, from pixels of 0..255 or of [0, 1], or normalised already.

    Whole numbers are pixels. Of others the range decides: normalised images have values below zero
    where black lies there, and none far beyond white; a set of pixels is not all but black. What is
    no picture is what its network reads, unless it is bytes.

    Raises:
      UsageError: for values that are no numbers, or beyond any pixel.
    """
    if found.dtype.kind not in "uif":
        raise UsageError(f"{name} holds {found.dtype}, no numbers; {TO_GIVE}.")
    low, high = float(found.min()), float(found.max())
    if not np.isfinite([low, high]).all():
        raise UsageError(f"{name} holds NaN or infinite values; images have none.")
    black, white = contract.value_range
    whole, words = found.dtype.kind != "f", f"with {in_words(contract)}"
    if not contract.is_picture and found.dtype != np.uint8:
        return ReadImages(
            np.asarray(found, np.float32), f"values {low:.3g} to {high:.3g}, as they are"
        )
    if whole or (low >= 0 and high > max(OUTSIDE * max(white, 1), DARKEST)):
        if low < 0 or high > 255:
            raise UsageError(
                f"{name} has values from {low:g} to {high:g}; pixels are 0..255, or in [0, 1], or "
                f"normalised with {in_words(contract)}."
            )
        return ReadImages(
            normalised(found, 255.0, contract), f"of pixels 0..255, normalised {words}"
        )
    if low >= 0 and high <= 1 and black < NEARLY_BLACK:
        return ReadImages(
            normalised(found, 1.0, contract), f"of pixels in [0, 1], normalised {words}"
        )
    return ReadImages(
        np.asarray(found, np.float32),
        f"values {low:.3g} to {high:.3g}, taken as normalised already {words}",
    )


def normalised(pixels: np.ndarray, largest: float, contract: InputContract) -> np.ndarray:
    """`(pixel / largest - mean) / std` in float32."""
    mean, std = (np.asarray(v, np.float32) for v in (contract.mean, contract.std))
    return (np.asarray(pixels, np.float32) / np.float32(largest) - mean) / std
