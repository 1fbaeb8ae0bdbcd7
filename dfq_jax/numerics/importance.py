"""How much a channel matters: scores of filters and of what is done with what they make.

Filters are rows: one a channel, of all weights that make it.
"""

import numpy as np
from jaxtyping import Float, Int

Rows = Float[np.ndarray, "channels weights"]
Scores = Float[np.ndarray, " channels"]


def power(rows: Rows, p: float) -> Scores:
    """`sum_i |w_i|^p` of every filter."""
    return (np.abs(rows) ** p).sum(1)


def norm(rows: Rows, p: float) -> Scores:
    """`(sum_i |w_i|^p)^(1/p)` of every filter.

    Reference:
      Li et al. 2017, "Pruning Filters for Efficient ConvNets" (p = 1).
    """
    return power(rows, p) ** (1 / p)


def distances(rows: Rows) -> Scores:
    """`sum_k |w_j - w_k|_2`: small for a filter near the geometric median of all, which others
    can stand in for.

    Reference:
      He et al. 2019, "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
      Acceleration".
    """
    squares = (rows**2).sum(1)
    gaps = squares[:, None] + squares[None] - 2 * rows @ rows.T
    return np.sqrt(np.maximum(gaps, 0)).sum(1)


def left_unexplained(gram: Float[np.ndarray, "c c"], damping: float) -> Scores:
    """Mean square of each of some variables that no linear function of the others accounts for.

    Args:
      gram: their second moments.
      damping: added to its diagonal, in units of its mean.

    Returns:
      `1 / (G^-1)_jj`, what removing one costs once the others make up for it.

    Reference:
      Hassibi & Stork 1993, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon",
      with a layer's inputs in place of weights.
    """
    size = len(gram)
    mean = max(float(np.trace(gram)) / size, 1e-30)
    return 1 / np.diag(np.linalg.inv(gram + damping * mean * np.eye(size)))


def normalised(scores: Scores, group: Int[np.ndarray, " channels"]) -> Scores:
    """Scores in units of the mean of their group, so that groups can be compared.

    Args:
      scores: nonnegative.
      group: the number of the group of each, from 0.

    Returns:
      Scores whose mean is 1 in every group that has any.

    Reference:
      Fang et al. 2023, "DepGraph: Towards Any Structural Pruning"; the normalisation is that of
      its library, Torch-Pruning.
    """
    count = np.bincount(group)
    mean = np.bincount(group, scores) / np.maximum(count, 1)
    return scores / np.maximum(mean, 1e-30)[group]
