"""Files written so that a crash, a full disk or a kill never leaves half of one behind."""

import contextlib
import datetime
import errno
import hashlib
import json
import os
import secrets
import socket
import struct
import time
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dfq_jax.errors import DfqError, ResourceError, UsageError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_AN_NPZ = (
    *(ValueError, KeyError, TypeError, IndexError, EOFError, NotImplementedError, RuntimeError),
    *(SyntaxError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
"""What reading a damaged or foreign file as `.npz` may raise, beside OSError."""
HOLDS_OBJECTS = "it holds Python objects, which are never read"
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
CHUNK = 1 << 20
TEMPORARY = ".tmp-"
"""How names of files begin that are on their way to others."""
PATIENCE = 1.0
"""Seconds in which a living process has long written a lock file it has created."""


def npz_fault(error: Exception) -> str:
    """What is wrong with a file of arrays, without NumPy's advice to run what is in it."""
    return HOLDS_OBJECTS if "pickle" in str(error) else str(error)


def write_atomically(path: str | Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Puts a whole file in place, or leaves what was there before.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and only then
    take the name `path`. What a killed process left of an earlier try is removed.

    Args:
      path: where the file shall be; its folder must exist.
      content: the bytes, or a function that writes them to the open file it is given.

    Raises:
      ResourceError: if the disk is full.
      UsageError: if the folder is read-only or missing, or the name is impossible.
    """
    path = Path(path)
    prefix = f"{TEMPORARY}{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}-"
    with disk_errors(path):
        remove_left(path.parent, prefix)
        with held_beside(path, prefix) as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
            if os.name != "posix":
                file.close()  # Windows renames no open file
            os.replace(file.name, path)
        sync_folder(path.parent)


@contextlib.contextmanager
def held_beside(path: Path, prefix: str) -> Iterator[BinaryIO]:
    """Creates a temporary file that this process holds; it is gone again where work on it fails."""
    while True:
        with open(path.with_name(f"{prefix}{secrets.token_hex(8)}"), "xb") as file:
            if hold(file, wait=True) and not os.path.exists(file.name):
                continue  # somebody took it for a left one before it was held
            try:
                yield file
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(file.name)
                raise
            return


def remove_left(folder: Path, prefix: str = TEMPORARY) -> None:
    """Removes temporary files that no living process holds, where the system can tell."""
    for left in folder.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), open(left, "rb") as file:
            if hold(file):
                left.unlink()


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


def read_regular(path: str | Path, most: int) -> bytes:
    """A whole file, if it is a regular one of at most so many bytes: devices and pipes never end.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is of another kind, or larger.
    """
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has {max(size, len(data)):,} bytes, allowed are {most:,}")
    return data


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def owned(folder: str | Path, name: str) -> Iterator[None]:
    """Keeps other processes from writing to the same output while this one does.

    The owner is recorded in `{name}.lock`, which is created only if it does not exist, and holds
    the system's own lock on that file while it lives. One left by a process of this machine that is
    no more is taken over, whatever container it ran in.

    Args:
      folder: what is owned; created if need be.
      name: of the lock; processes that work in one folder together each have one of their own.

    Raises:
      UsageError: if a living process owns it, or one of another machine, which may be alive.
      ResourceError: if the disk is full.
    """
    lock = Path(folder) / f"{name}.lock"
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        while (mine := created(lock)) is None:
            refuse_living(lock)
    content = lock_text(mine)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if lock.read_bytes() == content:
                lock.unlink()
        mine.close()


def this_process(held: bool) -> dict[str, Any]:
    """Who owns what this process owns."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    pid = os.getpid()
    about = {"host": socket.gethostname(), "pid": pid, "since": now, "born": born(pid)}
    return {**about, "held": held}


def created(path: Path) -> BinaryIO | None:
    """Creates a lock of this process and holds it while it is open; None if there is one."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    except FileExistsError:
        return None
    file = os.fdopen(handle, "w+b")
    try:
        file.write(json.dumps(this_process(hold(file))).encode())
        file.flush()
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()
        raise
    return file


def lock_text(file: BinaryIO) -> bytes:
    """What was written to a lock that is open."""
    file.seek(0)
    return file.read()


def hold(file: BinaryIO, *, shared: bool = False, wait: bool = False) -> bool:
    """Takes the system's lock on an open file; False if somebody has it, or there are none."""
    try:
        import fcntl

        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def refuse_living(lock: Path) -> None:
    """Removes a lock nobody holds any more.

    Raises:
      UsageError: if somebody holds it.
    """
    owner = owner_of(lock)
    if owner is not None and alive(owner, lock):
        raise UsageError(
            f"{lock.parent} is being written by process {owner['pid']} on {owner['host']} since "
            f"{owner['since']}. Wait until it has ended or choose another output; if there is no "
            f"such process any more, delete {lock}."
        )
    remove_stale(lock)


def owner_of(lock: Path) -> dict[str, Any] | None:
    """What a lock says about its owner; None if it is gone or was never written to its end."""
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            owner = json.loads(lock.read_bytes())
            told = {key: owner[key] for key in ("host", "pid", "since", "born")}
            return {**told, "held": owner.get("held") is True}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if time.monotonic() > give_up:
                return None
            time.sleep(PATIENCE / 20)


def alive(owner: dict[str, Any], lock: Path) -> bool:
    """Whether the owner of a lock runs, as far as can be told from here.

    On the machine it ran on, its hold of the lock tells, and it does so in all containers of it.
    """
    if owner["held"] and same_boot(owner["born"]):
        return is_held(lock)
    if owner["host"] != socket.gethostname() or os.name != "posix":
        return True
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it is somebody else's, so it exists
    except (ValueError, TypeError, OverflowError):
        return False  # no process has such a number
    return owner["born"] == born(int(owner["pid"]))


def is_held(lock: Path) -> bool:
    """Whether somebody has the system's lock on a file; True where that cannot be told."""
    try:
        with open(lock, "rb+") as file:
            return not hold(file, shared=True)
    except FileNotFoundError:
        return False
    except OSError:
        return True


def same_boot(told: Any) -> bool:
    """Whether what `born` said was said on this machine, since it was started."""
    mine = born(os.getpid())
    return mine is not None and str(told).partition(" ")[0] == mine.partition(" ")[0]


def born(pid: int) -> str | None:
    """When a process began, to tell it from later ones of the same number.

    None if it has ended, and where the system does not say (as it does in Linux's `/proc`).
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else f"{boot} {fields[18]}"


def remove_stale(lock: Path) -> None:
    """Removes the lock of a dead process; of several that try, none removes the next one's."""
    with contextlib.suppress(FileNotFoundError), open(lock, "rb+") as file:
        if not hold(file) and os.name == "posix":
            return  # somebody has it now
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
            return
        owner = owner_of(lock)
        let_go = owner is not None and owner["held"] and same_boot(owner["born"])
        if owner is None or let_go or not alive(owner, lock):
            lock.unlink()
