"""Networks that read volumes: clips, scans. Convolution and pooling in three directions."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.graph import Graph
from dfq_jax.graph.volume_ops import Conv3d, Triple, VolumePads
from dfq_jax.io.frontends.program import Program
from dfq_jax.io.importing import arrange, layers, pools
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.engine import OperatorTable, lower_all, returned
from dfq_jax.io.importing.tidy import tidy
from dfq_jax.io.importing.values import Atom, Value, extent, new_dim
from dfq_jax.types import NHWC

VOLUME = "values"
"""What graphs call the volumes that they read."""
Ints = Sequence[int]


def reads_volumes(program: Program) -> bool:
    """Whether a program reads one tensor of (batch, channels, depth, height, width)."""
    return len(program.inputs) == 1 and len(program.inputs[0].shape) == 5


def import_volumes(
    program: Program, table: OperatorTable
) -> tuple[Graph, dict[str, dict[str, np.ndarray]], tuple[int, ...]]:
    """Graph and parameters of a program that reads volumes, and the shape of one, as in its source.

    Raises:
      UnsupportedModelError: naming the call that cannot be expressed, or a size that is free.
    """
    (read,) = program.inputs
    sizes = [n for n in read.shape[1:] if n is not None]
    if len(sizes) < 4:
        raise UnsupportedModelError(
            f"its input has free sizes {read.shape}; volumes are read of one size: export it again "
            "with an example of that."
        )
    batch = read.shape[0] or 1
    b = Builder(None if batch == 1 else Atom(batch))
    b.unique(VOLUME)
    axes = tuple(map(new_dim, sizes))
    dims = (() if b.batch is None else (b.batch,), *axes)
    env: dict[str, Any] = {**program.arrays, read.name: Value(VOLUME, axes, dims)}
    lower_all(b, program, table, env)
    outputs = tuple(returned(b, env[name], name, NHWC) for name in program.outputs)
    return *tidy(Graph(tuple(b.nodes), (VOLUME,), outputs), b.params), tuple(sizes)


def triple(values: Ints | int) -> Triple:
    """One number for each direction."""
    listed = [values] if isinstance(values, int) else list(values)
    first, second, third = listed * 3 if len(listed) == 1 else listed
    return first, second, third


def volume_window(
    x: Value,
    kernel: Ints,
    strides: Ints | None,
    dilations: Ints | None,
    pads: Ints | None,
    auto_pad: str,
) -> tuple[Triple, Triple, VolumePads, Triple]:
    """(window, strides, padding, dilation) of ONNX's attributes; None for one left out."""
    size, steps, spread = (triple(v or 1) for v in (kernel, strides, dilations))
    if auto_pad.startswith("SAME"):
        both = []
        for have, k, s, d in zip(x.shape[2:], size, steps, spread, strict=True):
            total = max((-(-have // s) - 1) * s + d * (k - 1) + 1 - have, 0)
            both.append(layers.shared_out(total, auto_pad))
        a, c, e = both
    else:
        given = (0,) * 6 if pads is None or auto_pad == "VALID" else tuple(pads)
        a, c, e = zip(given[:3], given[3:], strict=True)
    return size, steps, (a, c, e), spread


def stored_volume(b: Builder, x: Value) -> str:
    """The tensor that holds a source (n, c, d, h, w) with its channels last.

    Raises:
      UnsupportedModelError: for another rank, or an axis merged with the batch.
    """
    if len(x.dims) != 5 or b.inner(x.dims[0]):
        raise UnsupportedModelError(
            f"it reads shape {x.shape}; expected (batch, channels, depth, height, width)."
        )
    return b.stored(x, (*x.dims[2:], x.dims[1]))


def volume_convolution(
    b: Builder, x: Value, weight: np.ndarray, bias: np.ndarray | None, op: Conv3d
) -> Value:
    """A convolution with `weight` (cout, cin/groups, kd, kh, kw)."""
    source = stored_volume(b, x)
    if x.shape[1] != weight.shape[1] * op.groups:
        raise UnsupportedModelError(
            f"it reads {x.shape[1]} channels, its kernel {weight.shape[1]} in {op.groups} groups."
        )
    slots = {"kernel": weight.transpose(2, 3, 4, 1, 0), **layers.optional(bias=bias)}
    along = zip(x.shape[2:], op.padding, op.dilation, weight.shape[2:], op.strides, strict=True)
    size = [(have + sum(p) - d * (k - 1) - 1) // s + 1 for have, p, d, k, s in along]
    if min(size) < 1 or max(size) > layers.MOST_PIXELS:
        raise UnsupportedModelError(f"its result would have sizes {size}.")
    made = (*map(new_dim, size), new_dim(weight.shape[0]))
    name = b.add(op, (source,), slots)
    return Value(name, made, (x.dims[0], made[3], *made[:3]))


def max_volumes(
    b: Builder,
    x: Value,
    window: Triple,
    strides: Triple,
    padding: VolumePads,
    dilation: Triple = (1, 1, 1),
    ceil: bool = False,
) -> Value:
    """Maximum over windows: maxima along the depth of maxima within planes."""
    first = (window[0], 1), (strides[0], 1), (padding[0], (0, 0)), (dilation[0], 1)
    rest = window[1:], strides[1:], padding[1:], dilation[1:]
    planes = lambda v: pools.max_pool(b, v, *rest, ceil=ceil)
    return pooled_in_turn(b, x, planes, lambda v: pools.max_pool(b, v, *first, ceil=ceil))


def mean_volumes(
    b: Builder,
    x: Value,
    window: Triple,
    strides: Triple,
    padding: VolumePads,
    *,
    ceil: bool = False,
    count_padding: bool = True,
) -> Value:
    """Mean over windows: means along the depth of means within planes, as windows are boxes."""
    how = {"ceil": ceil, "count_padding": count_padding}
    first = (window[0], 1), (strides[0], 1), (padding[0], (0, 0))
    planes = lambda v: pools.avg_pool(b, v, window[1:], strides[1:], padding[1:], **how)
    return pooled_in_turn(b, x, planes, lambda v: pools.avg_pool(b, v, *first, **how))


def pooled_in_turn(
    b: Builder, x: Value, planes: Callable[[Value], Value], lines: Callable[[Value], Value]
) -> Value:
    """A pooling of source (n, c, d, h, w), which reads images twice.

    Args:
      b: the graph.
      x: the volumes.
      planes: pools source (n, c, height, width).
      lines: pools source (n, c, depth, positions) along the depth alone.
    """
    if len(x.dims) != 5:
        raise UnsupportedModelError(f"it reads shape {x.shape}, no volumes.")
    n, channels, depth, height, width = x.dims
    flat = planes(Value(x.name, x.axes, (n, (*depth, *channels), height, width)))
    *_, height, width = flat.dims
    found = lines(Value(flat.name, flat.axes, (n, channels, depth, (*height, *width))))
    return arrange.viewed(b, found, (*found.shape[:3], extent(height), extent(width)))
