"""Grids of many kernels at a time, in few programs.

Every output channel of a kernel is a column that gets a scale of its own. Columns of all kernels
are put side by side, filled up with zeros to one of a few lengths, so that networks of many kernel
shapes need a handful of programs. Zeros lie on every grid and change no error, no range that
includes 0 and no order of sums: scales are bit by bit those of each kernel alone.
"""

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from dfq_jax.numerics.affine import Affine, Grid, NumpyOrJax
from dfq_jax.numerics.ranges import Lp, MinMax, Omse, weight_affine
from dfq_jax.quantization.plan import Site, Spec

LENGTHS = (32, 128, 512, 2048)
"""Rows of columns; longer ones have a power of two. Few lengths are few programs; filling up what
is long would take more time than they spare."""
NARROWEST = 64
"""Columns of the narrowest program."""
LARGEST = 2**22
"""Values of a kernel from which on it is fitted alone."""

Kernels = Mapping[Site, tuple[Float[NumpyOrJax, "..."], Spec]]


class ColumnKind(NamedTuple):
    """What columns must share to be fitted together.

    Attributes:
      rows: their length, of `length_for`.
      spec: what their grids are.
    """

    rows: int
    spec: Spec


def in_columns(kernel: Float[NumpyOrJax, "..."], spec: Spec) -> bool:
    """Whether a kernel can be fitted beside others."""
    grid = spec.levels
    if not isinstance(grid, Grid) or grid.group is not None or grid.axis != -1:
        return False
    return isinstance(spec.observer, MinMax | Lp | Omse) and kernel.size <= LARGEST


def fit_side_by_side(kernels: Kernels) -> dict[Site, Affine]:
    """{site: grid of its kernel}, for kernels that are `in_columns`."""
    alike: dict[ColumnKind, list[Site]] = defaultdict(list)
    for site, (kernel, spec) in kernels.items():
        rows = kernel.size // kernel.shape[-1]
        alike[ColumnKind(length_for(rows), spec)].append(site)
    found: dict[Site, Affine] = {}
    for shape, sites in alike.items():
        found |= fit_alike({site: np.asarray(kernels[site][0]) for site in sites}, shape)
    return {site: found[site] for site in kernels}


def fit_alike(kernels: Mapping[Site, np.ndarray], shape: ColumnKind) -> dict[Site, Affine]:
    """{site: grid}, from one program."""
    count = sum(kernel.shape[-1] for kernel in kernels.values())
    columns = np.zeros((shape.rows, power_of_two(count, NARROWEST)), np.float32)
    shares = np.ones((1, columns.shape[1]), np.float32)
    ends, end = {}, 0
    for site, kernel in kernels.items():
        flat = kernel.reshape(-1, kernel.shape[-1])
        begin, end = end, end + flat.shape[1]
        columns[: len(flat), begin:end] = flat
        shares[:, begin:end] = np.float32(1) / np.float32(len(flat))
        ends[site] = slice(begin, end)
    columns[:, end:] = columns[:, end - 1 : end]
    fitted = jax.device_get(fit_columns(columns, shares, shape.spec))
    grid = lambda site: (1,) * (kernels[site].ndim - 1) + (-1,)
    return {
        site: Affine(*(jax.device_put(part[:, own].reshape(grid(site))) for part in fitted))
        for site, own in ends.items()
    }


@partial(jax.jit, static_argnames="spec")
def fit_columns(columns: Float[Array, "rows c"], shares: Float[Array, "1 c"], spec: Spec) -> Affine:
    """The grid of every column.

    Args:
      columns: filled up with zeros.
      shares: 1 over the number of values that a column has without them.
      spec: levels and observer.
    """
    return weight_affine(columns, spec.grid, spec.observer, shares)


def length_for(rows: int) -> int:
    """The length of columns of at least so many rows."""
    return next((n for n in LENGTHS if n >= rows), power_of_two(rows, LENGTHS[-1]))


def power_of_two(n: int, least: int) -> int:
    """The smallest power of two that is neither below `n` nor below `least`."""
    return max(least, 1 << (n - 1).bit_length())
