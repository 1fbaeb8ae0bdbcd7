"""JAX's views, joins and products: what each becomes. Keywords are parameters of the primitive."""

import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.importing import arrange, aten_views
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.gathers import taken_at
from dfq_jax.io.importing.jax_ops import number_of
from dfq_jax.io.importing.values import Value

Ints = Sequence[int]


def reshape(b: Builder, x: Value, new_sizes: Ints, dimensions: Ints | None = None) -> Value:
    """reshape."""
    if dimensions is not None:
        x = arrange.permuted(x, dimensions)
    return arrange.viewed(b, x, [int(n) for n in new_sizes])


def transpose(b: Builder, x: Value, permutation: Ints) -> Value:
    """transpose."""
    return arrange.permuted(x, permutation)


def squeeze(b: Builder, x: Value, dimensions: Ints) -> Value:
    """squeeze."""
    return arrange.squeezed(x, dimensions) if dimensions else x


def expand_dims(b: Builder, x: Value, dimensions: Ints) -> Value:
    """expand_dims."""
    for axis in sorted(dimensions):
        x = arrange.unsqueezed(x, axis)
    return x


def broadcast_in_dim(b: Builder, x: Value, shape: Ints, broadcast_dimensions: Ints) -> Value:
    """broadcast_in_dim: axes put in their places, then repeated."""
    placed = [1] * len(shape)
    for size, axis in zip(x.shape, broadcast_dimensions, strict=True):
        placed[axis] = size
    return arrange.expanded(b, arrange.viewed(b, x, placed), shape)


def reverse(b: Builder, x: Value, dimensions: Ints) -> Value:
    """rev."""
    return aten_views.flip(b, x, dimensions)


def concatenate(b: Builder, *parts: Any, dimension: int) -> Value:
    """concatenate."""
    return aten_views.cat(b, parts, dimension)


def pad(b: Builder, x: Value, value: Any, padding_config: Sequence[Ints]) -> Value:
    """pad with a constant, or crop where widths are negative."""
    if any(inner for _, _, inner in padding_config):
        raise UnsupportedModelError("padding between values; use a transposed convolution.")
    widths = {i: (int(lo), int(hi)) for i, (lo, hi, _) in enumerate(padding_config) if lo or hi}
    return arrange.padded_value(b, x, widths, number_of(value, "a padding value"))


def sliced(
    b: Builder, x: Value, start_indices: Ints, limit_indices: Ints, strides: Ints | None = None
) -> Value:
    """slice."""
    steps = strides or [1] * len(start_indices)
    for axis, triple in enumerate(zip(start_indices, limit_indices, steps, strict=True)):
        x = arrange.sliced(b, x, axis, *map(int, triple))
    return x


def sliced_at(b: Builder, x: Value, *starts: Any, slice_sizes: Ints) -> Value:
    """dynamic_slice with constant starts, which JAX moves inside."""
    for axis, (start, size) in enumerate(zip(starts, slice_sizes, strict=True)):
        at = int(number_of(start, "the start of a slice"))
        first = min(max(at, 0), x.shape[axis] - size)
        x = arrange.sliced(b, x, axis, first, first + size)
    return x


def split(b: Builder, x: Value, sizes: Ints, axis: int) -> tuple[Value, ...]:
    """split."""
    return arrange.split(b, x, axis, [int(n) for n in sizes])


def gather(b: Builder, x: Value, indices: Any, dimension_numbers: Any, slice_sizes: Ints) -> Value:
    """gather with constant indices: of one axis, or one slice of several.

    Raises:
      UnsupportedModelError: for computed indices, or any other gather.
    """
    how = dimension_numbers
    places = constant_indices(indices)
    axes, gone = tuple(how.start_index_map), tuple(how.collapsed_slice_dims)
    if getattr(how, "operand_batching_dims", ()):
        raise UnsupportedModelError("indices for each element of a batch.")
    if places.ndim == 1:  # one slice
        for axis, start in zip(axes, places.tolist(), strict=True):
            if not 0 <= start <= x.shape[axis] - slice_sizes[axis]:
                raise UnsupportedModelError(f"a slice outside an axis of {x.shape[axis]} values.")
            x = arrange.sliced(b, x, axis, start, start + slice_sizes[axis])
        return arrange.squeezed(x, gone) if gone else x
    whole = all(n == x.shape[i] for i, n in enumerate(slice_sizes) if i not in axes)
    if len(axes) != 1 or axes != gone or not whole:
        raise UnsupportedModelError("a gather that is neither a slice nor along one axis.")
    axis, shape, found = axes[0], x.shape, places[..., 0]
    if found.min() < 0 or found.max() >= shape[axis]:
        raise UnsupportedModelError(f"indices outside an axis of {shape[axis]} values.")
    y = taken_at(b, x, axis, found.reshape(-1))
    y = arrange.viewed(b, y, (*shape[:axis], *found.shape, *shape[axis + 1 :]))
    chosen = list(range(axis, axis + found.ndim))
    others = iter([i for i in range(len(y.dims)) if i not in chosen])
    picked = iter(chosen)
    offsets = tuple(how.offset_dims)
    order = [next(others) if i in offsets else next(picked) for i in range(len(y.dims))]
    return arrange.permuted(y, order)


def constant_indices(indices: Any) -> np.ndarray:
    """Indices that are constants.

    Raises:
      UnsupportedModelError: if the network computes them.
    """
    if isinstance(indices, Value):
        raise UnsupportedModelError("indices that the network computes.")
    return np.asarray(indices)


def dot_general(b: Builder, x: Any, y: Any, dimension_numbers: Any) -> Value:
    """dot_general: axes summed over and axes in common, by number in either operand."""
    (x_summed, y_summed), (x_batch, y_batch) = dimension_numbers
    letters = iter(string.ascii_letters)
    left = [next(letters) for _ in x.shape]
    right = [next(letters) for _ in y.shape]
    for mine, theirs in zip((*x_summed, *x_batch), (*y_summed, *y_batch), strict=True):
        right[theirs] = left[mine]
    shared = [left[i] for i in x_batch]
    free = [c for i, c in enumerate(left) if i not in (*x_summed, *x_batch)]
    free += [c for i, c in enumerate(right) if i not in (*y_summed, *y_batch)]
    terms = [("".join(left), x), ("".join(right), y)]
    if not isinstance(x, Value):
        terms.reverse()  # a constant matrix from the left is a layer all the same
    equation = f"{terms[0][0]},{terms[1][0]}->{''.join((*shared, *free))}"
    tensors = [compacted(t) for _, t in terms]
    return aten_views.einsum(b, equation, tensors)


def compacted(tensor: Any) -> Any:
    """A factor of a product: constants as floats."""
    return tensor if isinstance(tensor, Value) else np.asarray(tensor, np.float32)
