"""When a run will be over: from what its phases were foreseen to take, and how they went so far."""

import dataclasses

from dfq_jax.optim.progress import RunPhase

PRIOR = 5.0
"""Foreseen seconds that must be over until the pace of a machine is believed rather than ours."""
LEAST = 0.1
"""Share of its length that a phase is believed to have left once it took longer than foreseen."""


@dataclasses.dataclass(frozen=True)
class Outlook:
    """Where a run is.

    Attributes:
      begun: when its first phase began, in seconds of a clock.
      phase: what is being done.
      since: when that began.
      before: seconds that were foreseen for the phases that are over.
      first: when it was first told which part of the phase is done, and which that was; compiling
        is over then.
      last: the same, most recently.
    """

    begun: float
    phase: RunPhase
    since: float
    before: float = 0.0
    first: tuple[float, float] | None = None
    last: tuple[float, float] | None = None

    def next(self, phase: RunPhase, now: float) -> "Outlook":
        """Another phase begins."""
        return Outlook(self.begun, phase, now, self.before + self.phase.seconds)

    def moved(self, part: float, now: float) -> "Outlook":
        """A part of the phase is done, 0 to 1."""
        return dataclasses.replace(self, first=self.first or (now, part), last=(now, part))

    def left(self, now: float) -> float:
        """Seconds until the run is over."""
        pace = (self.since - self.begun + PRIOR) / (self.before + PRIOR)
        return self.left_of_phase(now, pace) + pace * self.phase.rest

    def left_of_phase(self, now: float, pace: float) -> float:
        """Seconds until the phase is over, at so many seconds for each that was foreseen."""
        if self.first and self.last and self.last[1] > self.first[1]:
            (then, had), (lately, has) = self.first, self.last
            seconds = (lately - then) / (has - had) * (1 - has)
            return max(seconds - (now - lately), 0.0)
        length = pace * self.phase.seconds
        return max(length - (now - self.since), LEAST * length)
