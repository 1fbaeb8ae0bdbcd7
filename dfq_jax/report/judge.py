"""What is thought of a network by its outputs; the one place where remedies are judged."""

import math

import numpy as np

from dfq_jax.quantize.levels import Judged, Outputs


def judged(exact: Outputs, rough: Outputs) -> Judged:
    """The SQNR of the output that suffers most, and how far the first output agrees.

    Args:
      exact: outputs of the float network, Float[n ...] each.
      rough: of the other network, for the same images.

    Returns:
      Both; the SQNR is minus infinity where an output is not finite. Classes lie along the last
      axis; of a single score the sign counts.
    """
    fidelity = min(sqnr(a, b) for a, b in zip(exact, rough, strict=True))
    choices = [decisions(outputs[0]) for outputs in (exact, rough)]
    return Judged(fidelity, float(np.mean(choices[0] == choices[1])))


def sqnr(exact: np.ndarray, rough: np.ndarray) -> float:
    """Signal to noise of one output in dB."""
    a, b = exact.astype(np.float64), rough.astype(np.float64)
    signal, noise = float(np.sum(a**2)), float(np.sum((a - b) ** 2))
    if not math.isfinite(signal) or not math.isfinite(noise):
        return -math.inf
    return 10 * math.log10(max(signal, 1e-30) / noise) if noise > 0 else math.inf


def decisions(scores: np.ndarray) -> np.ndarray:
    """The class at every position, or the sign of a single score."""
    return scores[..., 0] > 0 if scores.shape[-1] == 1 else np.argmax(scores, axis=-1)
