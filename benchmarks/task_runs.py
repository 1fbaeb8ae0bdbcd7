"""What the benchmarks of all tasks share: what a task is, and `dfq quantize` of a file."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import artifacts
from common import Column, Row

FIRST = (Column("network", "network"), Column("scheme", "scheme"), Column("preset", "preset"))
LAST = (
    Column("verified", "verified"),
    Column("steps", "steps apart"),
    Column("seconds", "s", ".0f"),
    Column("note", "note"),
)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What to measure.

    Attributes:
      shared: the data folder.
      schemes: bits; none for those of the task.
      presets: how.
      seed: of everything random.
      limit: judge by so many examples only.
    """

    shared: Path
    schemes: tuple[str, ...] = ()
    presets: tuple[str, ...] = ("fast",)
    seed: int = 0
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """One table of `tasks.py`.

    Attributes:
      columns: of the table, between `FIRST` and `LAST`.
      needs: files of the data folder.
      schemes: bits that are measured by default.
      rows: measures.
    """

    columns: Sequence[Column]
    needs: tuple[str, ...]
    schemes: tuple[str, ...]
    rows: Callable[[Asked], Iterable[Row]]


class Made(NamedTuple):
    """A network that `dfq quantize` wrote, and the beginning of its row."""

    folder: Path
    row: Row

    @property
    def there(self) -> bool:
        """Whether it wrote one."""
        return not self.row["failed"]

    @property
    def file(self) -> Path:
        """The integer network, that of a run that calls it collapsed too."""
        whole = self.folder / "model.onnx"
        return whole if whole.exists() else self.folder / "model.failed.onnx"


def quantized(
    name: str, file: Path, scheme: str, preset: str, asked: Asked, *options: object
) -> Made:
    """Runs `dfq quantize FILE -o FOLDER`, verification included.

    Args:
      name: of the row.
      file: what a user has.
      scheme: bits.
      preset: how.
      asked: seed.
      *options: further ones of the command line.
    """
    folder = artifacts.FOLDER / "-".join(("task", name.replace(" ", "-"), scheme, preset))
    folder.parent.mkdir(parents=True, exist_ok=True)
    how = ("--scheme", scheme, "--preset", preset, "--seed", asked.seed)
    ran = artifacts.dfq("quantize", file, "-o", folder, *how, *options)
    row: Row = {"network": name, "scheme": scheme, "preset": preset, "note": ran.failure}
    row |= {"failed": ran.data is None, "seconds": ran.seconds}
    if ran.data is None:
        return Made(folder, row)
    verified = ran.data["report"].get("verification") or {}
    row["verified"] = "yes" if verified.get("passed") else "no"
    row["steps"] = verified.get("most_steps")
    if ran.code == artifacts.COLLAPSED:
        row["note"] = "called collapsed"
    return Made(folder, row)
