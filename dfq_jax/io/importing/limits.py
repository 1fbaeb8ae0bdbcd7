"""How large a constant may become while it is computed: checked before memory is allocated."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dfq_jax.errors import UnsupportedModelError

MOST_VALUES = 1 << 26
"""Values a computed constant may have: 256 MiB of float32."""


def affordable(values: int | float) -> None:
    """Refuses constants that would fill the memory.

    Raises:
      UnsupportedModelError: if there would be more than `MOST_VALUES`.
    """
    if values > MOST_VALUES:
        raise UnsupportedModelError(f"it would make a constant of {values:.0f} values.")


def affordable_shape(shape: Iterable[Any]) -> tuple[int, ...]:
    """The shape as integers, if a constant may have it."""
    sizes = tuple(int(n) for n in shape)
    affordable(math.prod(abs(n) for n in sizes))
    return sizes


def affordable_broadcast(*operands: Any) -> None:
    """Refuses elementwise results that would fill the memory."""
    shapes = [x.shape for x in operands if isinstance(x, np.ndarray)]
    affordable(math.prod(np.broadcast_shapes(*shapes)))


def affordable_product(x: np.ndarray, y: np.ndarray) -> None:
    """Refuses matrix products that would fill the memory."""
    rows = x.size // max(x.shape[-1], 1) if x.ndim else 1
    columns = y.size // max(y.shape[-2], 1) if y.ndim > 1 else 1
    affordable(rows * columns)


def affordable_lookup(x: np.ndarray, indices: Sequence[Any]) -> None:
    """Refuses look-ups that would fill the memory; None takes a whole axis."""
    given = [np.asarray(i) for i in indices if i is not None]
    rest = [n for n, i in zip(x.shape, indices, strict=False) if i is None]
    rest += x.shape[len(indices) :]
    affordable(math.prod(rest) * math.prod(np.broadcast_shapes(*(i.shape for i in given))))
