"""Outputs of every way to run a quantized network, compared with those of the simulator.

Two exact roundings of one network do not give equal outputs: a value half way between two codes may
go either way, and what follows is rounded differently. But they differ by no more than rounding
adds. So a part of an output (`graph/heads.py`) is compared in units of the noise that rounding
activations adds to it: the root mean square of the simulator less the same network whose
activations are not rounded (kernels and biases are). Weights are rounded in both, so what is left
is what two ways to round may disagree about. It needs no float original: the network on its way
into the file and the one read back from a folder give the same unit.

A decision between classes counts where the margin of the network that does not round is far larger
than its noise, that of its image and that of its own scores; where none is, nothing is said about
classes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from dfq_jax.base.finite import finite_or_none
from dfq_jax.graph.heads import Part

CLEAR = 6.0
"""Deviations of a margin's error above which a decision counts."""

LEAST_NOISE = 1e-3
"""Smallest unit of difference, as a share of the output: what float arithmetic may differ by."""

LEAST_PROBABILITY = 1e-6
"""Probabilities are compared as logarithms, down to this one."""

ROUNDOFF = 1e-6
"""What logarithms of that one may be off by."""


@dataclasses.dataclass(frozen=True)
class EndCheck:
    """Outputs of one way to run the network, compared with those of the simulator.

    Attributes:
      runner: `integer`, `onnxruntime off`, `onnxruntime on`, `onnxruntime precise` or
        `onnx reference`.
      difference: largest absolute difference of a value, of any output.
      agreement: share of the decisions that count with the same class, of the output where it is
        smallest; 1 where none counts.
      undecided: share of decisions that do not count, because rounding alone may change them.
    """

    runner: str
    difference: float
    agreement: float
    undecided: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**dataclasses.asdict(self), "difference": finite_or_none(self.difference)}


@dataclasses.dataclass(frozen=True)
class OutputCheck:
    """One part of an output.

    Attributes:
      name: of the part.
      kind: `classes`, `signs` or `values`.
      noise: root mean square of what rounding activations adds, to logarithms of probabilities.
      decisions: how many classes or signs were chosen.
      counted: how many of them by a margin that rounding cannot close.
      differences: {runner: root mean square of its difference, in units of `noise`}.
      agreements: {runner: share of counted decisions that are the simulator's}.
      images: how many were compared.
      values: of the part, an image.
    """

    name: str
    kind: str
    noise: float
    decisions: int
    counted: int
    differences: Mapping[str, float]
    agreements: Mapping[str, float]
    images: int
    values: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        gaps = {k: finite_or_none(v) for k, v in self.differences.items()}
        noise = finite_or_none(self.noise)
        return {**dataclasses.asdict(self), "noise": noise, "differences": gaps}


class DecisionsSeen(NamedTuple):
    """What one batch of n images tells of a part, with `d` decisions an image.

    Attributes:
      noise: mean square of what rounding activations adds, by image.
      near: the same of the values that each decision is taken between.
      signal: mean square of the simulator, by image.
      margins: by how much each decision is taken, before rounding.
      gaps: mean square difference to the simulator, by runner and image.
      same: whether the decision is the simulator's, by runner.
      worst: largest absolute difference of the output itself, by runner.
    """

    noise: Float[np.ndarray, " n"]
    near: Float[np.ndarray, "n d"]
    signal: Float[np.ndarray, " n"]
    margins: Float[np.ndarray, "n d"]
    gaps: Float[np.ndarray, "runners n"]
    same: Bool[np.ndarray, "runners n d"]
    worst: Float[np.ndarray, " runners"]


def look(part: Part, runs: Sequence[np.ndarray]) -> DecisionsSeen:
    """Compares one part of an output on one batch.

    Args:
      part: which.
      runs: the output of the network whose activations are not rounded, of the simulator, and of
        all that is compared with it.
    """
    _, raw, *rest = (part.of_output(y) for y in runs)
    before, ours, *theirs = (legible(part, part.of_output(y)) for y in runs)
    chosen = decisions(part, ours)
    added, told = difference(ours, before), readable(part, ours, before)
    return DecisionsSeen(
        mean_square(added, told),
        noise_near(part, added, told),
        mean_square(ours, told),
        margins(part, before),
        np.stack([mean_square(difference(y, ours), readable(part, y, ours)) for y in theirs]),
        np.stack([decisions(part, y) == chosen for y in theirs]),
        np.array([np.abs(difference(y, raw)).max(initial=0.0) for y in rest]),
    )


