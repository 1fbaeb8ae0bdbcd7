"""Saved optimisation state; the only file that touches Orbax."""

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from orbax.checkpoint import v1 as ocp

from dfq_jax.base.files import owned, write_atomically
from dfq_jax.errors import DataError, UsageError

State = TypeVar("State")
MOST_TOLD = 8
"""Differences between two runs that a message lists."""
FINE = "recipe"
"""The field that says all of a method: told where nothing else differs that a user chose."""
LONGEST_TOLD = 100
"""Characters of a value in it."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run keeps its state, if it does.

    Attributes:
      folder: that holds it; None to keep nothing.
      facts: what the state depends on, as plain data; see `StateStore`.
    """

    folder: Path | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __truediv__(self, name: str) -> "Place":
        """A place inside, for a part of what the run does."""
        return self if self.folder is None else dataclasses.replace(self, folder=self.folder / name)

    def knowing(self, facts: Mapping[str, Any]) -> "Place":
        """The same for a state that depends on more."""
        return dataclasses.replace(self, facts={**self.facts, **facts})

    def store(self) -> "StateStore | None":
        """Opens the folder.

        Raises:
          UsageError: if it belongs to another run, and names the difference.
        """
        return None if self.folder is None else StateStore(self.folder, self.facts)

    def owned(self) -> AbstractContextManager[Any]:
        """Holds the lock of the folder.

        Raises:
          UsageError: if another process does.
        """
        return contextlib.nullcontext() if self.folder is None else owned(self.folder, "run")

    def remove(self) -> None:
        """Deletes the folder with all that is in it."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


NOWHERE = Place()


class StateStore:
    """One folder with the latest state of one run.

    The folder holds `fingerprint.json` (what the run depends on) and `step_{n}`, written by Orbax
    under a temporary name and renamed when complete. The previous step is deleted only after the
    next one is complete, so a kill at any moment leaves a state to resume from.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], every_seconds: float = 20.0):
        """Opens or creates the folder.

        Args:
          folder: where to keep the state.
          fingerprint: JSON data that must be equal for a state to be usable: weights, settings,
            versions.
          every_seconds: least time between two saves.

        Raises:
          UsageError: if the folder belongs to a run with another fingerprint; names the fields.
          DataError: if nobody can tell whose it is.
        """
        self.folder = folder.resolve()
        self.every_seconds = every_seconds
        self.saved_at = time.monotonic()
        note = self.folder / "fingerprint.json"
        wanted = json.loads(json.dumps(dict(fingerprint), sort_keys=True))
        if note.exists():
            refuse_other_run(self.folder, fingerprint_in(note), wanted)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(note, json.dumps(wanted, indent=1, sort_keys=True).encode())

    def steps(self) -> list[int]:
        """Steps with a complete state, ascending."""
        names = (p.name for p in self.folder.glob("step_*"))
        return sorted(int(n[5:]) for n in names if n[5:].isdigit())

    def load(self, like: State) -> State:
        """The latest state that is whole, or `like` itself when there is none.

        States that are damaged are deleted: what they held is computed anew.
        """
        for step in reversed(self.steps()):
            path = self.folder / f"step_{step}"
            try:
                return ocp.load(str(path), like)
            except (ValueError, TypeError, KeyError, OSError):
                shutil.rmtree(path)
        return like

    def save(self, step: int, state: Any, *, force: bool = False) -> None:
        """Saves `state` if the last save is long enough ago or `force` is set."""
        now = time.monotonic()
        if not force and now - self.saved_at < self.every_seconds:
            return
        done = self.steps()
        if step in done:
            return
        ocp.save(str(self.folder / f"step_{step}"), state)
        self.saved_at = now
        for old in done:
            shutil.rmtree(self.folder / f"step_{old}")


def fingerprint_in(note: Path) -> dict[str, Any]:
    """What a folder says of the run it belongs to.

    Raises:
      DataError: if that is damaged.
    """
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{note} is damaged ({error}), so nobody can tell whose states are beside it. "
            f"Delete {note.parent} to start afresh."
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"{note} is damaged. Delete {note.parent} to start afresh.")
    return found


def refuse_other_run(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UsageError if two fingerprints differ, naming the fields, and those inside a field."""
    lines = differences(found, wanted)
    lines = [line for line in lines if not line.startswith(f"  {FINE}: ")] or lines
    if lines:
        raise UsageError(
            f"{folder} holds the state of a different run:\n"
            + "\n".join(lines[:MOST_TOLD])
            + (f"\n  and {more} more" if (more := len(lines) - MOST_TOLD) > 0 else "")
            + "\nFinish that run with its own settings, or delete the folder to start afresh."
        )


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], inside: str = "") -> list[str]:
    """A line for each field of two fingerprints that differs, in the order of their names."""
    lines = []
    for name in sorted({*found, *wanted}):
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, list) and isinstance(new, list) and nested(old, new):
            old, new = (dict(zip(map(str, range(len(v))), v, strict=True)) for v in (old, new))
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{inside}{name}: ")
        elif old != new:
            lines.append(f"  {inside}{name}: saved {shortened(old)}, now {shortened(new)}")
    return lines


def nested(old: list[Any], new: list[Any]) -> bool:
    """Whether two lists of one length hold more than plain values: these are told as a whole."""
    return len(old) == len(new) and any(isinstance(v, list | dict) for v in (*old, *new))


def shortened(value: Any) -> str:
    """What a message shows of a value."""
    text = repr(value)
    return text if len(text) <= LONGEST_TOLD else f"{text[:LONGEST_TOLD]}..."
