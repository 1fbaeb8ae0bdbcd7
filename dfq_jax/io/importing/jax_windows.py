"""JAX's convolutions, pools and reductions, with whatever axes their dimension numbers name."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import ConvTranspose2d, Mul, Pads, Pair
from dfq_jax.io.importing import arrange, layers, pointwise, pools
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.jax_ops import compact, times
from dfq_jax.io.importing.pointwise import Operand
from dfq_jax.io.importing.values import Value, extent

Ints = Sequence[int]
Widths = Sequence[Ints]


def convolution(
    b: Builder,
    x: Any,
    kernel: Any,
    window_strides: Ints,
    padding: Widths,
    lhs_dilation: Ints,
    rhs_dilation: Ints,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int = 1,
) -> Value:
    """conv_general_dilated; one that spreads its input is a transposed convolution.

    Raises:
      UnsupportedModelError: if its kernel is computed from the images, or it groups the batch.
    """
    if not isinstance(x, Value) or isinstance(kernel, Value):
        raise UnsupportedModelError("a convolution whose kernel the network computes.")
    if batch_group_count != 1:
        raise UnsupportedModelError("a convolution with groups of the batch.")
    how = dimension_numbers
    source = arrange.permuted(x, how.lhs_spec)
    weight = np.asarray(kernel).transpose(how.rhs_spec)  # out, in, height, width
    if max(lhs_dilation) > 1:
        if max(window_strides) > 1:
            raise UnsupportedModelError("a convolution with strides and a dilated input.")
        y = spread(b, source, weight, padding, lhs_dilation, rhs_dilation, feature_group_count)
    else:
        source, widths = cropped(b, source, padding)
        rank = len(source.dims)
        y = layers.convolution(
            b,
            source,
            weight,
            None,
            layers.pair(tuple(window_strides), rank, 1),
            widths,
            layers.pair(tuple(rhs_dilation), rank, 1),
            feature_group_count,
        )
    return arrange.permuted(y, np.argsort(how.out_spec).tolist())


def spread(
    b: Builder,
    x: Value,
    weight: np.ndarray,
    padding: Widths,
    strides: Ints,
    dilation: Ints,
    groups: int,
) -> Value:
    """A convolution over an input with zeros between its values, as a transposed one.

    Raises:
      UnsupportedModelError: if it pads by more than its kernel reaches at the start.
    """
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    cuts = [(r - lo, r - hi) for r, (lo, hi) in zip(reach, padding, strict=True)]
    if any(lo < 0 for lo, _ in cuts):
        raise UnsupportedModelError(f"a transposed convolution padded by {tuple(padding)}.")
    count, per_group, *space = weight.shape
    flipped = np.flip(weight, tuple(range(2, weight.ndim)))
    apart = flipped.reshape(groups, count // groups, per_group, *space)
    turned = np.swapaxes(apart, 1, 2).reshape(groups * per_group, count // groups, *space)
    rank = len(x.dims)
    ends = lines([(lo, max(hi, 0)) for lo, hi in cuts], rank)
    extra = layers.pair(tuple(max(-hi, 0) for _, hi in cuts), rank, 0)
    op = ConvTranspose2d(
        layers.pair(tuple(strides), rank, 1),
        ends,
        groups,
        layers.pair(tuple(dilation), rank, 1),
        extra,
    )
    return layers.transposed_convolution(b, x, turned, None, op)


def lines(widths: Widths, rank: int) -> Pads:
    """Padding of height and width; lines have no height."""
    full = [(int(lo), int(hi)) for lo, hi in widths]
    return (full[0], full[1]) if rank == 4 else ((0, 0), full[0])


def cropped(b: Builder, x: Value, padding: Widths) -> tuple[Value, Pads]:
    """(n, c, ...) less what negative padding cuts off, and the padding that is left."""
    cuts = {2 + i: (min(lo, 0), min(hi, 0)) for i, (lo, hi) in enumerate(padding)}
    x = arrange.padded_value(b, x, {i: w for i, w in cuts.items() if any(w)})
    return x, lines([(max(lo, 0), max(hi, 0)) for lo, hi in padding], len(x.dims))


class Window(NamedTuple):
    """Windows over an image.

    Attributes:
      order: the axes of the source as (batch, channels, height, width).
      size: height and width of a window.
      strides: from one to the next.
      dilation: within one.
      padding: as the primitive has it, for the axes of space.
    """

    order: tuple[int, ...]
    size: Pair
    strides: Pair
    dilation: Pair
    padding: Widths


def window_of(x: Value, size: Ints, strides: Ints, padding: Widths, dilation: Ints) -> Window:
    """The axes that windows run over, and the windows.

    Raises:
      UnsupportedModelError: if they run over the batch, or over three axes.
    """
    rank = len(x.dims)
    moves = zip(size, strides, padding, strict=True)
    space = [i for i, (n, step, pad) in enumerate(moves) if n > 1 or step > 1 or any(pad)]
    if 0 in space or len(space) > rank - 2 or rank not in (3, 4):
        raise UnsupportedModelError(f"windows of {tuple(size)} over shape {x.shape}.")
    for axis in range(1, rank):  # windows of one pixel run over any axis
        if len(space) < rank - 2 and axis not in space:
            space.append(axis)
    space.sort()
    order = (0, next(i for i in range(1, rank) if i not in space), *space)
    taken = lambda values: layers.pair(tuple(int(values[i]) for i in space), rank, 1)
    return Window(order, taken(size), taken(strides), taken(dilation), [padding[i] for i in space])


def ordered_back(y: Value, window: Window) -> Value:
    """A pooled (n, c, h, w) in the axis order of its source."""
    return arrange.permuted(y, np.argsort(window.order).tolist())


def check_plain(base_dilation: Ints) -> None:
    """Refuses windows over an input with gaps."""
    if max(base_dilation) > 1:
        raise UnsupportedModelError("windows over an input with gaps (base_dilation).")


def max_pool(
    b: Builder,
    x: Value,
    window_dimensions: Ints,
    window_strides: Ints,
    padding: Widths,
    base_dilation: Ints,
    window_dilation: Ints,
) -> Value:
    """reduce_window_max."""
    check_plain(base_dilation)
    w = window_of(x, window_dimensions, window_strides, padding, window_dilation)
    source, widths = cropped(b, arrange.permuted(x, w.order), w.padding)
    return ordered_back(pools.max_pool(b, source, w.size, w.strides, widths, w.dilation), w)


def min_pool(b: Builder, x: Value, **windows: Any) -> Value:
    """reduce_window_min."""
    return pointwise.affine(b, max_pool(b, pointwise.affine(b, x, -1.0), **windows), -1.0)


def mean_pool(
    b: Builder,
    x: Value,
    window_dimensions: Ints,
    window_strides: Ints,
    padding: Widths,
    base_dilation: Ints,
    window_dilation: Ints,
    counted: bool,
) -> Value:
    """The mean over windows, padding counted or not."""
    check_plain(base_dilation)
    if max(window_dilation) > 1:
        raise UnsupportedModelError("an average over windows with gaps.")
    w = window_of(x, window_dimensions, window_strides, padding, window_dilation)
    source, widths = cropped(b, arrange.permuted(x, w.order), w.padding)
    y = pools.avg_pool(b, source, w.size, w.strides, widths, count_padding=counted)
    return ordered_back(y, w)


def sum_pool(b: Builder, x: Value, window_dimensions: Ints, **windows: Any) -> Value:
    """reduce_window_sum: the mean times the count, so that dividing by it leaves the mean."""
    y = mean_pool(b, x, window_dimensions, **windows, counted=True)
    return pointwise.affine(b, y, float(np.prod(window_dimensions)))


def window_mean(
    b: Builder,
    x: Value,
    counts: Any,
    window_dimensions: Ints,
    window_strides: Ints,
    padding: Widths,
    **more: Any,
) -> Value:
    """A sum over windows, divided by constants: a mean without the padding where they count."""
    held = [
        counts_along(*a)
        for a in zip(x.shape, window_dimensions, window_strides, padding, strict=True)
    ]
    grid = 1
    for axis, line in enumerate(held):
        grid = grid * line.reshape([-1 if i == axis else 1 for i in range(len(held))])
    windows = {"window_strides": window_strides, "padding": padding, **more}
    if not np.array_equal(np.broadcast_to(counts, np.shape(grid)), grid):
        total = sum_pool(b, x, window_dimensions, **windows)
        return divided(b, total, counts)
    return mean_pool(b, x, window_dimensions, **windows, counted=False)


def divided(b: Builder, x: Value, y: Operand) -> Value:
    """A value over a constant."""
    inverse = 1 / np.asarray(compact(y), np.float32)
    return multiplied(b, x, inverse)


def multiplied(b: Builder, x: Value, y: np.ndarray) -> Value:
    """A value times a constant."""
    return pointwise.combined(b, Mul(), x, y)


def counts_along(size: int, window: int, stride: int, padding: Ints) -> np.ndarray:
    """How many values of an axis each window along it holds."""
    low, high = padding
    inside = np.zeros(size + max(low, 0) + max(high, 0))
    inside[max(low, 0) : max(low, 0) + size] = 1
    inside = inside[max(-low, 0) : len(inside) - max(-high, 0)]
    starts = range(0, len(inside) - window + 1, stride)
    return np.array([inside[i : i + window].sum() for i in starts])


def total(b: Builder, x: Value, axes: Ints) -> Value:
    """reduce_sum: the mean times the count, so that dividing by it leaves the mean."""
    if not axes:
        return x
    count = int(np.prod([extent(x.dims[a]) for a in axes]))
    return pointwise.affine(b, pools.reduced(b, x, "mean", axes), float(count))


def largest(b: Builder, x: Value, axes: Ints) -> Value:
    """reduce_max."""
    return pools.reduced(b, x, "max", axes) if axes else x


def smallest(b: Builder, x: Value, axes: Ints) -> Value:
    """reduce_min."""
    return times(b, largest(b, times(b, x, -1.0), axes), -1.0)
