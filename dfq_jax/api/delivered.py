"""Examples as they reach a network once it is deployed, and the few of them that a folder keeps."""

import dataclasses
import io

import jax
import numpy as np
from jaxtyping import Array, Shaped

from dfq_jax.base.npz import read_npz
from dfq_jax.errors import UsageError
from dfq_jax.examples import Examples
from dfq_jax.recipes.probes import base_pixels
from dfq_jax.synthesis.sources.pixels import from_pixels, to_pixels
from dfq_jax.types import Input, InputContract, TokenColumns, Tokens

MOST_PROBES = 16
MOST_OUTSIDE = 0.8
"""Share of the values of images that may be out of range: of optimised ones up to a half are."""


def probes_in_bytes(probes: Examples, judges: Examples | None) -> bytes:
    """Up to 16 examples in an `.npz`, kept to verify the network again; images as 8-bit pixels.

    Under `base` those that the probes of the estimate are made of again (`probes_from`).

    Args:
      probes: that judged the result.
      judges: that its expected loss was estimated from, if it was.
    """
    buffer, few = io.BytesIO(), probes.array[:MOST_PROBES]
    if not isinstance(probes.input, InputContract):
        np.savez_compressed(buffer, allow_pickle=False, rows=np.asarray(few))
        return buffer.getvalue()
    arrays = {"pixels": to_pixels(few, probes.contract)}
    if judges is not None and len(base := base_pixels(judges)) < len(judges):
        arrays["base"] = base
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def probe_array(data: bytes, read: Input) -> Shaped[Array, "n ..."]:
    """Network input from the bytes of a probe file.

    Raises:
      ValueError: if it holds other than examples of this input, or one of `NOT_AN_NPZ`.
    """
    image = isinstance(read, InputContract)
    name, kind = ("pixels", np.dtype(np.uint8)) if image else ("rows", read.dtype)
    found = read_npz(data, (name,))[name]
    if found.dtype != kind or not len(found) or found.shape[1:] != read.shape:
        raise ValueError(f"found {found.dtype} {found.shape}, expected {kind} {read.shape}")
    if isinstance(read, InputContract):
        return from_pixels(found, read)
    if wrong := stray(found, read):
        raise ValueError(wrong)
    return jax.device_put(found)


def deliverable(examples: Examples, read: Input) -> Examples:
    """Examples as a deployed network gets them: images of 8-bit pixels, values outside clipped.

    Raises:
      UsageError: if they are none of what the network reads.
    """
    if not isinstance(read, InputContract):
        check_rows(examples, read)
        return examples
    check_contract(examples, read)
    pixels = to_pixels(examples.images, read)
    return dataclasses.replace(examples, arrays=(from_pixels(pixels, read),))


def split_probes(images: Examples) -> tuple[Examples, Examples]:
    """Three quarters to calibrate with, one to judge by; fewer than 4 images do both."""
    kept = calibrating(len(images))
    return images.split(len(images) - kept) if kept < len(images) else (images, images)


def calibrating(count: int) -> int:
    """How many of so many images do not only judge."""
    return count - count // 4


def check_rows(examples: Examples, read: Input) -> None:
    """Refuses examples of another shape, and ids and values that are none.

    Raises:
      UsageError: naming the first.
    """
    found = np.asarray(examples.array)
    if found.shape[1:] != read.shape:
        raise UsageError(
            f"the examples have shape {found.shape[1:]}, the network reads {read.shape}: {read}."
        )
    if found.dtype.kind != read.dtype.kind:
        raise UsageError(f"the examples are {found.dtype}, the network reads {read.dtype}: {read}.")
    if wrong := stray(found, read):
        raise UsageError(wrong)


def stray(found: np.ndarray, read: Input) -> str:
    """Which value lies outside what the network reads, in words; empty if none does."""
    if isinstance(read, TokenColumns):
        told = (stray_in_column(found, read, at) for at in range(len(read.columns)))
        return next(filter(None, told), "")
    low, high = read.value_range
    with np.errstate(invalid="ignore"):
        outside = (
            ~((found >= low) & (found <= high))
            if isinstance(read, Tokens)
            else (~np.isfinite(found))
        )
    if not outside.any():
        return ""
    place = tuple(map(int, np.argwhere(outside)[0]))
    what = f"ids are {low:g} to {high:g}" if isinstance(read, Tokens) else "values are finite"
    return f"row {place[0]} has {found[place]} at {place[1:]}; {what}."


def stray_in_column(found: np.ndarray, read: TokenColumns, at: int) -> str:
    """Which number of a column is none, or which row's mask leaves nothing; empty if neither."""
    name, column, values = read.names[at], read.columns[at], found[..., at]
    low, high = column.value_range
    outside = np.argwhere((values < low) | (values > high))
    if len(outside):
        row, place = map(int, outside[0])
        told = f"row {row} has {values[row, place]} in {name} at {place}"
        return f"{told}; its numbers are {low:g} to {high:g}."
    empty = np.flatnonzero(~values.any(axis=1))
    if column.mask and len(empty):
        return f"row {empty[0]} has an empty {name}: no token of it counts; leave the row out."
    return ""


def check_contract(images: Examples, contract: InputContract) -> None:
    """Refuses images made for another input, and values that are no normalised pixels.

    Raises:
      UsageError: naming the first field that differs, or how many values are out of range.
    """
    for field in ("height", "width", "mean", "std"):
        given, wanted = getattr(images.contract, field), getattr(contract, field)
        if given != wanted:
            raise UsageError(
                f"the images were made for {field} {given}, the network reads {wanted}; "
                "synthesize them from this network."
            )
    if images.images.shape[1:] != contract.shape:
        raise UsageError(
            f"the images have shape {tuple(images.images.shape[1:])}, the network reads "
            f"{contract.shape} (height, width, channels)."
        )
    values, (low, high) = np.asarray(images.images), contract.value_range
    outside = 1 - np.mean((values >= low) & (values <= high))
    if outside > MOST_OUTSIDE:
        raise UsageError(
            f"{100 * outside:.0f} % of the images' values lie outside [{low:.3g}, {high:.3g}], so "
            f"they are no pixels normalised for this network: (pixel/255 - {contract.mean}) / "
            f"{contract.std}."
        )
