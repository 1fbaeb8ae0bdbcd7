"""Where a long run is, and who is told."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

Metrics = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
      batch: index of the batch, from 0; of a round, where several batches are made at a time; of
        the unit, where rounding is learned.
      batches: number of batches, rounds or units.
      step: steps done in this batch; layers, where they are solved.
      steps: steps or layers of a batch.
      parts: last values of the loss and its parts, averaged over the batches of a round.
      what: is being done.
      part: of all the work that is done, where units take more or less of it; None where batches
        take the same.
    """

    batch: int
    batches: int
    step: int
    steps: int
    parts: Metrics
    what: str = "synthesizing"
    part: float | None = None

    @property
    def done(self) -> float:
        """The part of all the work that is done."""
        if self.part is not None:
            return self.part
        return (self.batch * self.steps + self.step) / max(self.batches * self.steps, 1)


class RunPhase(NamedTuple):
    """A part of a run that begins.

    Attributes:
      what: is being done.
      seconds: that it was foreseen to take.
      rest: seconds that were foreseen for all that comes after it.
    """

    what: str
    seconds: float
    rest: float


class UnitReport(NamedTuple):
    """How a unit fared whose rounding was learned.

    Attributes:
      name: of its first layer, and how many more.
      method: that was applied.
      before: the method's loss between its outputs, from quantized inputs, and the float unit's, as
        the unit came: rounded to nearest, or by an earlier method; in closed form the squared error
        in units of the output's power.
      after: the same with what was learned.
      kept: whether that was better, and kept.
      seconds: spent.
      notes: what went wrong on the way, in words that follow its name.
    """

    name: str
    method: str
    before: float
    after: float
    kept: bool
    seconds: float
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Watcher:
    """Who is told how a run goes, on the host; whoever is None is told nothing.

    Attributes:
      stage: told what is being done, in words.
      progress: told how far synthesis and learning are, after every few steps.
      unit: told (index, of how many, report) after each unit that was reconstructed.
      phase: told which part of a run begins, and how long it and the rest were foreseen to take.
    """

    stage: Callable[[str], None] | None = None
    progress: Callable[[Progress], None] | None = None
    unit: Callable[[int, int, UnitReport], None] | None = None
    phase: Callable[[RunPhase], None] | None = None

    def says(self, text: str) -> None:
        """Tells what is being done."""
        if self.stage is not None:
            self.stage(text)

    def advances(self, progress: Progress) -> None:
        """Tells how far it is."""
        if self.progress is not None:
            self.progress(progress)

    def ends_unit(self, index: int, units: int, report: UnitReport) -> None:
        """Tells how a unit fared."""
        if self.unit is not None:
            self.unit(index, units, report)

    def without_words(self) -> "Watcher":
        """The same without `stage`, for a part of a run that says nothing of its own."""
        return dataclasses.replace(self, stage=None)


SILENT = Watcher()
