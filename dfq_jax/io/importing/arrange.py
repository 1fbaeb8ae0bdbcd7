"""Views, slices, joins and padding of values, with the axis conventions of PyTorch and NumPy."""

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import Broadcast, Concat, Pad, Slice
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.values import (
    Atom,
    Dim,
    Irregular,
    Value,
    apart_from,
    atoms,
    extent,
    matching_atoms,
    new_dim,
    regrouped_axes,
    sizes,
    split_all,
)

WHOLE = (0, None, 1)


def viewed(b: Builder, x: Value, shape: Sequence[int]) -> Value:
    """The same values in row-major order with another shape; one size may be -1."""
    shape = full_shape(shape, math.prod(x.shape))
    try:
        dims, splits = regrouped_axes(atoms(x.dims), shape, b.batch)
    except Irregular:
        try:
            x = fused(x)
            dims, splits = regrouped_axes(atoms(x.dims), shape, b.batch)
        except Irregular:
            x = in_one_axis(b, x)
            dims, splits = regrouped_axes(atoms(x.dims), shape, b.batch)
    return Value(x.name, split_all(x, splits).axes, dims)


def full_shape(shape: Sequence[int], total: int) -> tuple[int, ...]:
    """`shape` with its -1, if any, replaced by what is left of `total` values.

    Raises:
      UnsupportedModelError: if it does not hold so many values.
    """
    known = math.prod(s for s in shape if s != -1)
    full = tuple(total // max(known, 1) if s == -1 else int(s) for s in shape)
    if math.prod(full) != total or min(full, default=1) < 1:
        raise UnsupportedModelError(f"cannot view {total} values as {tuple(shape)}.")
    return full


def fused(x: Value) -> Value:
    """The value, flat, with one new atom for atoms that follow each other in store and source.

    An axis once cut into 8 x 7 can then be cut into 7 x 8 without moving anything.
    """
    flat = atoms(x.dims)
    follows = dict(itertools.pairwise(flat))
    axes, heads, inner = [], {}, set()
    for axis in x.axes:
        runs: list[list[Atom]] = []
        for atom in axis:
            if runs and follows.get(runs[-1][-1]) is atom:
                runs[-1].append(atom)
            else:
                runs.append([atom])
        for run in runs:
            heads[run[0]] = Atom(extent(tuple(run)))
            inner |= set(run[1:])
        axes.append(tuple(heads[run[0]] for run in runs))
    return Value(x.name, tuple(axes), (tuple(heads.get(a, a) for a in flat if a not in inner),))


def in_one_axis(b: Builder, x: Value) -> Value:
    """The value stored as one axis in row-major order of its source axes."""
    if b.batch is not None and b.batch in atoms(x.dims)[1:]:
        raise UnsupportedModelError(
            "a view merges other axes with the batch; export the network with a batch of 1."
        )
    order = [a for a in atoms(x.dims) if a is not b.batch]
    name = b.stored(x, [tuple(order)])
    whole = Atom(math.prod(a.size for a in order))
    lead = (b.batch,) if b.batch is not None and b.batch in atoms(x.dims) else ()
    return Value(name, ((whole,),), ((*lead, whole),))


def permuted(x: Value, order: Sequence[int]) -> Value:
    """Axes in another order."""
    rank = len(x.dims)
    return Value(x.name, x.axes, tuple(x.dims[i % rank] for i in order))


def swapped(x: Value, first: int, second: int) -> Value:
    """Two axes exchanged."""
    order = list(range(len(x.dims)))
    order[first], order[second] = order[second], order[first]
    return permuted(x, order)


def squeezed(x: Value, axes: Iterable[int] | None) -> Value:
    """Without axes of size 1: all of them, or those of `axes` that have size 1."""
    rank = len(x.dims)
    chosen = set(range(rank)) if axes is None else {a % rank for a in axes}
    keep = [d for i, d in enumerate(x.dims) if i not in chosen or extent(d) > 1]
    return Value(x.name, x.axes, tuple(keep))


def unsqueezed(x: Value, axis: int) -> Value:
    """With a new axis of size 1."""
    at = axis % (len(x.dims) + 1)
    return Value(x.name, x.axes, (*x.dims[:at], (), *x.dims[at:]))


def apart(b: Builder, x: Value, which: Iterable[int]) -> tuple[Value, tuple[int, ...]]:
    """The value with each of some source axes stored as one axis of its own.

    Args:
      b: the graph.
      x: the value.
      which: source axes, none of them the batch's.

    Returns:
      The value, and the stored axis (batch counted) of each source axis.

    Raises:
      UnsupportedModelError: if one of them is the batch.
    """
    rank = len(x.dims)
    wanted = [x.dims[i % rank] for i in which]
    if b.batch is not None and any(b.batch in d for d in wanted):
        raise UnsupportedModelError(
            "it acts along the batch; export the network with a batch of 1."
        )
    missing = max(wanted.count(()) - x.axes.count(()), 0)
    if missing or any(d not in x.axes for d in wanted):
        layout = separated(x.axes, wanted)
        if atoms(layout) != atoms(x.axes):  # as it must move, let the next operator find it whole
            layout = separated(x.axes, [*wanted, *map(b.inner, x.dims)])
        layout = (*[()] * missing, *layout)
        x = Value(b.stored(x, layout), layout, x.dims)
    found: list[int] = []
    for dim in wanted:
        places = [i for i, axis in enumerate(x.axes) if axis == dim and 1 + i not in found]
        found.append(1 + places[0])
    return x, tuple(found)


def separated(axes: tuple[Dim, ...], wanted: Sequence[Dim]) -> tuple[Dim, ...]:
    """The stored axes with each wanted one alone, where its last atom is stored."""
    order = atoms(axes)
    ends = {max(d, key=order.index): d for d in wanted if d}
    inside = set(atoms(wanted))
    layout: list[Dim] = []
    for axis in axes:
        rest: list[Atom] = []
        for atom in axis:
            if atom not in inside:
                rest.append(atom)
                continue
            layout += [tuple(rest)] if rest else []
            layout += [ends[atom]] if atom in ends else []
            rest = []
        layout += [tuple(rest)] if rest or not axis else []
    return tuple(layout)


def resized_axes(
    x: Value, name: str, which: Sequence[int], at: Sequence[int], new: Sequence[Dim]
) -> Value:
    """The value an operator made by changing the sizes of some axes of `x`.

    Args:
      x: what it read.
      name: the node that stores the result.
      which: source axes it changed.
      at: their stored axes, batch counted.
      new: their new atoms.
    """
    axes, dims = list(x.axes), list(x.dims)
    for source, stored, dim in zip(which, at, new, strict=True):
        dims[source % len(dims)] = dim
        axes[stored - 1] = dim
    return Value(name, tuple(axes), tuple(dims))


def sliced(
    b: Builder, x: Value, axis: int, start: int = 0, stop: int | None = None, step: int = 1
) -> Value:
    """`x[start:stop:step]` along one axis."""
    size = x.shape[axis]
    length = len(range(size)[start:stop:step])
    if length == size and step > 0:
        return x
    if length == 0:
        raise UnsupportedModelError(f"a slice {start}:{stop}:{step} of {size} values is empty.")
    first, last, step = slice(start, stop, step).indices(size)
    end = None if last < 0 or (step > 0 and last >= size) else last
    for at, stored in enumerate(x.axes, 1):
        rest = stored[len(x.dims[axis]) :]
        if step == 1 and rest and (*x.dims[axis], *rest) == stored:  # the slow part of an axis
            n, new = extent(rest), new_dim(length)
            name = cut_out(b, x, at, (first * n, None if end is None else end * n, 1))
            axes = (*x.axes[: at - 1], (*new, *rest), *x.axes[at:])
            dims = (*x.dims[: axis % len(x.dims)], new, *x.dims[axis % len(x.dims) + 1 :])
            return Value(name, axes, dims)
    x, (at,) = apart(b, x, [axis])
    name = cut_out(b, x, at, (first, end, step))
    return resized_axes(x, name, [axis], [at], [new_dim(length)])


def cut_out(b: Builder, x: Value, at: int, triple: tuple[int, int | None, int]) -> str:
    """A slice of the stored tensor along one of its axes."""
    bounds: list[tuple[int, int | None, int]] = [WHOLE] * (1 + len(x.axes))
    bounds[at] = triple
    return b.add(Slice(tuple(bounds)), (x.name,))


def selected(b: Builder, x: Value, axis: int, index: int) -> Value:
    """`x[index]` along one axis, which disappears."""
    size, rank = x.shape[axis], len(x.dims)
    if not -size <= index < size:
        raise UnsupportedModelError(f"index {index} is outside an axis of {size} values.")
    index %= size
    return squeezed(sliced(b, x, axis, index, index + 1), [axis % rank])


def split(b: Builder, x: Value, axis: int, lengths: Sequence[int]) -> tuple[Value, ...]:
    """Consecutive pieces of the given lengths along one axis."""
    if sum(lengths) != x.shape[axis]:
        raise UnsupportedModelError(f"cannot split {x.shape[axis]} values into {tuple(lengths)}.")
    ends = np.cumsum(lengths).tolist()
    return tuple(sliced(b, x, axis, end - n, end) for end, n in zip(ends, lengths, strict=True))


def joined(b: Builder, parts: Sequence[Value | np.ndarray], axis: int) -> Value:
    """Values and constants put beside each other along one axis."""
    values = [p for p in parts if isinstance(p, Value)]
    if len(parts) == 1:
        return values[0]
    base = max(values, key=lambda v: v.shape[axis])
    axis %= len(base.dims)
    stored, (at,) = apart(b, base, [axis])
    made = {id(base): stored.name}
    base = stored
    template = base.axes
    names = []
    for part in parts:
        if id(part) in made:
            pass
        elif isinstance(part, Value):
            made[id(part)] = beside(b, base, part, axis, at)
        else:
            made[id(part)] = constant_beside(b, base, part, axis, at)
        names.append(made[id(part)])
    total = new_dim(sum(p.shape[axis] for p in parts))
    name = b.add(Concat(at), names)
    dims = (*base.dims[:axis], total, *base.dims[axis + 1 :])
    return Value(name, (*template[: at - 1], total, *template[at:]), dims)


def beside(b: Builder, base: Value, part: Value, axis: int, at: int) -> str:
    """`part` stored as `base` is, but for the axis along which they are joined."""
    others = [i for i in range(len(base.dims)) if i != axis]
    if [part.shape[i] for i in others] != [base.shape[i] for i in others]:
        raise UnsupportedModelError(f"cannot join shapes {base.shape} and {part.shape}.")
    same = [a for i in others if base.dims[i] == part.dims[i] for a in base.dims[i]]
    part = apart_from(part, base, same)
    try:
        mine, theirs = matching_atoms(base, part, [(base.dims[i], part.dims[i]) for i in others])
    except Irregular:
        part = b.remade(part)
        mine, theirs = matching_atoms(base, part, [(base.dims[i], part.dims[i]) for i in others])
    layout = (*mine.axes[: at - 1], theirs.dims[axis], *mine.axes[at:])
    return b.stored(theirs, layout)


def constant_beside(b: Builder, base: Value, part: np.ndarray, axis: int, at: int) -> str:
    """A constant stored as `base` is, but for the axis along which they are joined."""
    dims = [new_dim(n) if i == axis else base.dims[i] for i, n in enumerate(part.shape)]
    layout = (*base.axes[: at - 1], dims[axis], *base.axes[at:])
    return b.constant(laid_out(b, part, dims, layout))


def laid_out(
    b: Builder, array: np.ndarray, dims: Sequence[Dim], layout: Sequence[Dim]
) -> np.ndarray:
    """A constant in a stored layout, with a leading axis of 1 for the batch.

    Args:
      b: the graph.
      array: in source order; axes of size 1 broadcast against `dims`.
      dims: atoms of each of its axes.
      layout: the wanted axes; atoms along which it broadcasts get size 1 if a whole axis does.

    Raises:
      UnsupportedModelError: if it differs from image to image of the traced batch.
    """
    for axis, dim in enumerate(dims):
        if b.batch is not None and b.batch in dim and array.shape[axis] > 1:
            array = without_batch(array, axis, dim, b.batch)
    dims = [b.inner(d) for d in dims]
    full: list[int] = []
    for axis, dim in enumerate(dims):
        full += [a.size if array.shape[axis] > 1 else 1 for a in dim]
    order = {atom: i for i, atom in enumerate(atoms(dims))}
    spread = array.reshape(full)
    spread = spread.transpose([order[a] for a in atoms(layout)])
    shape, start = [], 0
    for dim in layout:
        have = spread.shape[start : start + len(dim)]
        if math.prod(have) > 1:
            spread = np.broadcast_to(
                spread,
                (*spread.shape[:start], *(a.size for a in dim), *spread.shape[start + len(dim) :]),
            )
        shape.append(extent(dim) if math.prod(have) > 1 else 1)
        start += len(dim)
    return spread.reshape(1, *shape)


def without_batch(array: np.ndarray, axis: int, dim: Dim, batch: Atom) -> np.ndarray:
    """A constant's axis less the batch, if all images of the batch share the same values."""
    at = dim.index(batch)
    shape = [a.size for a in dim]
    apart = array.reshape(*array.shape[:axis], *shape, *array.shape[axis + 1 :])
    first = np.take(apart, [0], axis=axis + at)
    if not np.array_equal(np.broadcast_to(first, apart.shape), apart, equal_nan=True):
        raise UnsupportedModelError(
            "a constant differs from image to image; export the network with a batch of 1."
        )
    return first.reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])


