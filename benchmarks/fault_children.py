"""Processes of their own in which something is made to go wrong, and how they end."""

import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

WATCHED = frozenset(
    ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink")
)
"""What a process may be killed before: each of these may leave another state on the disk."""
OK, REFUSED, KILLED, HUNG, FAILED = "ok", "refused", "killed", "hung", "failed"
PATIENCE = 120.0
MOST_SAID = 1 << 20
"""Bytes on stderr that a process may write and nobody reads meanwhile."""


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
      kind: `ok`, `refused` (one of our errors, or one line and an exit code), `killed` (as asked),
        `hung`, or `failed`: a traceback, a crash, another exception.
      text: what it said.
      seconds: that it took.
      mib: most memory it had.
      moments: operations on files below the watched folder.
    """

    kind: str
    text: str
    seconds: float
    mib: float
    moments: int = 0


class Limits(NamedTuple):
    """What befalls a process.

    Attributes:
      folder: whose files are watched.
      kill_at: it is killed before this operation on a file there; 0 for never.
      largest: bytes that a file may have, as on a full disk; None for any.
      seconds: until it is said to hang.
    """

    folder: Path | None = None
    kill_at: int = 0
    largest: int | None = None
    seconds: float = PATIENCE


def started(run: Callable[[], object], limits: Limits) -> tuple[int, int]:
    """A process that runs something: its number, and where it writes how that ended."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        obey(run, limits, writer)
    os.close(writer)
    return pid, reader


def obey(run: Callable[[], object], limits: Limits, writer: int) -> None:
    """What the process does; it never returns."""
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(quiet, stream)
    said, saying = os.pipe()  # a file would be subject to the limit of files
    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(saying, fcntl.F_SETPIPE_SZ, MOST_SAID)
    os.dup2(saying, 2)
    os.close(saying)
    count = watch(limits)
    if limits.largest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.largest, hard))
    kind, text = outcome(run)
    sys.stderr.flush()
    os.dup2(quiet, 2)
    if kind == REFUSED and not text:
        text = os.read(said, 4000).decode(errors="replace")
    if "Traceback" in text:
        kind = FAILED
    os.write(writer, json.dumps([kind, text[-2000:], count[0]]).encode())
    os._exit(0)


def watch(limits: Limits) -> list[int]:
    """Counts operations on files of a folder, and ends this process before one of them."""
    count = [0]
    if limits.folder is None:
        return count
    root = str(limits.folder)

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event not in WATCHED or not args or not str(args[0]).startswith(root):
            return
        count[0] += 1
        if count[0] == limits.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def outcome(run: Callable[[], object]) -> tuple[str, str]:
    """How a call ends, in this process."""
    from dfq_jax.errors import DfqError

    try:
        run()
    except DfqError as error:
        return REFUSED, str(error)
    except SystemExit as stop:
        return (REFUSED, "") if stop.code else (OK, "")
    except BaseException:  # whatever a user would see a traceback of
        return FAILED, traceback.format_exc()
    return OK, ""


def awaited(child: tuple[int, int], limits: Limits, since: float) -> Ended:
    """How a process ended that was started then."""
    pid, reader = child
    ready = select.select([reader], [], [], max(limits.seconds - (time.monotonic() - since), 0))[0]
    if not ready:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    _, status, usage = os.wait4(pid, 0)
    about = (time.monotonic() - since, usage.ru_maxrss / 1024)
    if not ready:
        return Ended(HUNG, "", *about)
    if told:
        kind, text, moments = json.loads(told)
        return Ended(kind, text, *about, moments)
    asked = limits.kill_at and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return Ended(KILLED if asked else FAILED, f"status {status}", *about)


def in_child(run: Callable[[], object], limits: Limits | None = None) -> Ended:
    """How something ends in a process of its own."""
    given = limits or Limits()
    since = time.monotonic()
    return awaited(started(run, given), given, since)
