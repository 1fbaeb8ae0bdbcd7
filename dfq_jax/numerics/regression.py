"""Layers fitted anew by least squares, to what they should put out."""

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float

MOST_INPUTS = 8192
"""Widest layer whose inputs are related to each other: its matrix takes half a GiB."""


def too_wide(inputs: int) -> bool:
    """Whether a layer has more inputs than can be related to each other.

    Behind a flattened image a layer may read 25,088 of them, of which images show a few hundred.
    """
    return inputs > MOST_INPUTS


def refitted(
    gram: Float[np.ndarray, "k k"],
    cross: Float[np.ndarray, "k whole"],
    whole: Float[np.ndarray, "whole o"],
    start: Float[np.ndarray, "k o"],
    damping: float,
) -> Float[np.ndarray, "k o"]:
    """Weights that do to what is left of a layer's inputs what its own did to all of them.

    Args:
      gram: second moments of what is left, `x'^T x' / n`.
      cross: with what there was, `x'^T x / n`.
      whole: the weights, of all inputs.
      start: weights of what is left from which to depart as little as possible.
      damping: pulls towards them, in units of the mean diagonal of `gram`.

    Returns:
      `argmin_v |x' v - x w|^2 / n + damping * mean diagonal * |v - start|^2`.

    Reference:
      He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", equation of the
      least squares reconstruction; UDFC's ridge of the next layer.
    """
    power = float(np.trace(gram)) / max(len(gram), 1)
    pull = max(damping * power, 1e-12)
    system = gram + pull * np.eye(len(gram))
    return scipy.linalg.solve(system, cross @ whole + pull * start, assume_a="pos")


def refitted_where(
    stays: Bool[np.ndarray, "k o"],
    gram: Float[np.ndarray, "k k"],
    target: Float[np.ndarray, "k o"],
) -> Float[np.ndarray, "k o"]:
    """Weights of which only some may differ from zero, in least squares.

    Args:
      stays: which may.
      gram: second moments of the inputs, positive definite.
      target: of the inputs with what each output should be.

    Returns:
      `argmin_v v^T gram v - 2 v^T target` over the weights that stay, output by output.
    """
    found = np.zeros(target.shape)
    for output, there in enumerate(stays.T):
        rows = np.flatnonzero(there)
        system, wanted = gram[np.ix_(rows, rows)], target[rows, output]
        found[rows, output] = scipy.linalg.solve(system, wanted, assume_a="pos")
    return found
