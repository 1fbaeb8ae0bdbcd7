"""Where a long run is, for whoever shows it."""

import dataclasses
from collections.abc import Mapping
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


class Phase(NamedTuple):
    """A part of a run that begins.

    Attributes:
      what: is being done.
      seconds: that it was foreseen to take.
      rest: seconds that were foreseen for all that comes after it.
    """

    what: str
    seconds: float
    rest: float
