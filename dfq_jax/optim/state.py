"""Saved optimisation state; the only file that touches Orbax."""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from orbax.checkpoint import v1 as ocp

from dfq_jax.errors import UsageError
from dfq_jax.files import write_atomically

State = TypeVar("State")


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
        """
        self.folder = folder.resolve()
        self.every_seconds = every_seconds
        self.saved_at = time.monotonic()
        note = self.folder / "fingerprint.json"
        wanted = json.loads(json.dumps(dict(fingerprint), sort_keys=True))
        if note.exists():
            refuse_other_run(self.folder, json.loads(note.read_text()), wanted)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(note, json.dumps(wanted, indent=1, sort_keys=True).encode())

    def steps(self) -> list[int]:
        """Steps with a complete state, ascending."""
        names = (p.name for p in self.folder.glob("step_*"))
        return sorted(int(n[5:]) for n in names if n[5:].isdigit())

    def load(self, like: State) -> State:
        """The latest state, or `like` itself when there is none."""
        done = self.steps()
        if not done:
            return like
        return ocp.load(str(self.folder / f"step_{done[-1]}"), like)

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


def refuse_other_run(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UsageError if two fingerprints differ, naming every field."""
    fields = [k for k in {**found, **wanted} if found.get(k) != wanted.get(k)]
    if fields:
        lines = [f"  {k}: saved {found.get(k)!r}, now {wanted.get(k)!r}" for k in sorted(fields)]
        raise UsageError(
            f"{folder} holds the state of a different run:\n"
            + "\n".join(lines)
            + "\nFinish that run with its own settings, or delete the folder to start afresh."
        )
