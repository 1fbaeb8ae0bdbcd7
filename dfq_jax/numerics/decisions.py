"""How often noise in scores changes a decision, and what that costs.

A noisy network decides otherwise where the noise exceeds the margin, and that costs what a
calibrated network's confidence in the two classes differs by. Noise is measured: probes pass
through both networks. Margins are modelled: those of real images are half normal, on the scale of
the largest margins that probes reach, with other classes behind the second one at distances on
the same scale. Confidence is the softmax of scores at the temperature at
which mean confidence is the network's accuracy. What is expected is a mean over margins, over
probes (for the classes behind the second) and over the noise of probes whose margins are alike.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Scores = Float[np.ndarray, "n classes"]
SURE = 32
"""One in so many probes, those with the largest margins, tells how large margins get."""
SCALE = 0.64
"""Deviation of real margins in units of that; 0.49 to 0.82 in the networks measured."""
THIRD = 0.27
"""Mean distance of the third class behind the second on real images, in units of the deviation of
margins: 0.21 to 0.31 in the networks measured, of 10 classes and of 1,000."""
STRONGER = 1.1
"""Noise on real images in units of that on probes, on average over what was measured."""
LEVELS, DRAWS = 24, 4
ALIKE = 0.375
"""Share of the probes whose margins count as alike."""
LEAST_GAIN = 0.02


class AccuracyLoss(NamedTuple):
    """What noise does to decisions on real images.

    Attributes:
      top1: expected loss of accuracy, in [0, 1].
      changed: expected share of images given another class.
    """

    top1: float
    changed: float


class Noise(NamedTuple):
    """Probes, by their margin ascending, with scores of each in the float network's order.

    Attributes:
      rest: scores of the classes behind the second, relative to it; 0 first, then falling.
      margin: between the best and the second class.
      error: of the quantized network's scores, in units of the float network's.
    """

    rest: Float[np.ndarray, "n others"]
    margin: Float[np.ndarray, " n"]
    error: Scores


def noise_of(exact: Scores, rough: Scores) -> Noise:
    """Noise of logits by margin; a gain common to all changes no decision and is no noise."""
    exact, rough = (x - x.mean(1, keepdims=True) for x in (exact, rough))
    gain = (exact * rough).sum() / max((exact**2).sum(), 1e-30)
    error = STRONGER * (rough / max(gain, LEAST_GAIN) - exact)
    ranks = np.argsort(-exact, axis=1, kind="stable")
    exact, error = (np.take_along_axis(x, ranks, 1) for x in (exact, error))
    margin = exact[:, 0] - exact[:, 1]
    order = np.argsort(margin, kind="stable")
    rest = exact[:, 1:] - exact[:, 1:2]
    return Noise(rest[order], margin[order], error[order])


def expected_loss(noise: Noise, accuracy: float) -> AccuracyLoss:
    """What noise is expected to cost a network of that accuracy on real images."""
    top = noise.margin[-max(1, len(noise.margin) // SURE) :]
    scale = SCALE * float(top.mean())
    noise, margins = noise._replace(rest=spaced(noise.rest, scale)), scale * half_normal(LEVELS)
    heat = temperature(noise.rest, margins, accuracy)
    draws = [decided(noise, margins, heat, np.random.default_rng(i)) for i in range(DRAWS)]
    return AccuracyLoss(*map(float, np.mean(draws, axis=0)))


def spaced(rest: Float[np.ndarray, "n others"], scale: float) -> Float[np.ndarray, "n others"]:
    """Other classes as far behind the second as on real images; on probes they crowd together."""
    behind = -rest[:, 1].mean() if rest.shape[1] > 1 else 0.0
    return rest * (THIRD * scale / behind) if behind > 0 else rest


def half_normal(count: int) -> Float[np.ndarray, " count"]:
    """Evenly spread quantiles of `|x|`, x standard normal."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((1 + (i + 0.5) / count) / 2) for i in range(count)])


def confidences(
    rest: Float[np.ndarray, "n others"], margins: Float[np.ndarray, " m"], heat: float
) -> Float[np.ndarray, "n m"]:
    """Softmax of the best class, for every probe's other classes at every margin."""
    others = np.exp(rest / heat).sum(1)
    return 1 / (1 + others[:, None] * np.exp(-margins / heat))


def temperature(
    rest: Float[np.ndarray, "n others"], margins: Float[np.ndarray, " m"], accuracy: float
) -> float:
    """The temperature of scores at which mean confidence is the accuracy, by bisection."""
    low, high = 1e-3 * margins.max() + 1e-12, 1e3 * margins.max() + 1e-9
    for _ in range(40):
        heat = math.sqrt(low * high)
        sure = confidences(rest, margins, heat).mean() > accuracy
        low, high = (heat, high) if sure else (low, heat)
    return math.sqrt(low * high)


def decided(
    noise: Noise, margins: Float[np.ndarray, " m"], heat: float, random: np.random.Generator
) -> AccuracyLoss:
    """The same with one draw of noise for every probe and margin."""
    probes, alike = len(noise.margin), max(1, round(ALIKE * len(noise.margin)))
    sure = confidences(noise.rest, margins, heat)
    losses, changed = np.zeros(len(margins)), np.zeros(len(margins))
    for i, margin in enumerate(margins):
        first = np.searchsorted(noise.margin, margin) - alike // 2
        first = min(max(first, 0), probes - alike)
        drawn = noise.error[first + random.integers(0, alike, probes)]
        scores = np.concatenate([np.zeros((probes, 1)), noise.rest - margin], axis=1)
        chosen = np.argmax(scores + drawn, axis=1)
        lost = 1 - np.exp(scores[np.arange(probes), chosen] / heat)
        losses[i], changed[i] = np.mean(sure[:, i] * lost), np.mean(chosen != 0)
    return AccuracyLoss(float(losses.mean()), float(changed.mean()))
