"""What is thought of a network by its outputs; the one place where remedies are judged."""

import math

import numpy as np

from dfq_jax.allocation.candidates import Judge, Judged, Outputs
from dfq_jax.graph.graph import Model
from dfq_jax.graph.heads import Part
from dfq_jax.graph.tasks import Task, parts_of
from dfq_jax.report.outputs import decisions


def judge_of(model: Model, task: Task | None = None) -> Judge:
    """Judges other networks by the output of least SQNR and the part of least agreement.

    Args:
      model: the float network.
      task: what it is for; None for what its graph says.

    Returns:
      The SQNR is minus infinity where an output is not finite; without decisions all agree.
    """
    parts = parts_of(model, task)
    places = {name: index for index, name in enumerate(model.graph.outputs)}
    deciding = [(places[part.output], part) for part in parts if part.kind != "values"]

    def judged(exact: Outputs, rough: Outputs) -> Judged:
        worst = min(sqnr(a, b) for a, b in zip(exact, rough, strict=True))
        same = [np.mean(chosen(part, exact[i]) == chosen(part, rough[i])) for i, part in deciding]
        return Judged(worst, float(min(same, default=1.0)))

    return judged


def chosen(part: Part, output: np.ndarray) -> np.ndarray:
    """The decisions of a part as it leaves the network: a sigmoid decides at one half."""
    values = part.of_output(output)
    return decisions(part, values - 0.5 if part.curve == "sigmoid" else values)


def sqnr(exact: np.ndarray, rough: np.ndarray) -> float:
    """Signal to noise of one output in dB."""
    a, b = exact.astype(np.float64), rough.astype(np.float64)
    signal, noise = float(np.sum(a**2)), float(np.sum((a - b) ** 2))
    if not math.isfinite(signal) or not math.isfinite(noise):
        return -math.inf
    return 10 * math.log10(max(signal, 1e-30) / noise) if noise > 0 else math.inf
