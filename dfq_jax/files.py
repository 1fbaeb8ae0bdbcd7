"""Files written so that a crash, a full disk or a kill never leaves half of one behind."""

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from dfq_jax.errors import DfqError, ResourceError, UsageError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
CHUNK = 1 << 20


def write_atomically(path: str | Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Puts a whole file in place, or leaves what was there before.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and only then
    take the name `path`.

    Args:
      path: where the file shall be; its folder must exist.
      content: the bytes, or a function that writes them to the open file it is given.

    Raises:
      ResourceError: if the disk is full.
      UsageError: if the folder is read-only or missing, or the name is impossible.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    with disk_errors(path):
        try:
            with open(temporary, "xb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    content(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut, where the system can do that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # systems that cannot open folders write their entries at once
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turns operating system errors raised inside into typed ones that name `path`."""
    try:
        yield
    except OSError as error:
        raise explain(error, Path(path)) from error


def explain(error: OSError, path: Path) -> DfqError:
    """The typed error for a failed write: what happened to which file, and what to do."""
    reason = error.strerror or str(error)
    if error.errno in DISK_FULL:
        return ResourceError(
            f"cannot write {path}: {reason}. Nothing was replaced; free some space on that disk "
            f"or choose another output folder."
        )
    if error.errno in NOT_ALLOWED:
        return UsageError(
            f"cannot write {path}: {reason}. Nothing was replaced; "
            f"choose a folder you may write to."
        )
    if error.errno == errno.EIO:
        return ResourceError(f"cannot write {path}: {reason}. The disk reports a fault.")
    return UsageError(f"cannot write {path}: {reason}. Check that its folder exists.")


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()