def expanded(b: Builder, x: Value, shape: Sequence[int]) -> Value:
    """Axes of size 1 repeated; -1 keeps a size; new axes come first."""
    while len(x.dims) < len(shape):
        x = unsqueezed(x, 0)
    wanted = [have if s == -1 else int(s) for s, have in zip(shape, x.shape, strict=True)]
    grow = [i for i, (s, have) in enumerate(zip(wanted, x.shape, strict=True)) if s != have]
    if not grow:
        return x
    if any(x.shape[i] != 1 for i in grow):
        raise UnsupportedModelError(f"cannot expand {x.shape} to {tuple(shape)}.")
    layout = (*(() for _ in grow), *x.axes)
    stored = b.stored(x, layout)
    new = [new_dim(wanted[i]) for i in grow]
    axes = (*new, *x.axes)
    name = b.add(Broadcast(sizes(axes)), (stored,))
    dims = list(x.dims)
    for i, dim in zip(grow, new, strict=True):
        dims[i] = dim
    return Value(name, axes, tuple(dims))


def padded_value(
    b: Builder,
    x: Value,
    widths: dict[int, tuple[int, int]],
    value: float = 0.0,
    mode: str = "constant",
) -> Value:
    """Padding, or cropping where a width is negative, {source axis: (before, after)}."""
    for axis, (before, after) in widths.items():
        if before < 0 or after < 0:
            size = x.shape[axis]
            x = sliced(b, x, axis, max(-before, 0), size - max(-after, 0))
    grow = {a: (max(lo, 0), max(hi, 0)) for a, (lo, hi) in widths.items() if max(lo, hi) > 0}
    if not grow:
        return x
    if mode == "wrap":
        return wrapped(b, x, grow)
    if mode not in ("constant", "reflect", "edge"):
        raise UnsupportedModelError(f"padding mode {mode!r} is unknown.")
    x, at = apart(b, x, grow)
    amounts = [(0, 0)] * (1 + len(x.axes))
    for stored, width in zip(at, grow.values(), strict=True):
        amounts[stored] = width
    name = b.add(Pad(tuple(amounts), value, mode), (x.name,))
    new = [new_dim(x.shape[a] + lo + hi) for a, (lo, hi) in grow.items()]
    return resized_axes(x, name, list(grow), at, new)


def wrapped(b: Builder, x: Value, widths: dict[int, tuple[int, int]]) -> Value:
    """Padding with what the opposite end shows, {source axis: (before, after)}."""
    for axis, (before, after) in widths.items():
        size = x.shape[axis]
        ends = (size - before, size) if before else None, (0, after) if after else None
        first, last = (None if e is None else sliced(b, x, axis, *e) for e in ends)
        x = joined(b, [p for p in (first, x, last) if p is not None], axis)
    return x
