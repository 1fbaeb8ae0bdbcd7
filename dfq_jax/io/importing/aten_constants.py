"""PyTorch's operators on constants, in NumPy: masks, position tables, relative indices."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.importing.limits import (
    affordable,
    affordable_broadcast,
    affordable_lookup,
    affordable_product,
    affordable_shape,
)

Array = np.ndarray
DTYPES = {"float": np.float32, "half": np.float32, "bfloat16": np.float32, "double": np.float64}


def dtype_of(name: Any, default: type = np.float32) -> np.dtype:
    """The NumPy type of PyTorch's name for it."""
    if name is None:
        return np.dtype(default)
    text = str(name).rpartition(".")[2].lower()
    text = {"long": "int64", "int": "int32", "short": "int16", "char": "int8"}.get(text, text)
    return np.dtype(DTYPES.get(text, text))


def filled(fill: float | None, size: Sequence[int], *given: Any, **named: Any) -> Array:
    """zeros, ones, full."""
    value = fill if fill is not None else (given[0] if given else named["fill_value"])
    whole = np.int64 if isinstance(value, int) and fill is None else np.float32
    return np.full(affordable_shape(size), value, dtype_of(named.get("dtype"), whole))


def filled_like(fill: float | None, x: Array, *given: Any, **named: Any) -> Array:
    """zeros_like, ones_like, full_like."""
    value = fill if fill is not None else (given[0] if given else named["fill_value"])
    return np.full(x.shape, value, dtype_of(named.get("dtype"), x.dtype.type))


def new_filled(fill: float | None, x: Array, size: Sequence[int], *given: Any, **named: Any):
    """new_zeros, new_ones, new_full."""
    value = fill if fill is not None else (given[0] if given else named["fill_value"])
    return np.full(affordable_shape(size), value, dtype_of(named.get("dtype"), x.dtype.type))


def arange(*given: Any, **named: Any) -> Array:
    """arange with an end, or start and end, or start, end and step."""
    ends = [named[k] for k in ("start", "end", "step") if k in named]
    numbers = [n for n in (*given, *ends) if isinstance(n, int | float)]
    whole = all(isinstance(n, int) for n in numbers)
    start, end, step = (0, *numbers, 1) if len(numbers) == 1 else (*numbers, 1)[:3]
    affordable(abs((end - start) / step))
    return np.arange(
        *numbers, dtype=dtype_of(named.get("dtype"), np.int64 if whole else np.float32)
    )


def linspace(start: int | float, end: int | float, steps: int, **named: Any) -> Array:
    """Evenly spaced numbers."""
    affordable(steps)
    return np.linspace(start, end, steps, dtype=np.float32)


def kept_type(function: Callable[..., Any], x: Any, *others: Any, **named: Any) -> Any:
    """A function of arrays and numbers that keeps float32, whatever NumPy would promote to."""
    affordable_broadcast(x, *others)
    result = np.asarray(function(x, *others, **named))
    doubles = any(isinstance(a, Array) and a.dtype == np.float64 for a in (x, *others))
    return result if doubles or result.dtype != np.float64 else result.astype(np.float32)


def binary(function: Callable[..., Any], x: Any, other: Any, alpha: float = 1, **named: Any) -> Any:
    """An elementwise function of two operands; numbers stay numbers."""
    other = other * alpha if alpha != 1 else other
    if not isinstance(x, Array) and not isinstance(other, Array):
        result = function(x, other)
        return result.item() if isinstance(result, np.generic) else result
    return kept_type(function, x, other)


def scattered(x: Array, src: Any, view: Callable[[Array], Array]) -> Array:
    """A copy of x whose part that `view` shows holds `src`."""
    copy = np.array(x)
    view(copy)[...] = src
    return copy


def in_place(function: Callable[..., Any], x: Array, *others: Any, **named: Any) -> Array:
    """An in-place operator: the type of its first argument stays. Readers see only the result."""
    result = np.asarray(function(x, *others, **named)).astype(x.dtype)
    return np.broadcast_to(result, x.shape)