def legible(part: Part, values: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "n ..."]:
    """Probabilities as logarithms, in which noise is alike everywhere; others as they are."""
    if part.curve is None:
        return np.asarray(values, np.float64)
    p = np.clip(np.asarray(values, np.float64), LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    return np.log(p) - np.log1p(-p) if part.curve == "sigmoid" else np.log(p)


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a - b`, with nothing between what is equally infinite or no number in both."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        return np.where(same, 0.0, np.asarray(a, np.float64) - b)


def readable(part: Part, a: Float[np.ndarray, "n ..."], b: np.ndarray) -> Bool[np.ndarray, "n ..."]:
    """Where two legible outputs are not both cut at the same end of probabilities.

    Of a thousand classes nearly all are cut in both: their differences of 0 are no measurement.
    """
    if part.curve is None:
        return np.ones(a.shape, bool)
    low = math.log(LEAST_PROBABILITY)
    high = -low if part.curve == "sigmoid" else math.inf
    below, above = (y <= low + ROUNDOFF for y in (a, b)), (y >= high - ROUNDOFF for y in (a, b))
    return ~(np.logical_and(*below) | np.logical_and(*above))


def mean_square(
    x: Float[np.ndarray, "n ..."], told: Bool[np.ndarray, "n ..."]
) -> Float[np.ndarray, " n"]:
    """Over all axes but the first, of the values that tell something; 0 if none does."""
    flat, of = x.reshape(len(x), -1), told.reshape(len(x), -1)
    return np.sum(np.square(flat), axis=1, where=of) / np.maximum(of.sum(axis=1), 1)


def noise_near(
    part: Part, added: Float[np.ndarray, "n ..."], told: Bool[np.ndarray, "n ..."]
) -> Float[np.ndarray, "n d"]:
    """Mean square of what rounding adds to the scores of each decision, or to each sign."""
    if part.kind == "values":
        return np.zeros((len(added), 0))
    square = np.where(told, np.square(added), 0.0)
    if part.axis is None:
        return square.reshape(len(added), -1)
    axis = part.axis + 1
    return (square.sum(axis) / np.maximum(told.sum(axis), 1)).reshape(len(added), -1)


def decisions(part: Part, values: Float[np.ndarray, "n ..."]) -> np.ndarray:
    """The class at every position, or the sign of every value, an image a row."""
    if part.kind == "values":
        return np.zeros((len(values), 0), bool)
    classes = None if part.axis is None else part.axis + 1
    chosen = values > 0 if classes is None else values.argmax(classes)
    return chosen.reshape(len(values), -1)


def margins(part: Part, values: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "n d"]:
    """By how much every decision is taken, in units in which its error is that of two scores."""
    if part.kind == "values":
        return np.zeros((len(values), 0))
    if part.axis is None:
        return math.sqrt(2) * np.abs(values).reshape(len(values), -1)
    best = np.partition(values, -2, axis=part.axis + 1)
    best = np.moveaxis(best, part.axis + 1, -1)
    return (best[..., -1] - best[..., -2]).reshape(len(values), -1)


def output_check(part: Part, seen: Sequence[DecisionsSeen], runners: Sequence[str]) -> OutputCheck:
    """The entry of a part, from all batches."""
    noise, signal = (np.concatenate([getattr(s, k) for s in seen]) for k in ("noise", "signal"))
    unit = max(math.sqrt(noise.mean()), LEAST_NOISE * math.sqrt(signal.mean()))
    near = np.sqrt(np.concatenate([s.near for s in seen]))
    error = np.maximum(near, np.maximum(np.sqrt(noise), unit)[:, None])
    clear = np.concatenate([s.margins for s in seen]) > CLEAR * math.sqrt(2) * error
    gaps = np.sqrt(np.concatenate([s.gaps for s in seen], axis=1).mean(axis=1))
    same = np.concatenate([s.same for s in seen], axis=1)
    agreements = [float(row[clear].mean()) if clear.any() else 1.0 for row in same]
    units = [float(gap / unit) if unit else (math.inf if gap else 0.0) for gap in gaps]
    return OutputCheck(
        part.name,
        part.kind,
        unit,
        clear.size,
        int(clear.sum()),
        dict(zip(runners, units, strict=True)),
        dict(zip(runners, agreements, strict=True)),
        len(noise),
        part.where.size,
    )


def end_checks(
    outputs: Sequence[OutputCheck], worst: Float[np.ndarray, " runners"], runners: Sequence[str]
) -> tuple[EndCheck, ...]:
    """One entry per runner, from those of all parts and its largest difference."""
    counted, every = sum(o.counted for o in outputs), sum(o.decisions for o in outputs)
    undecided = 1 - counted / every if every else 0.0
    agreement = lambda name: min((o.agreements[name] for o in outputs), default=1.0)
    return tuple(
        EndCheck(name, float(worst[i]), agreement(name), undecided)
        for i, name in enumerate(runners)
    )
