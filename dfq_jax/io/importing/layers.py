"""Layers with parameters, on values in the axis order of their source."""

from collections.abc import Mapping, Sequence

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import (
    BatchNorm,
    Conv2d,
    ConvTranspose2d,
    GroupNorm,
    LayerNorm,
    Linear,
    LocalNorm,
    MatMul,
    Pads,
    Pair,
)
from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.graph.token_ops import RmsNorm
from dfq_jax.io.importing.arrange import laid_out, swapped, unsqueezed
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.pointwise import aligned, channels_last
from dfq_jax.io.importing.values import Dim, Value, atoms, extent, new_dim

Ints = Sequence[int]
MOST_PIXELS = 1 << 16


def image(b: Builder, x: Value) -> str:
    """The tensor that holds a source (n, c, h, w) or (n, c, l) as NHWC, h being 1 for lines.

    Raises:
      UnsupportedModelError: on other ranks, or an axis merged with the batch.
    """
    if len(x.dims) not in (3, 4) or b.inner(x.dims[0]):
        raise UnsupportedModelError(
            f"it reads shape {x.shape}; expected (batch, channels, height, width) or "
            "(batch, channels, length)."
        )
    space = x.dims[2:] if len(x.dims) == 4 else ((), x.dims[2])
    return b.stored(x, (*space, x.dims[1]))


def from_image(x: Value, name: str, size: Ints, channels: Dim) -> Value:
    """The value of an image operator that read `x` and made `size` (h, w) pixels."""
    h, w = new_dim(size[0]), new_dim(size[1])
    space = (h, w) if len(x.dims) == 4 else (w,)
    return Value(name, (h, w, channels), (x.dims[0], channels, *space))


def pair(values: Ints | int, rank: int, fill: int) -> Pair:
    """One number per spatial axis; lines get `fill` for their height."""
    listed = [values] if isinstance(values, int) else list(values)
    full = listed * (rank - 2) if len(listed) == 1 else listed
    return (fill, full[0]) if len(full) == 1 else (full[0], full[1])


def pads(values: Ints | int, rank: int) -> Pads:
    """PyTorch's symmetric padding."""
    h, w = pair(values, rank, 0)
    return (h, h), (w, w)


def convolution(
    b: Builder,
    x: Value,
    weight: np.ndarray,
    bias: np.ndarray | None,
    strides: Pair,
    padding: Pads,
    dilation: Pair,
    groups: int,
) -> Value:
    """A convolution with `weight` (cout, cin/groups, kh, kw), or without kh over lines."""
    source = image(b, x)
    kernel = weight[:, :, None] if weight.ndim == 3 else weight
    if x.shape[1] != kernel.shape[1] * groups:
        raise UnsupportedModelError(
            f"it reads {x.shape[1]} channels; its kernel has {kernel.shape[1]} x {groups} groups."
        )
    op = Conv2d(strides, padding, groups, dilation)
    slots = {"kernel": kernel.transpose(2, 3, 1, 0), **optional(bias=bias)}
    size = [
        (extent_of(x, axis) + sum(p) - d * (k - 1) - 1) // s + 1
        for axis, p, d, k, s in zip(
            (0, 1), padding, dilation, kernel.shape[2:], strides, strict=True
        )
    ]
    check_pixels(size)
    return from_image(x, b.add(op, (source,), slots), size, new_dim(kernel.shape[0]))


