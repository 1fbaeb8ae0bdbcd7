"""Pickles read as data only: nothing a file names is ever imported or called.

Every global becomes an inert `Global`, every construction an inert `Object`; the few constructors
that merely describe data (ordered dicts, PyTorch tensors) are understood by name. What the file
names is recorded, and a file that names code is refused, wherever in the file the name stands.
"""

import contextlib
import re
from typing import Any

from dfq_jax.errors import CheckpointError, UnsafeInputError
from dfq_jax.io.readers.pickle_operations import PickleMachine
from dfq_jax.io.readers.pickle_policy import means_code, refuse_code
from dfq_jax.io.readers.pickle_values import Global, PersistentId

HIDDEN_BYTES = 1 << 19  # of a damaged or trailing part that are searched for names
HIDDEN_STARTS = 32
HIDDEN_OPERATIONS = 50_000  # from one start
HIDDEN_WORK = 200_000  # operations from all starts together
IMPORTABLE = re.compile(r"\w+(\.\w+)+")
TEXT_NAME = re.compile(rb"[ci]([\w.]{1,100}+)\r?\n([\w.]{1,100}+)\r?\n")


class PickleStream:
    """Consecutive pickles in one buffer, read as data."""

    def __init__(self, data: bytes, where: str):
        """Starts at the first byte of `data`, which messages call `where`."""
        self._machine = PickleMachine(data, where)

    @property
    def pos(self) -> int:
        """Offset of the next unread byte."""
        return self._machine.pos

    @property
    def globals(self) -> tuple[Global, ...]:
        """Every name met so far, in file order, each once."""
        return tuple(self._machine.globals)

    @property
    def persistent(self) -> tuple[PersistentId, ...]:
        """Every persistent id met so far, in file order."""
        return tuple(self._machine.persistent)

    def load(self) -> Any:
        """The value of the next pickle; names of code in it are reported by `refuse_unsafe`.

        Returns:
          Plain Python data and the descriptions of `pickle_values`.

        Raises:
          CheckpointError: if the pickle is damaged or cut short.
          UnsafeInputError: if it is damaged and names code, before or after the damage, if it is
            absurdly long, or if it computes a name.
        """
        try:
            return self._machine.load()
        except (CheckpointError, UnsafeInputError):
            self.refuse_unsafe(after=self.pos)
            raise

    def refuse_unsafe(self, *, after: int | None = None) -> None:
        """Refuses the stream if it names code.

        Args:
          after: also search the bytes from here on, which need not be healthy pickles.

        Raises:
          UnsafeInputError: listing every name of code found.
        """
        found = dict.fromkeys(self._machine.globals)
        if after is not None:
            found |= dict.fromkeys(hidden_globals(self._machine.data[after : after + HIDDEN_BYTES]))
        refuse_code(self._machine.where, [str(g) for g in found if means_code(g.module, g.name)])

    def finish(self) -> None:
        """Checks that the stream names no code and that nothing follows the last pickle.

        Raises:
          UnsafeInputError: if any part of the stream names code.
          CheckpointError: if anything follows.
        """
        self.refuse_unsafe(after=self.pos)
        extra = len(self._machine.data) - self.pos
        if extra:
            raise self._machine.damaged(f"{extra} bytes follow where it should end")


def load_pickle(data: bytes, where: str) -> tuple[Any, tuple[Global, ...]]:
    """Reads one pickle that fills its buffer.

    Args:
      data: the pickle.
      where: the file, and the member in it, for messages.

    Returns:
      The value, and every name the pickle refers to.

    Raises:
      CheckpointError: if it is damaged, cut short or followed by anything.
      UnsafeInputError: if it names code, anywhere.
    """
    stream = PickleStream(data, where)
    value = stream.load()
    stream.finish()
    return value, stream.globals


def hidden_globals(data: bytes) -> tuple[Global, ...]:
    """Names in bytes that need not be one healthy pickle: leftovers, broken or foreign parts.

    Args:
      data: any bytes; the first 512 KiB are searched.

    Returns:
      Names met by reading pickles from every plausible start, and names of code in text form.
    """
    data = data[:HIDDEN_BYTES]
    found: dict[Global, None] = {}
    left = HIDDEN_WORK
    starts = [0, *(match.start() for match in re.finditer(rb"\x80[\x00-\x05]", data))]
    for start in starts[:HIDDEN_STARTS]:
        probe = PickleMachine(data, "", start, min(HIDDEN_OPERATIONS, left))
        left -= probe.budget
        with contextlib.suppress(CheckpointError, UnsafeInputError):
            probe.load()  # where it leads nowhere, the names met on the way still count
        left += max(probe.budget, 0)
        found.update((g, None) for g in probe.globals if IMPORTABLE.fullmatch(str(g)))
    for match in TEXT_NAME.finditer(data):
        module, name = (part.decode("latin-1") for part in match.groups())
        if means_code(module, name):
            found[Global(module, name)] = None
    return tuple(found)