def flatten(x: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    """Some consecutive axes into one."""
    first, last = start_dim % x.ndim, end_dim % x.ndim
    merged = math.prod(x.shape[first : last + 1])
    return x.reshape(*x.shape[:first], merged, *x.shape[last + 1 :])


def squeeze(x: Array, dim: Any = None) -> Array:
    """Without axes of size 1."""
    axes = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return x.squeeze(tuple(a % x.ndim for a in axes if x.shape[a] == 1))


def sliced(x: Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Array:
    """x[start:end:step] along one axis."""
    index: list[Any] = [slice(None)] * x.ndim
    index[dim] = slice(start, end, step)
    return x[tuple(index)]


def selected(x: Array, dim: int, index: int) -> Array:
    """x[index] along one axis."""
    at: list[Any] = [slice(None)] * x.ndim
    at[dim] = index
    return x[tuple(at)]


def expand(x: Array, size: Sequence[int], implicit: bool = False) -> Array:
    """Axes of size 1 repeated."""
    have = (1,) * (len(size) - x.ndim) + x.shape
    wanted = [h if s == -1 else s for s, h in zip(size, have, strict=True)]
    return np.broadcast_to(x.reshape(have), wanted)


def indexed(x: Array, indices: Sequence[Any]) -> Array:
    """x[i, j, ...]; None takes a whole axis."""
    affordable_lookup(x, indices)
    return x[tuple(slice(None) if i is None else np.asarray(i) for i in indices)]


def assigned(x: Array, indices: Sequence[Any], values: Array, accumulate: bool = False) -> Array:
    """A copy of x with x[i, j, ...] = values."""
    if accumulate:
        raise UnsupportedModelError("index_put that accumulates.")
    copy = x.copy()
    copy[tuple(slice(None) if i is None else np.asarray(i) for i in indices)] = values
    return copy


def pieces(x: Array, split_size: Any, dim: int = 0) -> tuple[Array, ...]:
    """split: pieces of one length, or of the given lengths."""
    step = split_size if isinstance(split_size, int) else None
    ends = range(step, x.shape[dim], step) if step else np.cumsum(split_size)[:-1]
    return tuple(np.split(x, list(ends), axis=dim))


def chunks(x: Array, chunks: int, dim: int = 0) -> tuple[Array, ...]:
    """chunk: at most so many pieces."""
    return pieces(x, -(-x.shape[dim] // chunks), dim)


def converted(x: Any, *given: Any, **named: Any) -> Any:
    """to, type_as, float, long...: another type."""
    name = named.get("dtype", next((g for g in given if isinstance(g, str)), None))
    known = name is not None and isinstance(x, Array)
    return x.astype(dtype_of(name)) if known else x


def summed(
    function: Callable[..., Any], x: Array, dim: Any = None, keepdim: bool = False, **_: Any
):
    """sum, mean, amax over some axes."""
    axes = None if dim is None or dim == () else tuple([dim] if isinstance(dim, int) else dim)
    return kept_type(function, x, axis=axes, keepdims=keepdim)


def linear(x: Array, weight: Array, bias: Any = None) -> Array:
    """x @ weight.T + bias."""
    affordable_product(x, weight.T)
    return x @ weight.T + (0 if bias is None else bias)


def embedding(weight: Array, indices: Array, *given: Any, **named: Any) -> Array:
    """Rows of a table."""
    affordable_lookup(weight, (indices,))
    return weight[indices]


def clamp(x: Array, min: Any = None, max: Any = None) -> Array:
    """Limits."""
    return kept_type(np.clip, x, min, max)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return kept_type(lambda v: 1 / (1 + np.exp(-v)), x)


def masked(x: Array, mask: Array, value: Any) -> Array:
    """Values replaced where the mask holds."""
    affordable_broadcast(x, mask)
    return np.where(mask, np.asarray(value, x.dtype), x)


def chosen(condition: Array, self: Array, other: Array) -> Array:
    """where: one or the other, element by element."""
    affordable_broadcast(condition, self, other)
    return np.where(condition, self, other)


def matmul(x: Array, other: Array | None = None, **named: Any) -> Array:
    """matmul, mm, bmm: whatever the second operand is called."""
    second = other if other is not None else next(iter(named.values()))
    affordable_product(x, second)
    return np.matmul(x, second)


def repeat(x: Array, repeats: Sequence[int]) -> Array:
    """The array beside itself, so many times along each axis."""
    affordable(x.size * math.prod(repeats))
    return np.tile(x, repeats)


def cat(tensors: Sequence[Array], dim: int = 0) -> Array:
    """Arrays beside each other."""
    affordable(sum(t.size for t in tensors))
    return np.concatenate(tensors, axis=dim)


def stack(tensors: Sequence[Array], dim: int = 0) -> Array:
    """Arrays beside each other along a new axis."""
    affordable(sum(t.size for t in tensors))
    return np.stack(tensors, axis=dim)


def meshgrid(tensors: Sequence[Array], indexing: str = "ij") -> tuple[Array, ...]:
    """Coordinates of a grid."""
    affordable(len(tensors) * math.prod(t.size for t in tensors))
    return tuple(np.meshgrid(*tensors, indexing="ij" if indexing == "ij" else "xy"))


def roll(x: Array, shifts: Any, dims: Any = ()) -> Array:
    """Axes rotated."""
    return np.roll(x, shifts, None if dims == () else dims)


def copied(x: Array, *given: Any, **named: Any) -> Array:
    """A copy that may be changed."""
    return np.array(x)


def same(x: Any, *given: Any, **named: Any) -> Any:
    """Operators that leave values as they are."""
    return x


def scalar(x: Any) -> Any:
    """item, _local_scalar_dense: an array of one value as a number."""
    return x.item() if isinstance(x, Array) else x


UNARY = {
    "exp": np.exp,
    "log": np.log,
    "log2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "abs": np.abs,
    "sign": np.sign,
    "neg": np.negative,
    "floor": np.floor,
    "ceil": np.ceil,
    "round": np.round,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "logical_not": np.logical_not,
    "bitwise_not": np.logical_not,
}
BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "floor_divide": np.floor_divide,
    "remainder": np.remainder,
    "pow": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "logical_and": np.logical_and,
    "bitwise_and": np.logical_and,
}
PLAIN: dict[str, Callable[..., Any]] = {
    "zeros": partial(filled, 0.0),
    "ones": partial(filled, 1.0),
    "full": partial(filled, None),
    "zeros_like": partial(filled_like, 0.0),
    "ones_like": partial(filled_like, 1.0),
    "full_like": partial(filled_like, None),
    "new_zeros": partial(new_filled, 0.0),
    "new_ones": partial(new_filled, 1.0),
    "new_full": partial(new_filled, None),
    "arange": arange,
    "linspace": linspace,
    "rsub": lambda x, other, alpha=1: binary(np.subtract, other, x * alpha),
    "view": lambda x, size: x.reshape(size),
    "reshape": lambda x, shape: x.reshape(shape),
    "_unsafe_view": lambda x, size: x.reshape(size),
    "flatten": flatten,
    "permute": lambda x, dims: x.transpose(dims),
    "transpose": lambda x, dim0, dim1: np.swapaxes(x, dim0, dim1),
    "swapaxes": lambda x, axis0, axis1: np.swapaxes(x, axis0, axis1),
    "t": lambda x: x.T,
    "squeeze": squeeze,
    "unsqueeze": lambda x, dim: np.expand_dims(x, dim),
    "slice": sliced,
    "select": selected,
    "expand": expand,
    "expand_as": lambda x, other: expand(x, other.shape),
    "repeat": repeat,
    "cat": cat,
    "matmul": matmul,
    "mm": matmul,
    "bmm": matmul,
    "stack": stack,
    "split": pieces,
    "split_with_sizes": lambda x, split_sizes, dim=0: pieces(x, split_sizes, dim),
    "chunk": chunks,
    "unbind": lambda x, dim=0: tuple(np.moveaxis(x, dim, 0)),
    "index": indexed,
    "index_put": assigned,
    "slice_scatter": lambda x, src, dim=0, start=None, end=None, step=1: scattered(
        x, src, lambda v: sliced(v, dim, start, end, step)
    ),
    "select_scatter": lambda x, src, dim, index: scattered(
        x, src, lambda v: np.moveaxis(v, dim, 0)[index : index + 1]
    ),
    "index_select": lambda x, dim, index: np.take(x, index, axis=dim),
    "embedding": embedding,
    "where": chosen,
    "masked_fill": masked,
    "flip": lambda x, dims: np.flip(x, dims),
    "roll": roll,
    "meshgrid": meshgrid,
    "cumsum": lambda x, dim, dtype=None: np.cumsum(x, axis=dim),
    "sum": partial(summed, np.sum),
    "mean": partial(summed, np.mean),
    "amax": partial(summed, np.max),
    "clamp": clamp,
    "clamp_min": lambda x, min: clamp(x, min),
    "sigmoid": sigmoid,
    "linear": linear,
    "to": converted,
    "_to_copy": converted,
    "type_as": lambda x, other: x.astype(other.dtype),
    "fill_": partial(in_place, lambda x, value: value),
    "zero_": partial(in_place, lambda x: 0),
    "copy_": partial(in_place, lambda x, src, non_blocking=False: src),
    "clone": copied,
    "lift_fresh_copy": copied,
    "item": scalar,
    "_local_scalar_dense": scalar,
    "sym_size": lambda x, dim: x.shape[dim],
    "_operator.getitem": lambda x, index: x[index],
    "scalar_tensor": lambda s, **_: np.asarray(s, np.float32),
}
SAME = ("contiguous", "detach", "alias", "dropout", "lift_fresh", "_assert_tensor_metadata")
NUMBERS: dict[str, Callable[..., Any]] = {
    "_operator.add": lambda x, y: x + y,
    "_operator.sub": lambda x, y: x - y,
    "_operator.mul": lambda x, y: x * y,
    "_operator.floordiv": lambda x, y: x // y,
    "_operator.truediv": lambda x, y: x / y,
    "_operator.mod": lambda x, y: x % y,
    "_operator.neg": lambda x: -x,
    "_operator.eq": lambda x, y: x == y,
    "_operator.ge": lambda x, y: x >= y,
    "_operator.le": lambda x, y: x <= y,
}
FOLD: dict[str, Callable[..., Any]] = {
    **{name: partial(kept_type, function) for name, function in UNARY.items()},
    **{name: partial(binary, function) for name, function in BINARY.items()},
    **{f"{name}_": partial(in_place, partial(binary, f)) for name, f in BINARY.items()},
    **dict.fromkeys(SAME, same),
    **NUMBERS,
    **PLAIN,
}
