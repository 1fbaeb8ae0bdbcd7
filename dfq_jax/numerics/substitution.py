"""Channels that are gone, said by those that are left: `z_j ~ sum_k c_jk z_k`, in closed form.

Filters have their batch norms folded in. All that is known of them is `FilterGram`: products of
filters with each other, biases, and variances of what they put out. Whatever read channel `j` reads
the others instead, `V[:, k] += sum_j c_jk V[:, j]`.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int

Places = Int[np.ndarray, " _"]
Coefficients = Float[np.ndarray, "_ _"]
LEAST_COSINE = 0.1
"""Filters less alike are not merged: ours."""
BIAS_SHARE = 0.15
"""Weight of the distance of biases beside that of directions: ours."""


class FilterGram(NamedTuple):
    """What is known of the filters behind a tensor's channels.

    Attributes:
      gram: products of filters, `<w_i, w_j>`.
      bias: of each.
      var: of what each puts out.
      gain: of its batch norm, by which the filter was multiplied.
    """

    gram: Float[np.ndarray, "c c"]
    bias: Float[np.ndarray, " c"]
    var: Float[np.ndarray, " c"]
    gain: Float[np.ndarray, " c"]


def merged(known: FilterGram, gone: Places, left: Places) -> Coefficients:
    """Each filter is replaced by the one left that is most like it, as much as it is longer.

    `c_jk = |w_j| / |w_k|` for the `k` of least `1 - cos(w_j, w_k)`, with a share of the distance
    of biases, and nothing where no filter has a cosine of `LEAST_COSINE`.

    Reference:
      Kim et al. 2020, "Neuron Merging: Compensating for Pruned Neurons"; threshold and share of
      biases, which its authors tune by network, are ours.
    """
    length = np.sqrt(np.maximum(np.diag(known.gram), 1e-30))
    cosine = (known.gram / np.outer(length, length))[np.ix_(gone, left)]
    bias = known.bias / length
    apart = np.abs(bias[gone][:, None] - bias[left][None])
    apart = apart / max(float(apart.max(initial=0.0)), 1e-30)
    best = np.argmin((1 - BIAS_SHARE) * (1 - cosine) + BIAS_SHARE * apart, 1)
    rows = np.arange(len(gone))
    found = np.zeros((len(gone), len(left)))
    enough = cosine[rows, best] >= LEAST_COSINE
    found[rows, best] = np.where(enough, length[gone] / length[left][best], 0.0)
    return found


def lbyl(
    known: FilterGram, gone: Places, left: Places, *, bias: float = 2e-5, size: float = 0.05
) -> Coefficients:
    """Each filter as a sum of all that are left, by least squares.

    `c = argmin |w_j - sum c_k w_k|^2 / g_j^2 + lam1 (b_j - sum c_k b_k)^2 + lam2 sum c_k^2`, with
    `g = gamma / sigma`: the paper's objective for coefficients `s_k = c_k g_k / g_j` of filters
    before their batch norms.

    Args:
      known: of the filters.
      gone: which are removed.
      left: which are not.
      bias: `lam1`.
      size: `lam2`; the authors tune both by network and ratio, these lie in their ranges.

    Reference:
      Lee, Kim & Choi 2025, "LeaveBeforeYouLeave: Training-Free Restoration of Pruned Neural
      Networks Without Fine-Tuning".
    """
    gain = np.maximum(known.gain[gone] ** 2, 1e-30)
    b = known.bias[left]
    inner, wanted = known.gram[np.ix_(left, left)], known.gram[np.ix_(left, gone)]
    rest = bias * np.outer(b, b) + size * np.eye(len(left))
    solve = lambda j: symmetric(
        inner / gain[j] + rest, wanted[:, j] / gain[j] + bias * known.bias[gone[j]] * b
    )
    return np.stack([solve(j) for j in range(len(gone))])


def udfc(
    known: FilterGram, gone: Places, left: Places, *, bias: float = 0.01, size: float = 1.0
) -> Coefficients:
    """UDFC's restoration of pruned channels, with weights of our own: the paper's formulas are not
    known. What it restores of quantization is `put_back`.

    `c = argmin |w_j - sum c_k w_k|^2 + l1 (b_j - sum c_k b_k)^2 + l2 sum (c_k gamma_k)^2`: the
    residual, the mismatch of biases, and small coefficients, since ReLU is not linear; so
    `(A A^T + l1 b b^T + l2 diag gamma^2) c = A w_j + l1 b_j b`.

    Args:
      known: of the filters.
      gone: which are removed.
      left: which are not.
      bias: `l1` in units of mean |w|^2 / mean b^2.
      size: `l2` in units of mean |w|^2 / mean gamma^2.

    Reference:
      Bai et al. 2023, "Unified Data-Free Compression: Pruning and Quantization without
      Fine-Tuning": the restoration and its three terms.
    """
    power = np.mean(np.diag(known.gram))
    l1 = bias * power / max(float(np.mean(known.bias**2)), 1e-30)
    l2 = size * power / max(float(np.mean(known.var)), 1e-30)
    b = known.bias[left]
    system = known.gram[np.ix_(left, left)] + l1 * np.outer(b, b) + l2 * np.diag(known.var[left])
    wanted = known.gram[np.ix_(left, gone)] + l1 * np.outer(b, known.bias[gone])
    return symmetric(system, wanted).T


def put_back(
    filters: Float[np.ndarray, "c c"], missing: Float[np.ndarray, "c c"], *, size: float = 1.0
) -> Coefficients:
    """What each filter lacks as a sum of all that there are, by damped least squares.

    `c = argmin |(w_m - w~_m) - sum_k c_k w~_k|^2 + l |c|^2`, so `(A A^T + l) c = A (w_m - w~_m)`
    with the rows `w~_k` of `A`: UDFC's restoration of rounding with the whole row in place of a
    scale of its own, and of weights that are zero as well, so that both errors are one.

    Args:
      filters: `A A^T`.
      missing: `<w_m - w~_m, w~_k>`, a row for each filter.
      size: `l` in units of the mean of `|w~|^2`; what is missing is nearly orthogonal to the other
        filters, and a small one does harm.

    Returns:
      A row of coefficients for each filter.

    Reference:
      Bai et al. 2023, "Unified Data-Free Compression: Pruning and Quantization without
      Fine-Tuning": the error is one of pruning and one of quantization; its formulas are not known.
    """
    power = max(float(np.trace(filters)) / max(len(filters), 1), 1e-30)
    return symmetric(filters + size * power * np.eye(len(filters)), missing.T).T


def symmetric(
    system: Float[np.ndarray, "k k"], wanted: Float[np.ndarray, "k ..."]
) -> Float[np.ndarray, "k ..."]:
    """The solution of a symmetric positive system, a little damped."""
    jitter = 1e-9 * max(float(np.trace(system)) / max(len(system), 1), 1e-30)
    return scipy.linalg.solve(system + jitter * np.eye(len(system)), wanted, assume_a="pos")
