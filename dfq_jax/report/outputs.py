"""What quantization did to every output of a network, part by part (`graph/heads.py`)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dfq_jax.base.finite import finite_or_none
from dfq_jax.graph.heads import Kind, Part
from dfq_jax.graph.tasks import Detector, LanguageModel, Task
from dfq_jax.quantization.outputs import MEASURES, Fidelity, fidelity
from dfq_jax.report.decibels import in_decibels

COLLAPSED = 0.5
"""Agreement with the float network below which a result is never called a success."""

LEAST_SQNR = 3.0
"""The same for the SQNR, in dB, of what has no classes, or none the network itself tells of."""

RELATED = 0.2
"""Cohen's kappa below which decisions on noise have nothing to do with the float network's.

Noise shows nothing that a network was made to find, so what it decides there are its closest
decisions, and half of them may change in a network that finds nearly all it did (FastestDet W4A8
keeps 43 % of the classes of noise, and 24.5 of 33.9 points of precision). What no longer depends on
what the float network decides is ruined whatever it is shown.
"""

LEAST_ON_NOISE = 0.0
"""SQNR in dB on noise below which outputs of nothing but zeros would be nearer."""

FELT = 0.2
"""Change of a score behind a sigmoid below which nobody minds what share of the score it is.

Detectors drop what has less; on images without objects all of their scores do.
"""

FloatAndInteger = tuple[np.ndarray, np.ndarray]
"""A tensor of the float network and of the quantized one, batch first."""


@dataclasses.dataclass(frozen=True)
class OutputReport:
    """One part of an output, compared with the float network.

    Attributes:
      name: of the output, and of the part where it has several.
      kind: `classes`, `signs` (one decision for each value) or `values`.
      sqnr: signal to quantization noise in dB, before a final softmax or sigmoid.
      shown: the same of what leaves the network, behind it.
      agreement: share of classes or signs that are the float network's; None for values. Of a
        detector's classes only those count that lead by more than `FELT` in the float network.
      classes: to choose from; 1 for signs, 0 for values.
      dense: whether an image has more than one decision.
      certain: whether the network says itself what this is, by a softmax, a sigmoid or its shape.
      measure: name of the task's own measure, empty where it has none.
      fidelity: how alike the outputs are by it, mean over images, vectors or tokens; of the
        measures of `quantization.outputs` a divergence is good where it is small.
      felt: whether what leaves the network is judged: not where all scores behind a sigmoid are
        nearly what they were, as those of a detector are on images without objects.
      positive: of an image's many signs the share that is positive in the float network; None for
        other decisions. Where hardly one is, an agreement tells what both do not find.
      overlap: of signs that are positive in one of the two networks, the share that is so in both
        (the intersection over the union of masks); None where none is.
      chance: share of decisions that would agree if both networks decided as often for each class,
        but independently; None for values.
      noise: whether it was judged on noise, which tells less (`RELATED`).
    """

    name: str
    kind: Kind
    sqnr: float
    shown: float
    agreement: float | None
    classes: int
    dense: bool
    certain: bool
    felt: bool = True
    measure: str = ""
    fidelity: float | None = None
    positive: float | None = None
    overlap: float | None = None
    chance: float | None = None
    noise: bool = False

    @property
    def kappa(self) -> float:
        """Cohen's kappa: agreement beyond chance, over the most there could be; 1 without any."""
        if self.agreement is None or self.chance is None or self.chance > 1 - 1e-9:
            return 1.0
        return (self.agreement - self.chance) / (1 - self.chance)

    @property
    def unlike(self) -> bool:
        """Whether the network decides too rarely as the float one does."""
        if self.noise and self.chance is not None:
            return self.kappa < RELATED
        return self.agreement is not None and self.agreement < COLLAPSED

    @property
    def fault(self) -> str:
        """Why this output must not be called a success, in words; empty if it may."""
        if math.isnan(self.sqnr):
            return f"output {self.name!r} is not finite"
        if self.certain and self.unlike and self.agreement is not None:
            what = "class" if self.kind == "classes" else "sign"
            rare = self.noise and self.chance is not None
            by_chance = f", and {100 * (self.chance or 0.0):.1f} % would be by chance" * rare
            share = f"{100 * self.agreement:.1f} %"
            return f"output {self.name!r} has the float {what} in only {share}{by_chance}"
        behind = self.classes <= 1 and self.felt
        sqnr = min(self.sqnr, self.shown) if behind else self.sqnr
        least = LEAST_ON_NOISE if self.noise else LEAST_SQNR
        if not sqnr >= least and not (self.certain and self.kind == "classes"):
            return f"output {self.name!r} has an SQNR of only {in_decibels(sqnr)}"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "name": self.name,
            "kind": self.kind,
            "sqnr": finite_or_none(self.sqnr),
            "sqnr_returned": finite_or_none(self.shown),
            "agreement": self.agreement,
            "positive": self.positive,
            "overlap": self.overlap,
            "chance": self.chance,
            "passed": not self.fault,
            **({self.measure: told(self.fidelity)} if self.measure else {}),
        }


