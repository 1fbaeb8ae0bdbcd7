"""Arrays out of `.npz` files from strangers: a member is unpacked once its header is believed."""

import io
import math
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dfq_jax.errors import UnsafeInputError

MOST_GROWTH = 8
"""Unpacked bytes for a byte of the file; images hardly shrink."""
SLACK = 64 << 20
"""Bytes that a file of any size may unpack to."""
MOST_NAMED = 5
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(
    source: Path | bytes, names: Collection[str], *, optional: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Some arrays of an `.npz` file.

    Args:
      source: a regular file, or the bytes of one.
      names: of arrays that must be there.
      optional: of arrays that may be.

    Returns:
      {name: array}, read-only.

    Raises:
      ValueError: if the file is damaged, is none, lacks a name, or holds Python objects.
      FileNotFoundError: if there is none.
      OSError: if it cannot be read.
      UnsafeInputError: if it would unpack to far more than it has bytes.
    """
    if isinstance(source, Path):
        size = source.stat().st_size
        if not source.is_file():
            raise ValueError("it is no regular file")
    else:
        size = len(source)
    try:
        with zipfile.ZipFile(source if isinstance(source, Path) else io.BytesIO(source)) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            check_names(infos, names)
            found = [name for name in (*names, *optional) if f"{name}.npy" in infos]
            check_growth([infos[f"{name}.npy"] for name in found], size)
            return {name: member(archive, infos[f"{name}.npy"]) for name in found}
    except (OSError, UnsafeInputError):
        raise
    except Exception as error:  # damaged archives and headers make NumPy raise nearly anything
        raise ValueError(str(error) or type(error).__name__) from error


def npz_names(path: Path) -> list[str]:
    """The names of the arrays of an `.npz` file.

    Raises:
      ValueError: if it is none.
      OSError: if it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from error


def check_names(infos: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuses an archive that lacks an array.

    Raises:
      ValueError: with the names there are.
    """
    if missing := [name for name in names if f"{name}.npy" not in infos]:
        held = [name.removesuffix(".npy") for name in infos]
        more = f" and {len(held) - MOST_NAMED} more" if len(held) > MOST_NAMED else ""
        raise ValueError(
            f"it has no array {missing[0]!r}, but {', '.join(map(repr, held[:MOST_NAMED]))}{more}"
            if held
            else "it is empty"
        )


def check_growth(infos: Collection[zipfile.ZipInfo], size: int) -> None:
    """Refuses members that claim to unpack to far more than the file holds.

    Raises:
      UnsafeInputError: with both numbers.
    """
    total = sum(info.file_size for info in infos)
    if total > MOST_GROWTH * size + SLACK:
        raise UnsafeInputError(
            f"its {size:,} bytes claim to unpack to {total:,}; refused as a zip bomb. Save arrays "
            "without compression."
        )


def member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One array, whose header must say what the archive says."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        shape, in_columns, kind = HEADERS[version](file)
        if kind.hasobject:
            raise ValueError(f"{info.filename} holds Python objects, which are never read")
        count = math.prod(shape) * kind.itemsize
        if min(shape, default=0) < 0 or file.tell() + count != info.file_size:
            raise ValueError(
                f"{info.filename} says {kind} {shape}, but has {info.file_size} bytes in all"
            )
        data = file.read(count + 1)
    if len(data) != count:
        raise ValueError(f"{info.filename} has {len(data)} bytes instead of {count}")
    return np.frombuffer(data, kind).reshape(shape, order="F" if in_columns else "C")