def transposed_convolution(
    b: Builder,
    x: Value,
    weight: np.ndarray,
    bias: np.ndarray | None,
    op: ConvTranspose2d,
) -> Value:
    """A transposed convolution with `weight` (cin, cout/groups, kh, kw), or without kh."""
    source = image(b, x)
    kernel = weight[:, :, None] if weight.ndim == 3 else weight
    cin, per_group, kh, kw = kernel.shape
    grouped = kernel.reshape(op.groups, cin // op.groups, per_group, kh, kw)
    hwio = grouped.transpose(3, 4, 1, 0, 2).reshape(kh, kw, cin // op.groups, -1)
    size = [
        (extent_of(x, axis) - 1) * s - sum(p) + d * (k - 1) + e + 1
        for axis, s, p, d, k, e in zip(
            (0, 1), op.strides, op.padding, op.dilation, (kh, kw), op.extra, strict=True
        )
    ]
    check_pixels(size)
    slots = {"kernel": hwio, **optional(bias=bias)}
    return from_image(x, b.add(op, (source,), slots), size, new_dim(hwio.shape[3]))


def depth_to_space(b: Builder, x: Value, op: DepthToSpace) -> Value:
    """Channels of an image that become blocks of pixels."""
    if x.shape[1] % op.block**2:
        raise UnsupportedModelError(
            f"{x.shape[1]} channels are no blocks of {op.block} x {op.block} pixels."
        )
    size = [extent_of(x, axis) * op.block for axis in (0, 1)]
    check_pixels(size)
    made = new_dim(x.shape[1] // op.block**2)
    return from_image(x, b.add(op, (image(b, x),)), size, made)


def extent_of(x: Value, axis: int) -> int:
    """Height (0) or width (1) of a source image or line."""
    space = x.shape[2:] if len(x.dims) == 4 else (1, x.shape[2])
    return space[axis]


def shared_out(total: int, auto_pad: str) -> tuple[int, int]:
    """What is cut at the beginning and the end, together `total`; the odd one by `auto_pad`."""
    less, more = total // 2, total - total // 2
    return (less, more) if auto_pad == "SAME_UPPER" else (more, less)


def check_pixels(size: Ints) -> None:
    """Refuses an operator whose result would have no pixels, or more than any image."""
    if min(size) < 1:
        raise UnsupportedModelError(
            f"its result would have {size[0]} x {size[1]} pixels: the input is too small. "
            "Give the size the network was made for."
        )
    if max(size) > MOST_PIXELS:
        raise UnsupportedModelError(f"its result would have {size[0]} x {size[1]} pixels.")


def optional(**slots: np.ndarray | None) -> dict[str, np.ndarray]:
    """Those slots that are there."""
    return {k: v for k, v in slots.items() if v is not None}


def trailing(b: Builder, x: Value, count: int) -> tuple[Value, Dim]:
    """The value with its last `count` source axes as the last stored axis, in any order of atoms.

    Args:
      b: the graph.
      x: the value.
      count: how many source axes.

    Returns:
      The value, and the atoms of its last stored axis in stored order.
    """
    inner = set(atoms(x.dims[len(x.dims) - count :]))
    flat = [a for axis in x.axes for a in axis]
    tail = tuple(flat[len(flat) - len(inner) :])
    outer = [tuple(a for a in axis if a not in inner) for axis in x.axes]
    if set(tail) != inner or any(o and o != a for o, a in zip(outer, x.axes, strict=True)):
        tail = atoms(x.dims[len(x.dims) - count :])
        outer = [b.inner(d) for d in x.dims[: len(x.dims) - count]]
    layout = (*(o for o in outer if o), tail)
    return Value(b.stored(x, layout), layout, x.dims), tail


def reordered(array: np.ndarray, logical: Dim, stored: Dim, axis: int) -> np.ndarray:
    """An array whose axis runs over `logical` atoms, running over them in stored order instead."""
    if logical == stored:
        return array
    axis %= array.ndim
    lead, tail = array.shape[:axis], array.shape[axis + 1 :]
    spread = array.reshape(*lead, *(a.size for a in logical), *tail)
    order = [logical.index(a) for a in stored]
    at = len(lead)
    rest = range(at + len(logical), spread.ndim)
    turned = spread.transpose(*range(at), *(at + i for i in order), *rest)
    return turned.reshape(*lead, -1, *tail)


def linear(b: Builder, x: Value, weight: np.ndarray, bias: np.ndarray | None) -> Value:
    """`x @ weight.T + bias` over the last axis; weight (out, in)."""
    if x.shape[-1] != weight.shape[1]:
        raise UnsupportedModelError(
            f"it reads {x.shape[-1]} features; its kernel has {weight.shape[1]}."
        )
    logical = x.dims[-1]
    x, tail = trailing(b, x, 1)
    kernel = reordered(weight, logical, tail, 1).T
    out = new_dim(weight.shape[0])
    name = b.add(Linear(), (x.name,), {"kernel": kernel, **optional(bias=bias)})
    return Value(name, (*x.axes[:-1], out), (*x.dims[:-1], out))


def batch_norm(
    b: Builder,
    x: Value,
    scale: np.ndarray | None,
    bias: np.ndarray | None,
    mean: np.ndarray,
    var: np.ndarray,
    eps: float,
) -> Value:
    """Batch norm with recorded statistics over source axis 1."""
    x = channels_last(b, x)
    slots = {"mean": mean, "var": var, **optional(scale=scale, bias=bias)}
    return Value(b.add(BatchNorm(eps), (x.name,), slots), x.axes, x.dims)


def layer_norm(
    b: Builder,
    x: Value,
    count: int,
    scale: np.ndarray | None,
    bias: np.ndarray | None,
    eps: float,
) -> Value:
    """Normalisation over the last `count` source axes."""
    return over_last(b, x, count, LayerNorm(eps), optional(scale=scale, bias=bias))


def rms_norm(b: Builder, x: Value, count: int, scale: np.ndarray | None, eps: float) -> Value:
    """Division by the root mean square over the last `count` source axes."""
    return over_last(b, x, count, RmsNorm(eps), optional(scale=scale))


def over_last(
    b: Builder, x: Value, count: int, op: LayerNorm | RmsNorm, given: Mapping[str, np.ndarray]
) -> Value:
    """A norm over the last `count` source axes, its parameters in the order of the stored ones."""
    logical = atoms(x.dims[len(x.dims) - count :])
    x, tail = trailing(b, x, count)
    slots = {k: reordered(v.reshape(-1), logical, tail, 0) for k, v in given.items()}
    return Value(b.add(op, (x.name,), slots), x.axes, x.dims)


def group_norm(
    b: Builder,
    x: Value,
    groups: int,
    scale: np.ndarray | None,
    bias: np.ndarray | None,
    eps: float,
) -> Value:
    """Normalisation over positions and groups of channels (source axis 1)."""
    if b.inner(x.dims[0]):
        raise UnsupportedModelError(f"it reads shape {x.shape}, whose first axis is no batch.")
    x = channels_last(b, x)
    name = b.add(GroupNorm(groups, eps), (x.name,), optional(scale=scale, bias=bias))
    return Value(name, x.axes, x.dims)


def local_norm(b: Builder, x: Value, op: LocalNorm) -> Value:
    """Normalisation by neighbouring channels (source axis 1) of an image or line."""
    if op.size % 2 == 0:
        raise UnsupportedModelError(
            f"it runs over {op.size} channels; ONNX Runtime knows odd numbers only: use "
            f"{op.size + 1}."
        )
    size = [extent_of(x, axis) for axis in (0, 1)]
    return from_image(x, b.add(op, (image(b, x),)), size, x.dims[1])


def matmul(b: Builder, x: Value | np.ndarray, y: Value | np.ndarray) -> Value:
    """`x @ y` as NumPy defines it; a matrix that is constant makes a linear layer."""
    if isinstance(x, Value) and isinstance(y, np.ndarray):
        only = one_matrix(x.shape, y)
        if only is not None:
            return linear(b, x, only.T, None)
    values = [v for v in (x, y) if isinstance(v, Value)]
    rank = max(2, *(len(v.dims) if isinstance(v, Value) else v.ndim for v in (x, y)))
    if min(len(v.dims) for v in values) < 2:
        raise UnsupportedModelError("a matrix product with a vector.")
    left, right = (as_batched(b, v, rank) for v in (x, y))
    if left.shape[-1] != right.shape[-2]:
        raise UnsupportedModelError(f"cannot multiply {left.shape} by {right.shape}.")
    lead = range(rank - 2)
    left, swapped_right = aligned(b, left, swapped(right, -1, -2), [*lead, rank - 1])
    k, m, n = left.dims[-1], left.dims[-2], swapped_right.dims[-2]
    both = [(b.inner(left.dims[i]), b.inner(swapped_right.dims[i])) for i in lead]
    batch = tuple(zip(*(pair for pair in both if any(pair)), strict=True)) or ((), ())
    flat = atoms(swapped_right.axes)
    transposed = flat == atoms((*batch[1], n, k)) and flat != atoms((*batch[1], k, n))
    names = (
        b.stored(left, (*batch[0], m, k)),
        b.stored(swapped_right, (*batch[1], n, k) if transposed else (*batch[1], k, n)),
    )
    dims = [
        p if extent(p) > 1 else q
        for p, q in zip(left.dims[:-2], swapped_right.dims[:-2], strict=True)
    ]
    axes = (*(d for d in map(b.inner, dims) if d), m, n)
    return Value(b.add(MatMul(transposed), names), axes, (*dims, m, n))


def one_matrix(shape: Ints, y: np.ndarray) -> np.ndarray | None:
    """The matrix by which all rows of a tensor of that shape are multiplied, if there is but one.

    Exporters repeat a linear layer's kernel along the batch, and multiply pair by pair.
    """
    if not 2 <= y.ndim <= len(shape):
        return None
    first, lead = y[(0,) * (y.ndim - 2)], shape[len(shape) - y.ndim : -2]
    fits = all(n in (1, have) for n, have in zip(y.shape, lead, strict=False))
    return first if fits and bool((y == first).all()) else None


def as_batched(b: Builder, x: Value | np.ndarray, rank: int) -> Value:
    """An operand of a matrix product as a value of the given rank."""
    if isinstance(x, Value):
        while len(x.dims) < rank:
            x = unsqueezed(x, 0)
        return x
    dims = tuple(new_dim(n) for n in x.shape)
    axes = tuple(d for d in dims if d)
    return as_batched(b, Value(b.constant(laid_out(b, x, dims, axes)), axes, dims), rank)