def told(value: float | None) -> float | None:
    """For JSON: None of nothing and of what is not finite."""
    return None if value is None else finite_or_none(value)


class Tally(NamedTuple):
    """What some images tell of a part; sums over them add up.

    Attributes:
      before: energy of signal and of error, before softmax or sigmoid.
      behind: the same behind it.
      same: decisions that agree.
      decisions: how many there are.
      largest: error of a value behind it.
      own: the task's own measure.
      positive: signs that are positive in the float network.
      either: those that are so in one of the two.
      chance: decisions that would agree by chance.
    """

    before: Float[np.ndarray, "2"]
    behind: Float[np.ndarray, "2"]
    same: int
    decisions: int
    largest: float = 0.0
    own: Fidelity = Fidelity()
    positive: int = 0
    either: int = 0
    chance: float = 0.0

    def plus(self, other: "Tally") -> "Tally":
        """Both together."""
        return Tally(
            self.before + other.before,
            self.behind + other.behind,
            self.same + other.same,
            self.decisions + other.decisions,
            max(self.largest, other.largest),
            self.own.plus(other.own),
            self.positive + other.positive,
            self.either + other.either,
            self.chance + other.chance,
        )


def tally(part: Part, tensors: Mapping[str, FloatAndInteger], task: Task) -> Tally:
    """Compares a part on some images.

    Args:
      part: which.
      tensors: {tensor: float and quantized}, with the part's tensor and its output.
      task: what the network is for.
    """
    before = [part.of_tensor(x) for x in tensors[part.tensor]]
    behind = [part.of_output(x) for x in tensors[part.output]]
    exact, rough = (decisions(part, x) for x in (behind if part.curve == "softmax" else before))
    if isinstance(task, Detector) and part.axis is not None and part.curve == "softmax":
        clear = ahead(part.axis, behind[0]) > FELT
        exact, rough = exact[clear], rough[clear]
    same, largest = int((exact == rough).sum()), largest_error(*behind)
    own = fidelity(task, *(before if isinstance(task, LanguageModel) else behind))
    signs = part.kind == "signs" and part.axis is None
    positive, either = (int(exact.sum()), int((exact | rough).sum())) if signs else (0, 0)
    energy = energies(*before), energies(*behind)
    chance = by_chance(exact, rough) if part.kind != "values" else 0.0
    return Tally(*energy, same, exact.size, largest, own, positive, either, chance)


def ahead(axis: int, probabilities: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "n ..."]:
    """By how much the likeliest class leads, at every position.

    A detector has classes where nothing is, too, and any will do there.
    """
    count = probabilities.shape[axis + 1]
    if count == 1:
        return np.ones_like(np.take(probabilities, 0, axis + 1))
    second, first = (
        np.take(np.partition(probabilities, (-2, -1), axis + 1), count - n, axis + 1)
        for n in (2, 1)
    )
    return first - second


