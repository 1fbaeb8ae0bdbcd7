"""Elementwise operators on values, constants and numbers, broadcast as PyTorch and NumPy do."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import (
    Activation,
    Add,
    Clip,
    Combine,
    Compare,
    Div,
    Elu,
    LeakyRelu,
    LogSoftmax,
    Maximum,
    Minimum,
    Mul,
    Op,
    Power,
    PRelu,
    Relation,
    Relu,
    Scale,
    Select,
    Softmax,
    Sub,
)
from dfq_jax.io.importing.arrange import apart, laid_out, unsqueezed, without_batch
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.values import (
    Dim,
    Irregular,
    Value,
    apart_from,
    atoms,
    extent,
    matching_atoms,
    new_dim,
)

Number = int | float
LOWEST = np.float32(-1e9)
HIDES = -1e4
"""Scores from here down leave nothing of what they stand for behind a softmax."""
MIRRORED: Mapping[Relation, Relation] = {
    **{"equal": "equal", "greater": "less", "less": "greater"},
    **{"greater_equal": "less_equal", "less_equal": "greater_equal"},
}
"""{relation: the same between the two in the other order}."""
Operand = Value | np.ndarray | int | float


def mapped(b: Builder, op: Op, x: Value) -> Value:
    """An elementwise operator of one value."""
    return Value(b.add(op, (x.name,)), x.axes, x.dims)


def limited(b: Builder, x: Value, low: Number | None, high: Number | None) -> Value:
    """Values limited to [low, high]: a ReLU where it is one, nothing where no end is finite.

    Running maxima begin with -inf: exporters spell that out.
    """
    low = None if low == -math.inf else low
    high = None if high == math.inf else high
    if low is None and high is None:
        return x
    if low == 0 and (high is None or high > 0):
        return mapped(b, Relu(None if high is None else float(high)), x)
    ends = (None if e is None else float(e) for e in (low, high))
    return mapped(b, Clip(*ends), x)


def affine(b: Builder, x: Value, factor: Number = 1.0, offset: Number = 0.0) -> Value:
    """`factor * x + offset` with two numbers."""
    if factor == 1 and offset == 0:
        return x
    return mapped(b, Scale(float(factor), float(offset)), x)


def combined(b: Builder, op: Combine, x: Operand, y: Operand) -> Value:
    """Two operands, at least one of them a value, element by element."""
    x, y = plain(x), plain(y)
    if isinstance(x, Value):
        if isinstance(y, Value):
            return of_values(b, op, x, y)
        return with_array(b, op, x, y) if isinstance(y, np.ndarray) else with_number(b, op, x, y)
    if not isinstance(y, Value):
        raise UnsupportedModelError(f"{type(op).__name__} of two constants.")
    if isinstance(op, Add | Mul | Maximum | Minimum):
        return combined(b, op, y, x)
    if isinstance(op, Compare):
        return combined(b, Compare(MIRRORED[op.relation]), y, x)
    if isinstance(op, Sub):
        return combined(b, Add(), affine(b, y, -1.0), x)
    return combined(b, Mul(), mapped(b, Power(-1.0), y), x)


def plain(x: Operand) -> Operand:
    """Constants of one element without axes of their own as numbers."""
    if isinstance(x, np.ndarray):
        return float(x.reshape(())) if x.size == 1 and x.ndim <= 1 else x
    return x


def with_number(b: Builder, op: Combine, x: Value, y: Number) -> Value:
    """A value and a number."""
    match op:
        case Add():
            return affine(b, x, offset=y)
        case Sub():
            return affine(b, x, offset=-y)
        case Mul():
            return affine(b, x, y)
        case Div():
            return affine(b, x, float(np.float32(1.0) / np.float32(y)))
        case Maximum():
            return limited(b, x, y, None)
        case Minimum():
            return limited(b, x, None, y)
        case Compare():
            return of_values(b, op, x, y)


def with_array(b: Builder, op: Combine, x: Value, y: np.ndarray) -> Value:
    """A value and a constant, which may have more axes or larger ones than the value."""
    y = np.maximum(y.astype(np.float32), LOWEST)  # masks of -inf would make 0 * inf
    while len(x.dims) < y.ndim:
        x = unsqueezed(x, 0)
    y = y.reshape(*(1,) * (len(x.dims) - y.ndim), *y.shape)
    grown = [i for i, n in enumerate(y.shape) if n > 1 and extent(x.dims[i]) == 1]
    if any(n not in (1, have) for n, have in zip(y.shape, x.shape, strict=True) if have > 1):
        raise UnsupportedModelError(f"shapes {x.shape} and {y.shape} do not broadcast.")
    if grown:
        for i, dim in enumerate(x.dims):
            if b.batch is not None and b.batch in dim and y.shape[i] > 1:
                y = without_batch(y, i, dim, b.batch)
        return of_values(b, op, x, as_value(b, y))
    if y.size == 1:
        return with_number(b, op, x, float(y.reshape(())))
    name = b.constant(laid_out(b, y, x.dims, x.axes))
    return Value(b.add(op, (x.name, name)), x.axes, x.dims)


def chosen(b: Builder, condition: np.ndarray, x: Operand, y: Operand) -> Value:
    """`x` where a constant condition holds, `y` elsewhere; at least one of them a value."""
    shape = np.broadcast_shapes(condition.shape, *(getattr(v, "shape", ()) for v in (x, y)))
    parts = []
    for operand, mask in ((x, condition), (y, ~condition)):
        if isinstance(operand, Value):
            whole = mask.all() and operand.shape == shape
            if whole:
                return operand
            parts.append(combined(b, Mul(), operand, mask))
        elif np.any(kept := np.where(mask, operand, 0)):
            parts.append(kept)
    return parts[0] if len(parts) == 1 else combined(b, Add(), *parts)


def as_value(b: Builder, array: np.ndarray) -> Value:
    """A constant as a value of the graph; its first axis must not be a batch."""
    dims = tuple(new_dim(n) for n in array.shape)
    axes = tuple(d for d in dims if d)
    return Value(b.constant(laid_out(b, array, dims, axes)), axes, dims)


def selected(b: Builder, which: Value, x: Operand, y: Operand) -> Value:
    """`x` where `which` is not 0, `y` elsewhere."""
    given = [plain(v) for v in (which, x, y)]
    rank = max(len(v.dims) if isinstance(v, Value) else np.ndim(v) for v in given)
    values = [with_rank(v, rank) for v in given if isinstance(v, Value)]
    return of_values(b, Select(), *(spread(b, v, rank, values) for v in given))


def spread(b: Builder, operand: Operand, rank: int, values: Sequence[Value]) -> Value | Number:
    """An operand among others: constants with axes of their own become values."""
    if isinstance(operand, Value):
        return with_rank(operand, rank)
    array = np.maximum(np.asarray(operand, np.float32), LOWEST)
    if array.size == 1:
        return float(array.reshape(()))
    array = array.reshape(*(1,) * (rank - array.ndim), *array.shape)
    for value in values:
        for i, dim in enumerate(value.dims):
            if b.batch is not None and b.batch in dim and array.shape[i] > 1:
                array = without_batch(array, i, dim, b.batch)
    return as_value(b, array)


def with_rank(x: Value, rank: int) -> Value:
    """The value with axes of size 1 in front."""
    while len(x.dims) < rank:
        x = unsqueezed(x, 0)
    return x


def of_values(b: Builder, op: Op, *operands: Value | Number) -> Value:
    """Values and numbers, broadcast against each other."""
    given = [v for v in operands if isinstance(v, Value)]
    rank = max(len(v.dims) for v in given)
    values = all_aligned(b, [with_rank(v, rank) for v in given])
    alongside = zip(*(v.dims for v in values), strict=True)
    dims = tuple(next((d for d in at if extent(d) > 1), at[-1]) for at in alongside)
    held = [set(atoms(v.axes)) for v in values]
    pairs = zip(values, held, strict=True)
    layout = next((v.axes for v, mine in pairs if all(some <= mine for some in held)), None)
    if layout is None:
        layout = tuple(b.inner(d) for d in dims if b.inner(d))
    for some in held:
        layout = whole(layout, some)
    names = [b.stored(v, kept(layout, some)) for v, some in zip(values, held, strict=True)]
    numbers = lambda n: b.constant(np.full((1,) * (len(layout) + 1), n))
    left = iter(names)
    return Value(
        b.add(op, [next(left) if isinstance(v, Value) else numbers(v) for v in operands]),
        layout,
        dims,
    )


def all_aligned(b: Builder, values: Sequence[Value]) -> list[Value]:
    """Values with the same atoms wherever they are larger than 1.

    What one pair is cut at, others are in the next round.
    """
    aligning = list(values)
    for _ in values[1:]:
        for i, j in itertools.combinations(range(len(values)), 2):
            aligning[i], aligning[j] = aligned(
                b, aligning[i], aligning[j], range(len(values[0].dims))
            )
    return aligning


def aligned(b: Builder, x: Value, y: Value, axes: Sequence[int]) -> tuple[Value, Value]:
    """Both values with the same atoms along those source axes where both are larger than 1.

    Raises:
      UnsupportedModelError: if the sizes differ.
    """
    both = [i for i in axes if x.shape[i] > 1 and y.shape[i] > 1]
    if any(x.shape[i] != y.shape[i] for i in both):
        raise UnsupportedModelError(f"shapes {x.shape} and {y.shape} do not broadcast.")
    same = [a for i in both if x.dims[i] == y.dims[i] for a in x.dims[i]]
    y = apart_from(y, x, same)
    try:
        return matching_atoms(x, y, [(x.dims[i], y.dims[i]) for i in both])
    except Irregular:
        x, y = b.remade(x), b.remade(y)
        return matching_atoms(x, y, [(x.dims[i], y.dims[i]) for i in both])


def whole(axes: Sequence[Dim], some: set) -> tuple[Dim, ...]:
    """Stored axes cut wherever only a part of one belongs to `some` atoms."""
    layout: list[Dim] = []
    for axis in axes:
        piece: list = []
        for atom in axis:
            if piece and (piece[-1] in some) != (atom in some):
                layout.append(tuple(piece))
                piece = []
            piece.append(atom)
        layout.append(tuple(piece))
    return tuple(layout)


def kept(layout: Sequence[Dim], some: set) -> tuple[Dim, ...]:
    """The layout of a value that has only some of the atoms: size 1 along the others."""
    return tuple(d if all(a in some for a in d) else () for d in layout)


def softmax(b: Builder, x: Value, axis: int, *, logarithm: bool = False) -> Value:
    """Softmax along one axis, or its logarithm."""
    x, (at,) = apart(b, x, [axis])
    op = LogSoftmax(at) if logarithm else Softmax(at)
    return Value(b.add(op, (x.name,)), x.axes, x.dims)


def parametric_relu(b: Builder, x: Value, slope: np.ndarray) -> Value:
    """PReLU with one slope, or one for each channel (axis 1)."""
    if slope.size == 1:
        return mapped(b, LeakyRelu(float(slope.reshape(()))), x)
    x = channels_last(b, x)
    return Value(b.add(PRelu(), (x.name,), {"slope": slope.reshape(-1)}), x.axes, x.dims)


def exponential_linear(
    b: Builder, x: Value, alpha: Number = 1.0, scale: Number = 1.0, rate: Number = 1.0
) -> Value:
    """`scale * x` where positive, `scale * alpha * (exp(rate * x) - 1)` elsewhere."""
    alpha, scale = float(alpha) * float(rate), float(scale) / float(rate)
    y = affine(b, x, rate)
    return mapped(b, Activation("elu") if alpha == scale == 1 else Elu(alpha, scale), y)


def channels_last(b: Builder, x: Value) -> Value:
    """The value stored with its channels, source axis 1, as the last axis."""
    if x.axes and x.axes[-1] == x.dims[1] and x.dims[1]:
        return x
    first = b.inner(x.dims[0])
    layout = (*((first,) if first else ()), *x.dims[2:], x.dims[1])
    return Value(b.stored(x, layout), layout, x.dims)
