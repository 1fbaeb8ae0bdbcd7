"""The expected loss of top-1 accuracy on real images, estimated from images made of the network.

Probes (`recipes/probes.py`) pass through the float and the quantized network. What the difference
of their scores does to decisions on real images is reckoned in `numerics/decisions.py`. The
interval counts what that cannot know: how large margins of real images are, how accurate the float
network is unless somebody says, and the chance in which images are looked at.
"""

import dataclasses
import math
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Shaped

from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.tasks import Classifier, Noun, Task, noun_of, parts_of
from dfq_jax.numerics.decisions import Scores, expected_loss, noise_of
from dfq_jax.quantization.node_by_node import BATCH, in_float, outputs_of, simulating
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.types import InputContract

Confidence = Literal["usual", "low"]
ACCURACIES = (0.65, 0.80, 0.92)
"""Of the float network where nobody says: low, usual, high."""
SPREAD, SPREAD_OF_NOISE = 0.6, 1.2
"""Deviation of the estimate's log odds from what is measured; where the probes are noise."""
COLLAPSED = 0.5
"""Share of the accuracy beyond which a loss is never called a success."""
IMAGES = 1000
"""Real images that the interval is about: so many labelled ones show a loss inside of it."""
SIGMAS = NormalDist().inv_cdf(0.95)
"""Half width of an interval of 90 %, in deviations."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What quantization is expected to cost on real images.

    Attributes:
      loss: expected loss of top-1 accuracy, a fraction.
      low: of an interval in which nine of ten losses lie that 1,000 labelled images show; below 0
        where a network may gain by chance.
      high: its other end.
      changed: expected share of images given another class.
      accuracy: range of the float network's top-1 that was assumed.
      probes: how many images were looked at.
      confidence: `low` where the probes are noise, which says little about the network.
      noun: what people call one of what it reads.
    """

    loss: float
    low: float
    high: float
    changed: float
    accuracy: tuple[float, float]
    probes: int
    confidence: Confidence = "usual"
    noun: Noun = "image"

    @property
    def collapsed(self) -> bool:
        """Whether half of the accuracy is lost; where little is known, at the least."""
        sure_loss = self.low if self.confidence == "low" else self.loss
        return sure_loss > COLLAPSED * middle(self.accuracy)

    @property
    def failure(self) -> str:
        """Why the network may not be called a success, in words; empty if it may."""
        if not self.collapsed:
            return ""
        return (
            f"it is expected to lose {points(self)} of top-1 on real {self.noun}s, more than half "
            f"of its accuracy ({100 * middle(self.accuracy):.0f} %)"
        )


def points(found: Estimate) -> str:
    """The expected loss in words: `0.6 points (-0.1 to 1.4 on 1,000 images)`.

    Where probes are noise only its range is told, in whole points: `0 to 3 points`. What real
    images lost lay anywhere in there (docs/RESULTS.md, networks without statistics).
    """
    if found.confidence == "low":
        return f"{max(0, math.floor(100 * found.low))} to {math.ceil(100 * found.high)} points"
    return (
        f"{100 * found.loss:.1f} points "
        f"({100 * found.low:.1f} to {100 * found.high:.1f} on {IMAGES:,} {found.noun}s)"
    )


def told_as_data(found: Estimate | None) -> dict[str, Any]:
    """An estimate as JSON data; the same keys without values if there is none."""
    return {
        "expected_loss": found and found.loss,
        "expected_loss_low": found and found.low,
        "expected_loss_high": found and found.high,
        "expected_changed": found and found.changed,
        "assumed_accuracy": found and list(found.accuracy),
        "probes": found and found.probes,
    }


def trust_words(found: Estimate) -> list[str]:
    """An estimate as lines of at most 80 columns."""
    low, high = found.accuracy
    lines = [
        f"expected loss of top-1 on real {found.noun}s {points(found)}",
        f"  estimated from {found.probes} probes made from the network; not a measurement",
    ]
    if found.confidence == "low":
        lines.append("  the probes are noise, which tells no more about it: low confidence")
    if low == high:
        return lines
    spared = f"  its accuracy may be {100 * low:.0f} to {100 * high:.0f} %: "
    return [*lines, f"{spared}`accuracy=0.72`, if you know it, narrows this"]