def decisions(part: Part, values: np.ndarray) -> np.ndarray:
    """The class at every position, or the sign of every value; nothing for plain values."""
    if part.axis is not None:
        return values.argmax(part.axis + 1)
    return values > 0 if part.kind == "signs" else values[:0]


def by_chance(exact: np.ndarray, rough: np.ndarray) -> float:
    """How many decisions would agree if the two were made as often for each class, but at random.

    Args:
      exact: classes or signs of the float network.
      rough: of the quantized one.
    """
    if not exact.size:
        return 0.0
    most = int(max(exact.max(), rough.max())) + 1
    counts = [np.bincount(x.reshape(-1).astype(np.int64), minlength=most) for x in (exact, rough)]
    return float(np.dot(counts[0].astype(np.float64), counts[1])) / exact.size


def energies(exact: np.ndarray, rough: np.ndarray) -> Float[np.ndarray, "2"]:
    """Energy of the signal and of its error."""
    exact, rough = exact.astype(np.float64), rough.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.array([np.sum(exact**2), np.sum((exact - rough) ** 2)])


def largest_error(exact: np.ndarray, rough: np.ndarray) -> float:
    """Of any value; infinite if one is no number."""
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.abs(exact.astype(np.float64) - rough.astype(np.float64))
    return float(np.nan_to_num(found, nan=np.inf).max(initial=0.0))


def output_report(part: Part, found: Tally, task: Task) -> OutputReport:
    """The entry of a part."""
    classes = part.where.shape[part.axis] if part.axis is not None else int(part.kind == "signs")
    dense = part.where.size > max(classes, 1)
    masks = dense and part.kind == "signs" and part.axis is None and found.decisions > 0
    both = found.same - (found.decisions - found.either)  # signs that agree less the negative ones
    return OutputReport(
        part.name,
        part.kind,
        decibels(found.before),
        decibels(found.behind),
        found.same / found.decisions if found.decisions else None,
        classes,
        dense,
        part.certain,
        part.curve != "sigmoid" or found.largest > FELT,
        MEASURES.get(type(task), "") if found.own.number else "",
        found.own.mean,
        found.positive / found.decisions if masks else None,
        both / found.either if masks and found.either else None,
        found.chance / found.decisions if found.decisions else None,
    )


def leading(outputs: Sequence[OutputReport]) -> OutputReport | None:
    """The part that suffers most, of those that decide if any does; None where nothing comes out.

    Of decisions the agreement tells, of values the SQNR; of equals the first counts.
    """
    deciding = [o for o in outputs if o.agreement is not None]
    if deciding:
        return min(deciding, key=lambda o: (o.agreement, not_finite_least(o.sqnr)))
    return min(outputs, key=lambda o: not_finite_least(o.sqnr), default=None)


def not_finite_least(sqnr: float) -> float:
    """For comparisons: what is no number is worse than any."""
    return -math.inf if math.isnan(sqnr) else sqnr


def decibels(energies: Float[np.ndarray, "2"]) -> float:
    """`10 log10(signal / noise)`; infinite without noise."""
    signal, noise = energies
    if not np.isfinite(signal) or not np.isfinite(noise):
        return float("nan")
    if noise == 0:
        return float("inf")
    return 10 * math.log10(max(float(signal), 1e-30) / float(noise))


def positive_ones(outputs: Sequence[OutputReport]) -> str:
    """What of signs is positive where the part that suffers most has many, in brackets; else "".

    A mask that is empty agrees with any other that nearly is.
    """
    of = leading(outputs)
    return "" if of is None or of.positive is None else f" ({overlapping(of)})"


def overlapping(output: OutputReport) -> str:
    """How far what is positive in the float network is so in the other, in words."""
    if output.overlap is None:
        return "none positive: what it finds is not told"
    return (
        f"{100 * (output.positive or 0.0):.2g} % positive; of those in either network "
        f"{100 * output.overlap:.1f} % in both"
    )
