"""PyTorch's views, joins, products and attention: what each becomes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import Add
from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.io.importing import arrange, choices, layers, pointwise
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.limits import affordable
from dfq_jax.io.importing.pointwise import Number
from dfq_jax.io.importing.values import Value

Ints = Sequence[int]


def view(b: Builder, x: Value, size: Ints | None = None, shape: Ints | None = None) -> Value:
    """view, reshape, _unsafe_view."""
    return arrange.viewed(b, x, size if size is not None else shape or ())


def view_as(b: Builder, x: Value, other: Any) -> Value:
    """reshape_as, view_as."""
    return arrange.viewed(b, x, other.shape)


def flatten(b: Builder, x: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    """Some consecutive axes into one."""
    rank, shape = len(x.dims), x.shape
    first, last = start_dim % rank, end_dim % rank
    merged = math.prod(shape[first : last + 1])
    return arrange.viewed(b, x, (*shape[:first], merged, *shape[last + 1 :]))


def unflatten(b: Builder, x: Value, dim: int, sizes: Ints) -> Value:
    """One axis into several."""
    at, shape = dim % len(x.dims), x.shape
    full = arrange.full_shape(sizes, shape[at])
    return arrange.viewed(b, x, (*shape[:at], *full, *shape[at + 1 :]))


def permute(b: Builder, x: Value, dims: Ints) -> Value:
    """Axes in another order."""
    return arrange.permuted(x, dims)


def transpose(b: Builder, x: Value, *axes: int, **named: int) -> Value:
    """Two axes exchanged: transpose, swapaxes."""
    first, second = (*axes, *named.values())
    return arrange.swapped(x, first, second)


def matrix_transpose(b: Builder, x: Value) -> Value:
    """t, mT: the last two axes exchanged."""
    return arrange.swapped(x, -1, -2) if len(x.dims) > 1 else x


def squeeze(b: Builder, x: Value, dim: Any = None) -> Value:
    """Without axes of size 1."""
    return arrange.squeezed(x, None if dim is None else [dim] if isinstance(dim, int) else dim)


def unsqueeze(b: Builder, x: Value, dim: int) -> Value:
    """With a new axis of size 1."""
    return arrange.unsqueezed(x, dim)


def sliced(
    b: Builder,
    x: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    """x[start:end:step] along one axis."""
    stop = None if end is None or end >= x.shape[dim] else end
    return arrange.sliced(b, x, dim, start or 0, stop, step)


def select(b: Builder, x: Value, dim: int, index: int) -> Value:
    """x[index] along one axis."""
    return arrange.selected(b, x, dim, index)


def narrow(b: Builder, x: Value, dim: int, start: int, length: int) -> Value:
    """x[start:start + length] along one axis."""
    return arrange.sliced(b, x, dim, start, start + length)


def chunk(b: Builder, x: Value, chunks: int, dim: int = 0) -> tuple[Value, ...]:
    """At most so many pieces of equal length, the last one shorter."""
    return split(b, x, -(-x.shape[dim] // chunks), dim)


def split(b: Builder, x: Value, split_size: Any, dim: int = 0) -> tuple[Value, ...]:
    """Pieces of one length, the last one shorter; or of the given lengths."""
    size = x.shape[dim]
    if isinstance(split_size, int):
        lengths = [min(split_size, size - i) for i in range(0, size, split_size)]
    else:
        lengths = list(split_size)
    return arrange.split(b, x, dim, lengths)


def split_with_sizes(b: Builder, x: Value, split_sizes: Ints, dim: int = 0) -> tuple[Value, ...]:
    """Pieces of the given lengths."""
    return split(b, x, split_sizes, dim)


def tensor_split(b: Builder, x: Value, sections: int, dim: int = 0) -> tuple[Value, ...]:
    """So many pieces, the first ones longer by one."""
    base, more = divmod(x.shape[dim], sections)
    if not base:
        raise UnsupportedModelError(f"{x.shape[dim]} values split into {sections} pieces.")
    return arrange.split(b, x, dim, [base + (i < more) for i in range(sections)])


def unbind(b: Builder, x: Value, dim: int = 0) -> tuple[Value, ...]:
    """Every x[i] along one axis."""
    return tuple(arrange.selected(b, x, dim, i) for i in range(x.shape[dim]))


def getitem(b: Builder, x: tuple[Any, ...], index: int) -> Any:
    """One of several results."""
    return x[index]


def cat(b: Builder, tensors: Sequence[Any], dim: int = 0) -> Value:
    """Tensors beside each other."""
    return arrange.joined(b, [t for t in tensors if math.prod(t.shape)], dim)


def stack(b: Builder, tensors: Sequence[Any], dim: int = 0) -> Value:
    """Tensors beside each other along a new axis."""
    grown = [
        arrange.unsqueezed(t, dim) if isinstance(t, Value) else np.expand_dims(t, dim)
        for t in tensors
    ]
    return arrange.joined(b, grown, dim)


def expand(b: Builder, x: Value, size: Ints, implicit: bool = False) -> Value:
    """Axes of size 1 repeated."""
    return arrange.expanded(b, x, size)


def expand_as(b: Builder, x: Value, other: Any) -> Value:
    """Axes of size 1 repeated to the shape of another tensor."""
    return arrange.expanded(b, x, other.shape)


def repeat(b: Builder, x: Value, repeats: Ints) -> Value:
    """The tensor beside itself, so many times along each axis."""
    affordable(math.prod(x.shape) * math.prod(repeats))
    while len(x.dims) < len(repeats):
        x = arrange.unsqueezed(x, 0)
    for axis, count in enumerate(repeats):
        if count != 1:
            x = arrange.joined(b, [x] * count, axis)
    return x


def pad(
    b: Builder, x: Value, pad: Ints, mode: str = "constant", value: Number | None = None
) -> Value:
    """Padding of the last axes, the last one first."""
    rank = len(x.dims)
    widths = {rank - 1 - i: (pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2)}
    kind = {"replicate": "edge", "circular": "wrap"}.get(mode, mode)
    return arrange.padded_value(b, x, widths, float(value or 0.0), kind)


def reflection_pad(b: Builder, x: Value, padding: Ints) -> Value:
    """reflection_pad1d, reflection_pad2d."""
    return pad(b, x, padding, "reflect")


def replication_pad(b: Builder, x: Value, padding: Ints) -> Value:
    """replication_pad1d, replication_pad2d."""
    return pad(b, x, padding, "replicate")


def roll(b: Builder, x: Value, shifts: Any, dims: Any = ()) -> Value:
    """Axes rotated."""
    listed = [(shifts, dims)] if isinstance(shifts, int) else zip(shifts, dims, strict=True)
    for shift, axis in listed:
        axis = axis[0] if isinstance(axis, tuple) else axis
        size = x.shape[axis]
        if shift % size:
            cut = size - shift % size
            back, front = arrange.split(b, x, axis, [cut, size - cut])
            x = arrange.joined(b, [front, back], axis)
    return x


def slice_scatter(
    b: Builder,
    x: Any,
    src: Any,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    """x with `src` in the place of x[start:end] along one axis."""
    if step != 1:
        raise UnsupportedModelError(f"writing into every {step}th place.")
    size = x.shape[dim]
    first, last, _ = slice(start, end).indices(size)
    parts = [piece(b, x, dim, 0, first), src, piece(b, x, dim, last, size)]
    return arrange.joined(b, [p for p in parts if p is not None], dim)


def piece(b: Builder, x: Any, dim: int, start: int, end: int) -> Any:
    """x[start:end] along one axis, None if that is nothing."""
    if start >= end:
        return None
    if isinstance(x, Value):
        return arrange.sliced(b, x, dim, start, end)
    return np.take(x, range(start, end), axis=dim)


def select_scatter(b: Builder, x: Any, src: Any, dim: int, index: int) -> Value:
    """x with `src` in the place of x[index] along one axis."""
    at = index % x.shape[dim]
    grown = arrange.unsqueezed(src, dim) if isinstance(src, Value) else np.expand_dims(src, dim)
    return slice_scatter(b, x, grown, dim, at, at + 1)


def flip(b: Builder, x: Value, dims: Ints) -> Value:
    """Axes reversed."""
    for axis in dims:
        x = arrange.sliced(b, x, axis, x.shape[axis] - 1, None, -1)
    return x


def pixel_shuffle(b: Builder, x: Value, upscale_factor: int) -> Value:
    """Channels to pixels."""
    if len(x.dims) == 4:
        return layers.depth_to_space(b, x, DepthToSpace(upscale_factor))
    *lead, c, h, w = x.shape
    r, n = upscale_factor, len(x.shape) - 3
    y = arrange.viewed(b, x, (*lead, c // r**2, r, r, h, w))
    y = arrange.permuted(y, (*range(n), n, n + 3, n + 1, n + 4, n + 2))
    return arrange.viewed(b, y, (*lead, c // r**2, h * r, w * r))


def pixel_unshuffle(b: Builder, x: Value, downscale_factor: int) -> Value:
    """Pixels to channels."""
    *lead, c, h, w = x.shape
    r, n = downscale_factor, len(x.shape) - 3
    y = arrange.viewed(b, x, (*lead, c, h // r, r, w // r, r))
    y = arrange.permuted(y, (*range(n), n, n + 2, n + 4, n + 1, n + 3))
    return arrange.viewed(b, y, (*lead, c * r**2, h // r, w // r))


def channel_shuffle(b: Builder, x: Value, groups: int) -> Value:
    """Channels of several groups interleaved."""
    n, c, *space = x.shape
    y = arrange.viewed(b, x, (n, groups, c // groups, *space))
    return arrange.viewed(b, arrange.swapped(y, 1, 2), (n, c, *space))


def matmul(b: Builder, x: Any, other: Any = None, **named: Any) -> Value:
    """matmul, bmm, mm: whatever the second operand is called."""
    return layers.matmul(b, x, other if other is not None else next(iter(named.values())))


def attention(
    b: Builder,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Any = None,
    dropout_p: Number = 0.0,
    is_causal: bool = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
) -> Value:
    """Scaled dot-product attention, as its matrix products and softmax."""
    if dropout_p:
        raise UnsupportedModelError("attention with dropout; call model.eval() before exporting.")
    if enable_gqa:
        key, value = (as_many(b, x, query.shape[-3]) for x in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = layers.matmul(b, pointwise.affine(b, query, factor), arrange.swapped(key, -1, -2))
    if is_causal:
        rows, columns = scores.shape[-2:]
        attn_mask = np.tril(np.ones((rows, columns), np.bool_))
    if attn_mask is not None:
        scores = masked(b, scores, attn_mask)
    return layers.matmul(b, pointwise.softmax(b, scores, -1), value)


def as_many(b: Builder, x: Value, heads: int) -> Value:
    """Keys or values of fewer heads, each for as many that ask as share it."""
    *lead, have, length, size = x.shape
    grown = arrange.unsqueezed(x, len(lead) + 1)
    grown = arrange.expanded(b, grown, (*lead, have, heads // have, length, size))
    return arrange.viewed(b, grown, (*lead, heads, length, size))


def masked(b: Builder, scores: Value, mask: Any) -> Value:
    """Scores where a mask holds, or plus what it says where it is no truth."""
    if isinstance(mask, np.ndarray) and mask.dtype != np.bool_:
        return pointwise.combined(b, Add(), scores, mask)
    if isinstance(mask, Value) and not choices.is_truth(b, mask.name):
        return pointwise.combined(b, Add(), scores, mask)
    return choices.selected(b, mask, scores, float(pointwise.LOWEST))


def einsum(b: Builder, equation: str, tensors: Sequence[Any], path: Any = None) -> Value:
    """A product of two tensors summed over shared letters, by way of a matrix product."""
    inputs, _, result = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    simple = len(names) == len(tensors) == 2 and result and "." not in equation
    if not simple or any(len(set(n)) != len(n) for n in (*names, result)):
        raise UnsupportedModelError(f"einsum {equation!r}.")
    left, right = names
    shared = [c for c in left if c in right and c in result]
    summed = [c for c in left if c in right and c not in result]
    rows, columns = ([c for c in n if c in result and c not in shared] for n in names)
    if set(left) != {*shared, *summed, *rows} or set(right) != {*shared, *summed, *columns}:
        raise UnsupportedModelError(f"einsum {equation!r} sums over one operand alone.")
    size = dict(zip(left + right, (*tensors[0].shape, *tensors[1].shape), strict=True))
    whole = lambda letters: math.prod(size[c] for c in letters)
    lead = [size[c] for c in shared]
    x = gathered(b, tensors[0], left, shared + rows + summed)
    y = gathered(b, tensors[1], right, shared + summed + columns)
    x = reshaped(b, x, (*lead, whole(rows), whole(summed)))
    y = reshaped(b, y, (*lead, whole(summed), whole(columns)))
    product = arrange.viewed(
        b, layers.matmul(b, x, y), [*lead, *(size[c] for c in (*rows, *columns))]
    )
    order = [*shared, *rows, *columns]
    return arrange.permuted(product, [order.index(c) for c in result])


def gathered(b: Builder, x: Any, letters: str, order: Sequence[str]) -> Any:
    """An operand with its axes in the order of letters."""
    axes = [letters.index(c) for c in order]
    return arrange.permuted(x, axes) if isinstance(x, Value) else x.transpose(axes)


def reshaped(b: Builder, x: Any, shape: Ints) -> Any:
    """An operand in another shape."""
    return arrange.viewed(b, x, shape) if isinstance(x, Value) else x.reshape(shape)


def size_of(b: Builder, x: Value, dim: int) -> int:
    """sym_size: the size of one axis."""
    return x.shape[dim]


def zeros_like(b: Builder, x: Value, *given: Any, **named: Any) -> np.ndarray:
    """zeros_like."""
    return np.zeros(x.shape, np.float32)


def new_filled(fill: float | None, b: Builder, x: Value, size: Ints, *given: Any, **named: Any):
    """new_zeros, new_ones, new_full: constants of the network's type."""
    value = fill if fill is not None else (given[0] if given else named["fill_value"])
    return np.full(tuple(size), value, np.float32)
