"""Values gathered at constant places, out of slices, repetitions and padding."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.token_ops import Embed
from dfq_jax.io.importing import arrange
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.limits import affordable
from dfq_jax.io.importing.values import Value, new_dim

MOST_RUNS = 512
"""Slices that one gather may become."""


def looked_up(b: Builder, table: np.ndarray, ids: Value) -> Value:
    """Rows of a table by the ids of tokens, whose values are a new last axis.

    Raises:
      UnsupportedModelError: if the network computes the places, or the table has no rows of values.
    """
    if ids.name not in b.ids:
        raise UnsupportedModelError("rows of a table at places that the network computes.")
    if table.ndim != 2:
        raise UnsupportedModelError(f"ids look up a table of shape {table.shape}, not (ids, size).")
    row = new_dim(table.shape[1])
    name = b.add(Embed(), (ids.name,), {"table": table})
    return Value(name, (*ids.axes, row), (*ids.dims, row))


def embedding(b: Builder, weight: Any, indices: Value, *given: Any, **named: Any) -> Value:
    """embedding: rows of a constant table."""
    del given, named  # what matters in training
    if isinstance(weight, Value):
        raise UnsupportedModelError("rows of a table that the network computes.")
    return looked_up(b, weight, indices)


def taken_at(b: Builder, x: Value, axis: int, places: np.ndarray) -> Value:
    """`x` at some places of one axis, which keeps its place.

    Args:
      b: the graph.
      x: the value.
      axis: a source axis.
      places: indices along it, in one axis; negative ones count from the end.

    Returns:
      A slice, padding or a repetition where the places are that, else joined slices.

    Raises:
      UnsupportedModelError: if a place is outside, or they have no order to speak of.
    """
    size, axis = x.shape[axis], axis % len(x.dims)
    if not places.size or places.min() < -size or places.max() >= size:
        raise UnsupportedModelError(f"indices outside an axis of {size} values.")
    wanted = [int(p) % size for p in places]
    if (edges := as_padding(wanted, size)) is not None:
        before, after, mode = edges
        return arrange.padded_value(b, x, {axis: (before, after)}, 0.0, mode)
    if (times := repetition(wanted)) > 1:
        return repeated(b, taken_at(b, x, axis, np.array(wanted[::times])), axis, times)
    found = runs(wanted)
    if len(found) > MOST_RUNS:
        raise UnsupportedModelError(f"{len(wanted)} values gathered in no order.")
    parts = []
    for first, last, step in found:
        stop = last + (1 if step > 0 else -1)
        parts.append(arrange.sliced(b, x, axis, first, None if stop < 0 else stop, step))
    return arrange.joined(b, parts, axis)


def as_padding(wanted: Sequence[int], size: int) -> tuple[int, int, str] | None:
    """(before, after, mode) of the padding that shows an axis at these places, if there is one."""
    for before in range(len(wanted) - size + 1):
        if wanted[before] == 0 and list(wanted[before : before + size]) == list(range(size)):
            after = len(wanted) - size - before
            for mode in ("reflect", "edge"):
                fits = mode == "edge" or max(before, after) < size
                whole = np.pad(np.arange(size), (before, after), mode) if fits else ()
                if list(whole) == list(wanted):
                    return before, after, mode
    return None


def repetition(wanted: Sequence[int]) -> int:
    """How often every place is wanted in a row, 1 if not equally often."""
    lengths = [len(list(group)) for _, group in itertools.groupby(wanted)]
    return math.gcd(*lengths)


def repeated(b: Builder, x: Value, axis: int, times: int) -> Value:
    """Every value of an axis so many times in a row."""
    shape = x.shape
    y = arrange.unsqueezed(x, axis + 1)
    grown = (*shape[: axis + 1], times, *shape[axis + 1 :])
    y = arrange.expanded(b, y, grown)
    return arrange.viewed(b, y, (*shape[:axis], shape[axis] * times, *shape[axis + 1 :]))


def repeat_interleave(
    b: Builder, x: Value, repeats: int, dim: int | None = None, output_size: int | None = None
) -> Value:
    """Every value of an axis so many times in a row; of all of them, where no axis is named."""
    del output_size  # what follows from the others
    if dim is None:
        x, dim = arrange.viewed(b, x, (math.prod(x.shape),)), 0
    affordable(math.prod(x.shape) * repeats)
    return repeated(b, x, dim % len(x.dims), repeats)


def runs(wanted: Sequence[int]) -> list[tuple[int, int, int]]:
    """Places as (first, last, step) of evenly spaced ones, as few as a greedy search finds."""
    found: list[tuple[int, int, int]] = []
    at = 0
    while at < len(wanted):
        end, step = at + 1, 1
        if end < len(wanted) and wanted[end] != wanted[at]:
            step = wanted[end] - wanted[at]
            while end < len(wanted) and wanted[end] - wanted[end - 1] == step:
                end += 1
        found.append((wanted[at], wanted[end - 1], step))
        at = end
    return found


def index_select(b: Builder, x: Value, dim: int, index: Any) -> Value:
    """index_select: constant places along one axis."""
    return taken_at(b, x, dim, constant(index).reshape(-1))


def constant(index: Any) -> np.ndarray:
    """Places that are constants.

    Raises:
      UnsupportedModelError: if the network computes them, or they are a mask.
    """
    if isinstance(index, Value):
        raise UnsupportedModelError("indices that the network computes.")
    array = np.asarray(index)
    if array.dtype == np.bool_:
        raise UnsupportedModelError("a mask as an index.")
    return array


def indexed(b: Builder, x: Value, indices: Sequence[Any]) -> Value:
    """x[i, j, ...] with constant places, each of which varies along axes of its own.

    Raises:
      UnsupportedModelError: if indices are pairs of places, or stand apart.
    """
    given = {axis: constant(i) for axis, i in enumerate(indices) if i is not None}
    axes = sorted(given)
    if axes != list(range(axes[0], axes[-1] + 1)):
        raise UnsupportedModelError("indices of axes that do not lie beside each other.")
    rank = max(i.ndim for i in given.values())
    spread = [given[a].reshape((1,) * (rank - given[a].ndim) + given[a].shape) for a in axes]
    varies = [[i for i in range(rank) if s.shape[i] > 1] for s in spread]
    used = list(itertools.chain(*varies))
    if len(used) != len(set(used)):
        raise UnsupportedModelError("indices that are pairs of places.")
    shape = list(x.shape)
    for axis, places in zip(axes, spread, strict=True):
        x = taken_at(b, x, axis, places.reshape(-1))
    split = [s.shape[i] for s, own in zip(spread, varies, strict=True) for i in own]
    y = arrange.viewed(b, x, (*shape[: axes[0]], *split, *shape[axes[-1] + 1 :]))
    lead, tail = axes[0], len(shape) - axes[-1] - 1
    order = [lead + used.index(i) for i in sorted(used)]
    y = arrange.permuted(
        y, [*range(lead), *order, *range(lead + len(used), lead + len(used) + tail)]
    )
    for i in range(rank):
        if i not in used:
            y = arrange.unsqueezed(y, lead + i)
    return y
