"""Weights at zero: which, and how the others make up for them (optimal brain surgeon)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

Matrix = Float[np.ndarray, "k o"]
DAMPING = 0.01
"""Added to the diagonal of a Gram matrix, in units of its mean."""


class Pattern(NamedTuple):
    """Which weights of an output may differ from zero.

    Attributes:
      kept: at most so many of `among` neighbours; or a share in (0, 1) of all, where that is 0.
      among: inputs that lie beside each other; 0 for no pattern.
    """

    kept: float
    among: int = 0

    def __str__(self) -> str:
        """`2:4`, or the share of zeros."""
        return f"{self.kept:g}:{self.among}" if self.among else f"{100 * (1 - self.kept):g}% zeros"

    def fits(self, inputs: int) -> bool:
        """Whether so many inputs can be divided as the pattern demands."""
        return self.among == 0 or inputs % self.among == 0


def surviving(scores: Matrix, pattern: Pattern) -> Bool[np.ndarray, "k o"]:
    """Which weights stay: of each group of neighbours, or of all, those of the largest scores.

    Of equal scores those stay that come first.
    """
    if pattern.among == 0:
        count = round(pattern.kept * scores.size)
        stays = np.zeros(scores.size, bool)
        stays[np.argsort(-scores.ravel(), kind="stable")[:count]] = True
        return stays.reshape(scores.shape)
    grouped = scores.reshape(-1, pattern.among, scores.shape[-1])
    order = np.argsort(np.argsort(-grouped, 1, kind="stable"), 1, kind="stable")
    return (order < pattern.kept).reshape(scores.shape)


def sparse(w: Matrix, gram: Float[np.ndarray, "k k"], pattern: Pattern) -> Matrix:
    """Weights of which some are zero, those that are not moved to make up for them.

    Inputs are gone through in order. What is removed of one is taken over by those that follow,
    `w_rest -= w_i / U_ii * U_i,rest`, with `U` the upper Cholesky factor of the inverse Gram
    matrix; which of a group go is decided when it is reached, by `w_i^2 / U_ii^2`.

    Args:
      w: of one layer, inputs by outputs.
      gram: second moments of its inputs.
      pattern: how many stay.

    Returns:
      Weights with exact zeros.

    Reference:
      Hassibi & Stork 1993, "Optimal Brain Surgeon" (what the others take over); Frantar & Alistarh
      2023, "SparseGPT" (inputs in a fixed order, all outputs at once).
    """
    mean = max(float(np.trace(gram)) / len(gram), 1e-30)
    inverse = np.linalg.inv(gram + DAMPING * mean * np.eye(len(gram)))
    factor = np.linalg.cholesky(inverse).T
    diagonal = np.diag(factor)[:, None]
    left, block = w.copy(), pattern.among or len(w)
    stays = np.ones(w.shape, bool)
    for i in range(len(w)):
        if i % block == 0:
            part = slice(i, i + block)
            stays[part] = surviving(left[part] ** 2 / diagonal[part] ** 2, pattern)
        gone = np.where(stays[i], 0.0, left[i]) / factor[i, i]
        left[i] *= stays[i]
        left[i + 1 :] -= np.outer(factor[i, i + 1 :], gone)
    return left


def error(gap: Matrix, gram: Float[np.ndarray, "k k"]) -> float:
    """`sum_o d_o^T H d_o`: what a change of weights does to a layer's outputs."""
    return float(np.sum(gap * (gram @ gap)))
