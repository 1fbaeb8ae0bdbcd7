"""Weights made from weights, in NumPy: kernels that a network makes anew each time it runs.

Standardised ones, those kept as direction and length, or divided by their largest singular value.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg

from dfq_jax.io.importing.aten_constants import binary, kept_type
from dfq_jax.io.importing.limits import affordable, affordable_product, affordable_shape

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


def normed(name: str, x: Array, *given: Any, **named: Any) -> tuple[Array | None, ...]:
    """Batch norm under its other names, whose statistics nobody may read."""
    if name == "recorded":
        weight, bias, mean, var, momentum, eps = bound(CORE_NAMES[:6], given, named)
        return batch_norm(x, weight, bias, mean, var, False, momentum, eps), None, None, None
    if name == "present":
        weight, bias, _, momentum, eps = bound((*CORE_NAMES[:2], *PRESENT_NAMES), given, named)
        return batch_norm(x, weight, bias, None, None, True, momentum, eps), None, None
    weight, bias, mean, var, training, momentum, eps = bound(TRAINED_NAMES, given, named)
    return batch_norm(x, weight, bias, mean, var, training, momentum, eps), None, None, None, None


def bound(names: Sequence[str], given: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
    """Arguments in order, each given by place or by name."""
    rest = iter(given)
    return [named[n] if n in named else next(rest) for n in names]


def weight_norm(v: Array, g: Array, dim: int = 0) -> Array:
    """_weight_norm: direction `v`, brought to the length `g` along one axis; -1 is all of it.

    Reference:
      Salimans & Kingma 2016, "Weight Normalization".
    """
    axes = tuple(range(v.ndim)) if dim == -1 else tuple(a for a in range(v.ndim) if a != dim)
    return v * (g / np.sqrt(np.sum(v * v, axis=axes, keepdims=dim != -1)))


def weight_norm_interface(v: Array, g: Array, dim: int = 0) -> tuple[Array, None]:
    """_weight_norm_interface: with the lengths before, which nobody may read."""
    return weight_norm(v, g, dim), None


def norm(
    x: Array, ord: float | int = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Array:
    """linalg_vector_norm: the root of the sum of squares, or another power of magnitudes."""
    axes = None if dim is None else tuple([dim] if isinstance(dim, int) else dim)
    ends = {math.inf: np.max, -math.inf: np.min}
    if ord in ends:
        return ends[ord](np.abs(x), axis=axes, keepdims=keepdim)
    if ord == 0:
        return np.sum(x != 0, axis=axes, keepdims=keepdim).astype(x.dtype)
    powers = np.sum(np.abs(x) ** ord, axis=axes, keepdims=keepdim)
    return kept_type(lambda v: v ** (1 / ord), powers)


def multiplied(x: Array, other: Array | None = None, **named: Any) -> Array:
    """mv, dot, vdot, outer products by way of matmul: whatever the second operand is called."""
    second = other if other is not None else next(iter(named.values()))
    affordable(max(x.size, second.size))
    return np.asarray(x @ second)


def product_added(x: Array, mat1: Array, mat2: Array, beta: Any = 1, alpha: Any = 1) -> Array:
    """addmm: beta * x + alpha * mat1 @ mat2."""
    affordable_product(mat1, mat2)
    return kept_type(lambda v: beta * v + alpha * (mat1 @ mat2), x)


def householder(x: Array, tau: Array) -> Array:
    """linalg_householder_product: the first columns of (1 - t v v') (1 - t v v') ...

    Reference:
      LAPACK's `orgqr`, which `torch.nn.utils.parametrizations.orthogonal` relies on.
    """
    rows, columns = x.shape
    affordable(rows * rows)
    product = np.eye(rows, dtype=x.dtype)
    for i in range(tau.shape[-1]):
        v = np.concatenate([np.zeros(i, x.dtype), np.ones(1, x.dtype), x[i + 1 :, i]])
        product = product - tau[i] * np.outer(product @ v, v)
    return product[:, :columns]


def triangle(keep: Callable[..., Array], x: Array, diagonal: int = 0) -> Array:
    """tril, triu."""
    return keep(x, diagonal)


def diagonal(x: Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Array:
    """The values along the diagonal."""
    return np.diagonal(x, offset, dim1, dim2)


def eye(n: int, m: int | None = None, **named: Any) -> Array:
    """The unit matrix, or a part of it."""
    affordable(n * (n if m is None else m))
    return np.eye(n, n if m is None else m, dtype=np.float32)


def solved(A: Array, B: Array, *, left: bool = True) -> Array:
    """linalg_solve: X of A X = B, or of X A = B."""
    return np.linalg.solve(A, B) if left else np.linalg.solve(A.mT, B.mT).mT


def exponential(x: Array) -> Array:
    """matrix_exp."""
    return scipy.linalg.expm(x)


def truths(test: Callable[..., Any], x: Array, dim: Any = None, keepdim: bool = False) -> Array:
    """any, all over some axes."""
    axes = None if dim is None else tuple([dim] if isinstance(dim, int) else dim)
    return np.asarray(test(x, axis=axes, keepdims=keepdim))


def extreme(pick: Callable[..., Any], x: Array, dim: int, keepdim: bool = False):
    """max.dim, min.dim; nobody may read the indices."""
    return pick(x, axis=dim, keepdims=keepdim), None


def empty(size: Sequence[int], **named: Any) -> Array:
    """A tensor that others are written into: zeros, so that nothing depends on what was there."""
    return np.zeros(affordable_shape(size), np.float32)


CORE_NAMES = ("weight", "bias", "running_mean", "running_var", "momentum", "eps")
PRESENT_NAMES = ("training", "momentum", "eps")
TRAINED_NAMES = (*CORE_NAMES[:4], *PRESENT_NAMES)
FOLD_WEIGHTS: dict[str, Callable[..., Any]] = {
    "batch_norm": batch_norm,
    "reshape_as": reshape_as,
    "view_as": reshape_as,
    "_native_batch_norm_legit_no_training": partial(normed, "recorded"),
    "native_batch_norm": partial(normed, "trained"),
    "_native_batch_norm_legit": partial(normed, "trained"),
    "addmm": product_added,
    "linalg_vector_norm": norm,
    "_weight_norm": weight_norm,
    "_weight_norm_interface": weight_norm_interface,
    **dict.fromkeys(("mv", "dot", "vdot"), multiplied),
    "linalg_householder_product": householder,
    "tril": partial(triangle, np.tril),
    "triu": partial(triangle, np.triu),
    "diagonal": diagonal,
    **dict.fromkeys(("mT", "mH", "adjoint"), lambda x: x.mT),
    "numpy_T": lambda x: x.T,
    "eye": eye,
    "linalg_solve": solved,
    **dict.fromkeys(("matrix_exp", "linalg_matrix_exp"), exponential),
    "any": partial(truths, np.any),
    "all": partial(truths, np.all),
    "fmod": partial(binary, np.fmod),
    "copy": lambda x, src, non_blocking=False: np.broadcast_to(src, x.shape),
    "empty": empty,
}
FOLD_TARGETS: dict[str, Callable[..., Any]] = {
    "aten._native_batch_norm_legit.no_stats": partial(normed, "present"),
    "aten.max.dim": partial(extreme, np.max),
    "aten.min.dim": partial(extreme, np.min),
}