def check_accuracy(accuracy: float | None) -> None:
    """Refuses an accuracy that is none.

    Raises:
      UsageError: unless it is None or in (0, 1].
    """
    if accuracy is None or 0 < accuracy <= 1:
        return
    hint = f"; say {accuracy / 100:g}, not {accuracy:g}" if 1 < accuracy <= 100 else ""
    raise UsageError(f"accuracy is a fraction above 0 and at most 1, got {accuracy:g}{hint}.")


def judges_classes(model: Model, task: Task | None = None) -> bool:
    """Whether a network gives an image one vector of scores, two or more: a classifier of images.

    A vector that its graph shows to be a state or a direction is none (`graph/heads.py`).

    Args:
      model: the network.
      task: what it is for; None for what its graph says.
    """
    image = len(model.inputs) == 1 and isinstance(model.inputs[0], InputContract)
    if not image or not isinstance(task, Classifier | None):
        return False
    parts = parts_of(model, task)
    return (
        len(model.graph.outputs) == len(parts) == 1
        and parts[0].kind == "classes"
        and parts[0].where.ndim == 1
    )


def estimate(
    reference: Model,
    quantized: QuantizedModel,
    probes: Shaped[Array, "n ..."],
    accuracy: float | None = None,
    *,
    confidence: Confidence = "usual",
    batch: int = BATCH,
) -> Estimate:
    """Estimates what quantization costs a classifier on real images.

    Args:
      reference: the float network.
      quantized: the quantized one.
      probes: normalised images, of `recipes.probes.probes_of`.
      accuracy: top-1 of the float network, in (0, 1], if known.
      confidence: `low` where the probes are noise.
      batch: probes per forward pass.

    Raises:
      UsageError: for an accuracy that is none.
    """
    check_accuracy(accuracy)
    first = lambda run, of: outputs_of(run, of.graph.outputs[:1], probes, batch)[0]
    exact = first(in_float(reference), reference)
    rough = first(simulating(quantized), quantized.model)
    found = estimated(exact, rough, accuracy, confidence=confidence)
    return dataclasses.replace(found, noun=noun_of(reference.input))


def estimated(
    exact: Scores, rough: Scores, accuracy: float | None = None, *, confidence: Confidence = "usual"
) -> Estimate:
    """The estimate from scores of the float and the quantized network.

    Args:
      exact: of the float network, one row a probe; at least two classes.
      rough: of the quantized network.
      accuracy: top-1 of the float network, in (0, 1], if known.
      confidence: `low` where the probes are noise.

    Raises:
      UsageError: for an accuracy that is none.
    """
    check_accuracy(accuracy)
    levels = ACCURACIES if accuracy is None else (accuracy,) * 3
    about = ((levels[0], levels[-1]), len(exact), confidence)
    if not (np.isfinite(exact).all() and np.isfinite(rough).all()):
        return Estimate(levels[1], 0.0, levels[-1], 1.0, *about)
    noise = noise_of(logits(exact), logits(rough))
    found = [expected_loss(noise, level) for level in dict.fromkeys(levels)]
    (least, _), (loss, changed), (most, _) = found if len(found) == 3 else found * 3
    spread = math.hypot(
        SPREAD if confidence == "usual" else SPREAD_OF_NOISE,
        math.log(max(most, 1e-9) / max(least, 1e-9)) / (2 * SIGMAS),
    )
    chance = SIGMAS * math.sqrt(changed / IMAGES)
    low, high = (shifted(loss / levels[1], side * SIGMAS * spread) for side in (-1, 1))
    ends = low * levels[1] - chance, min(high * levels[1] + chance, levels[-1])
    return Estimate(loss, *ends, changed, *about)


def logits(scores: Scores) -> Scores:
    """Scores in float64; of probabilities the logarithm, which is logits but for a constant."""
    scores = np.asarray(scores, np.float64)
    sums_to_one = scores.min() >= 0 and np.allclose(scores.sum(1), 1, atol=1e-3)
    return np.log(np.maximum(scores, 1e-30)) if sums_to_one else scores


def shifted(share: float, by: float) -> float:
    """A share in [0, 1] with its log odds moved."""
    odds = share / max(1 - share, 1e-9) * math.exp(by)
    return odds / (1 + odds)


def middle(accuracy: tuple[float, float]) -> float:
    """The accuracy that an estimate is about."""
    return accuracy[0] if accuracy[0] == accuracy[1] else ACCURACIES[1]
