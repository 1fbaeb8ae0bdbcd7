"""Weights made from weights: kernels that a network standardises each time it runs, in NumPy."""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray


def batch_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Array:
    """Batch norm of a constant: with its own statistics where there are no others.

    Reference:
      Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and Weight
      Standardization", is what it serves.
    """
    axes = (0, *range(2, x.ndim))
    shape = (1, -1, *(1,) * (x.ndim - 2))
    mean, var = running_mean, running_var
    if training or mean is None or var is None:
        mean, var = x.mean(axes), x.var(axes)
    y = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + eps)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def reshape_as(x: Array, other: Array) -> Array:
    """x in the shape of another array."""
    return x.reshape(other.shape)


FOLD_WEIGHTS: dict[str, Callable[..., Any]] = {
    "batch_norm": batch_norm,
    "reshape_as": reshape_as,
    "view_as": reshape_as,
}
