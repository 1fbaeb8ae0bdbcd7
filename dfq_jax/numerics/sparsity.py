"""Weights at zero: which, and how the others make up for them (optimal brain surgeon)."""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Matrix = Float[np.ndarray, "k o"]
DAMPING = 0.01
"""Added to the diagonal of a Gram matrix, in units of its mean."""
ROUNDS = 32
"""Times that groups of neighbours are paired to be divided anew."""
MOST_HALVES = 35
"""Ways to divide two groups that are tried: all of those of four."""


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


def arranged(
    scores: Float[np.ndarray, "inputs k"], pattern: Pattern, *, rounds: int = ROUNDS
) -> Int[np.ndarray, " inputs"]:
    """Inputs in an order in which more of the scores survive a pattern.

    Two groups of neighbours at a time are divided anew in the way that keeps most, all groups
    paired at random in each round. What survives never gets less.

    Args:
      scores: of each weight, nonnegative; columns are independent.
      pattern: of neighbours.
      rounds: how often all groups are paired.

    Returns:
      Which input comes to each place.

    Reference:
      Pool & Yu 2021, "Channel Permutations for N:M Sparsity" (exhaustive search of a few columns
      at a time); pairs of groups, drawn at random, are ours.
    """
    among, kept, rng = pattern.among, int(pattern.kept), np.random.default_rng(0)
    order, values = np.arange(len(scores)), scores.astype(np.float32)
    every = range(2 * among)
    halves = [half for half in itertools.combinations(every, among) if 0 in half]
    if len(halves) > MOST_HALVES:
        drawn = rng.choice(len(halves), MOST_HALVES - 1, replace=False)
        halves = [halves[0], *(halves[i] for i in drawn)]
    for _ in range(rounds if len(order) > among else 0):
        groups = order.reshape(-1, among)[rng.permutation(len(order) // among)]
        paired = groups[: len(groups) // 2 * 2].reshape(-1, 2 * among)
        parts = values[paired]
        sums = {c: parts[:, c].sum(1) for c in itertools.combinations(every, kept)}
        worth = lambda half, sums=sums: np.max(
            [sums[c] for c in itertools.combinations(half, kept)], axis=0
        ).sum(1)
        rests = [tuple(i for i in every if i not in half) for half in halves]
        found = [worth(half) + worth(rest) for half, rest in zip(halves, rests, strict=True)]
        best = np.argmax(found, axis=0)
        divided = np.array([(*half, *rest) for half, rest in zip(halves, rests, strict=True)])
        paired = np.take_along_axis(paired, divided[best], 1)
        order = np.concatenate([paired.reshape(-1), groups[len(groups) // 2 * 2 :].reshape(-1)])
    return order
