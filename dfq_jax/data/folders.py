"""Class folders, on disk or inside a zip archive that is never extracted."""

import os
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import PIL.Image

from dfq_jax.base.files import read_regular
from dfq_jax.data.source import LabelledImages, decode
from dfq_jax.errors import DataError, UnsafeInputError

SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
SPLITS = frozenset(("test", "train", "val", "valid", "validation"))
MAX_MEMBER_BYTES = 1 << 28
Members = tuple[tuple[str, ...], list[tuple[str, int]]]
"""Names of classes, and (path, class index) of every image."""
Sort = Callable[[Sequence[str], str], Members]
LAYOUT = "expected <class>/<image> inside, for example cat/1.jpg and dog/1.jpg"


def open_folder(root: Path, sort: Sort | None = None) -> LabelledImages:
    """Images below `root`.

    Links to folders are followed, hidden files are left out.

    Args:
      root: the folder.
      sort: what its layout means: `arrange` (the default) or `unsorted`.

    Raises:
      DataError: if the folder does not hold images in this layout.
    """
    classes, members = (sort or arrange)(list_files(root), str(root))

    def read(index: int) -> tuple[PIL.Image.Image, int]:
        path, label = root / members[index][0], members[index][1]
        try:
            data = read_regular(path, MAX_MEMBER_BYTES)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read image {path}: {error}.") from error
        return decode(data, str(path)), label

    return LabelledImages(str(root), classes, len(members), read, "folder")


def open_zip(path: Path, sort: Sort | None = None) -> LabelledImages:
    """Images in a zip archive, read one at a time without extracting.

    No member is written anywhere and none beyond 256 MiB is read, so neither overlapping members
    nor extreme compression can exhaust disk or memory.

    Args:
      path: the archive.
      sort: what its layout means: `arrange` (the default) or `unsorted`.

    Raises:
      DataError: if the archive is damaged, encrypted, or holds no images in this layout.
      UnsafeInputError: if a member name leaves the archive, or an image claims to unpack to more
        than 256 MiB.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"cannot open {path} as a zip archive: {error}.") from error
    infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    try:
        for info in archive.infolist():
            check_member(info, path)
        classes, members = (sort or arrange)(list(infos), str(path))
    except Exception:
        archive.close()
        raise

    def read(index: int) -> tuple[PIL.Image.Image, int]:
        member, label = members[index]
        where = f"{member} in {path}"
        try:
            data = unpacked(archive, infos[member])
        except Exception as error:  # zlib.error, BadZipFile, EOFError, NotImplementedError, ...
            raise DataError(f"cannot unpack {where}: {error}. Archive it again.") from error
        return decode(data, where), label

    return LabelledImages(str(path), classes, len(members), read, "archive")


def unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member of the size it claims; of one that is larger, no more is unpacked.

    Raises:
      ValueError: if it has another size.
    """
    with archive.open(info) as file:
        data = file.read(info.file_size + 1)
    if len(data) != info.file_size:
        raise ValueError(f"{len(data)} bytes or more instead of {info.file_size}")
    return data


def check_member(info: zipfile.ZipInfo, path: Path) -> None:
    """Refuses archive members that escape, are encrypted, or unpack to absurd sizes.

    Raises:
      DataError: for an encrypted image.
      UnsafeInputError: for an absolute or `..` name, or an image beyond 256 MiB.
    """
    parts = re.split(r"[/\\]", info.filename)
    if ".." in parts or parts[0] == "" or re.match("[A-Za-z]:", parts[0]):
        raise UnsafeInputError(
            f"refused {path}: member {info.filename!r} points outside the archive."
        )
    if not is_image(info.filename):
        return
    if info.file_size > MAX_MEMBER_BYTES:
        raise UnsafeInputError(
            f"refused {path}: {info.filename} unpacks from {info.compress_size} to "
            f"{info.file_size} bytes, allowed are {MAX_MEMBER_BYTES}."
        )
    if info.flag_bits & 1:
        raise DataError(
            f"cannot read {info.filename} in {path}: it is encrypted. Archive it without password."
        )


def list_files(root: Path) -> list[str]:
    """Paths of all files below `root`, relative, with forward slashes; link cycles are cut.

    Raises:
      DataError: if a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename}: {error.strerror}.") from error

    found: list[str] = []
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        here = os.path.realpath(folder)
        subfolders[:] = [
            name
            for name in subfolders
            if not Path(here).is_relative_to(os.path.realpath(os.path.join(folder, name)))
        ]
        relative = Path(folder).relative_to(root)
        found.extend((relative / name).as_posix() for name in files)
    return found


def is_image(path: str) -> bool:
    """Whether a relative path names a visible file with an image suffix."""
    parts = PurePosixPath(path).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and PurePosixPath(path).suffix.lower() in SUFFIXES


def unsorted(paths: Sequence[str], name: str) -> Members:
    """All images, wherever they lie, as one class.

    Raises:
      DataError: if there is none.
    """
    found = sorted((path for path in paths if is_image(path)), key=natural)
    if not found:
        known = " ".join(sorted(SUFFIXES))
        raise DataError(f"no images in {name}: none of its {len(paths)} files ends in {known}.")
    return ("images",), [(path, 0) for path in found]


def arrange(paths: Sequence[str], name: str) -> Members:
    """Sorts relative paths into classes.

    The layout is `<class>/.../<image>`, optionally below one extra top-level folder. Files that
    are no images are left out. Classes are sorted by name, images naturally within their class
    (`2.jpg` before `10.jpg`).

    Args:
      paths: relative paths with forward slashes, any order.
      name: the folder or archive, for messages.

    Returns:
      Class names, and (path, class index) of every image.

    Raises:
      DataError: if there is no image, an image outside any class folder, or several splits.
    """
    images = [(PurePosixPath(path).parts, path) for path in paths if is_image(path)]
    if not images:
        raise DataError(f"no images in {name}: found {len(paths)} files, none an image; {LAYOUT}.")
    tops = {parts[0] for parts, _ in images}
    if len(tops) == 1 and min(len(parts) for parts, _ in images) > 2:
        images = [(parts[1:], path) for parts, path in images]
        tops = {parts[0] for parts, _ in images}
    loose = [path for parts, path in images if len(parts) == 1]
    if loose:
        raise DataError(
            f"{len(loose)} of {len(images)} images in {name} lie outside any class folder, "
            f"e.g. {min(loose)}; {LAYOUT}."
        )
    if len(tops) > 1 and tops <= SPLITS:
        raise DataError(
            f"{name} holds the splits {', '.join(sorted(tops))} instead of classes; "
            f"give one split: {LAYOUT}."
        )
    classes = tuple(sorted(tops))
    index = {label: i for i, label in enumerate(classes)}
    members = [(index[parts[0]], natural(path), path) for parts, path in images]
    return classes, [(path, label) for label, _, path in sorted(members)]


def natural(text: str) -> list[str | tuple[int, str]]:
    """A sort key under which digits compare as numbers: text and numbers in turn.

    A number is (digits without leading zeros, those digits), which orders like its value.
    """
    parts = re.split("0*([0-9]+)", text)
    return [(len(part), part) if i % 2 else part for i, part in enumerate(parts)]
