"""Whether a network reads images channels first or last, found from what it does with them.

Converters from Keras and TensorFlow keep images as their source has them, (batch, height, width,
channels), and transpose where ONNX wants channels first. So the input is followed through whatever
moves its axes to the first operator that tells them apart. Lines, (batch, length, channels), are
images of one row.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfq_jax.io.frontends.program import Call, Program, Ref
from dfq_jax.types import NCHW, NHWC

KEEPS = frozenset(
    (
        *("abs", "add", "cast", "ceil", "clamp", "clip", "clone", "constant_pad_nd", "contiguous"),
        *("detach", "div", "dropout", "floor", "identity", "leakyrelu", "mul", "neg", "pad", "pow"),
        *("relu", "sigmoid", "sqrt", "square", "sub", "tanh", "to", "to_copy"),
    )
)
"""Operators that leave axes where they are."""
WINDOWS = frozenset(
    (
        *("conv", "conv1d", "conv2d", "convolution", "conv_general_dilated"),
        *("convtranspose", "conv_transpose1d", "conv_transpose2d"),
        *("batch_norm", "batchnormalization", "group_norm", "groupnormalization"),
        *("instance_norm", "instancenormalization", "lrn"),
        *("averagepool", "avg_pool1d", "avg_pool2d", "globalaveragepool"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "globalmaxpool"),
        *("maxpool", "max_pool1d", "max_pool2d", "max_pool2d_with_indices"),
        *("upsample_bilinear2d", "upsample_nearest2d"),
    )
)
"""Operators that read channels first, whatever the network's input has."""
FEATURES = frozenset(("gemm", "gru", "linear", "lstm", "matmul", "rnn"))
"""Operators that read the channels of lines last."""
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What following a damaged call may raise."""
COLOURS = (1, 3, 4)
"""Channels an image has, where nothing else tells."""

ImageAxes = tuple[int | None, ...]


class Followed(NamedTuple):
    """A tensor on its way from the input.

    Attributes:
      axes: which axis of the input each of its axes is, None for others.
      sizes: of its axes, None where free.
    """

    axes: ImageAxes
    sizes: tuple[int | None, ...]


def layout_of(program: Program) -> str:
    """`NCHW` or `NHWC`, which for lines are (batch, channels, length) and the other way round.

    Args:
      program: of one input.

    Returns:
      What its operators say, else the channels of its first convolution, else what is usual for
      its source, else its sizes.
    """
    image = program.inputs[0]
    if len(image.shape) not in (3, 4):
        return NCHW
    for find in (told, fitting):
        with contextlib.suppress(*MALFORMED):  # such calls are refused by name when imported
            if found := find(program):
                return found
    return program.usual_layout or likely(image.shape)


def told(program: Program) -> str:
    """What the first operator that reads channels first finds there; empty if none is reached."""
    image = program.inputs[0]
    rank = len(image.shape)
    known = {image.name: Followed(tuple(range(rank)), image.shape)}
    for call in program.calls:
        x = next((known[name] for name in operands(call) if name in known), None)
        if x is None or not call.outputs:
            continue
        kind = kind_of(call)
        if kind in WINDOWS and len(x.axes) in (3, 4):
            if found := read_as(named_axes(call, x.axes), rank):
                return found
        elif kind in FEATURES and rank == len(x.axes) == 3:
            return NCHW if x.axes[-1] == 1 else NHWC
        elif call.outputs[0] is not None and (y := moved(kind, call, x, program)) is not None:
            known[call.outputs[0]] = y
    return ""


def named_axes(call: Call, axes: ImageAxes) -> ImageAxes:
    """The axes as the call names them, channels after the batch."""
    how = call.kwargs.get("dimension_numbers")
    return axes if how is None else tuple(axes[i] for i in how.lhs_spec)


def kind_of(call: Call) -> str:
    """`aten.conv2d.default` as `conv2d`, `onnx.Conv` as `conv`."""
    return [*call.target.split("."), ""][1].strip("_").lower()


def operands(call: Call) -> Iterator[str]:
    """The tensors a call reads, constants among them."""
    given = (*call.args, call.kwargs.get("x"))
    return (a.name for a in given if isinstance(a, Ref))


def read_as(axes: ImageAxes, rank: int) -> str:
    """The layout in which these are (batch, channels, height, width); empty if in neither.

    Args:
      axes: of the input, in the order of an operator that reads channels first.
      rank: of the input; lines may have become images on the way.
    """
    _, channels, *space = axes
    left = [axis for axis in space if axis is not None] if rank == 3 else space
    if channels == rank - 1 or left == list(range(1, rank - 1)):
        return NHWC
    return NCHW if channels == 1 or left == list(range(2, rank)) else ""


def moved(kind: str, call: Call, x: Followed, program: Program) -> Followed | None:
    """The result of a call that keeps or reorders axes; None for any other."""
    if kind in KEEPS:
        return x
    if kind in ("transpose", "permute"):
        order = order_of(kind, call, len(x.axes))
        return Followed(tuple(x.axes[i] for i in order), tuple(x.sizes[i] for i in order))
    if kind in ("reshape", "view", "squeeze", "unsqueeze", "broadcast_in_dim"):
        return reshaped(call, x, program)
    return None


def order_of(kind: str, call: Call, rank: int) -> list[int]:
    """The axes of the operand in the order of the result."""
    how, backwards = call.kwargs, list(range(rank))[::-1]
    if "dim0" in how:
        order = list(range(rank))
        a, b = how["dim0"], how["dim1"]
        order[a], order[b] = order[b], order[a]
    else:
        named = how.get("perm") or how.get("dims") or how.get("permutation")
        order = [int(i) % rank for i in named or backwards]
    return order if sorted(order) == sorted(backwards) else backwards


def reshaped(call: Call, x: Followed, program: Program) -> Followed | None:
    """A reshape that only puts axes of size 1 elsewhere; None for any other."""
    wanted = target_of(call, x, program.arrays)
    if wanted is None:
        return None
    wide = [(axis, n) for axis, n in zip(x.axes[1:], x.sizes[1:], strict=True) if n != 1]
    if [n for _, n in wide] != [n for n in wanted[1:] if n != 1]:
        return None
    left = iter(axis for axis, _ in wide)
    axes = (x.axes[0], *(None if n == 1 else next(left) for n in wanted[1:]))
    return Followed(axes, wanted)


def target_of(
    call: Call, x: Followed, arrays: Mapping[str, np.ndarray]
) -> tuple[int | None, ...] | None:
    """The sizes a reshape asks for, 0 and the batch looked up; None if they are computed."""
    if kind_of(call) == "unsqueeze":
        return unsqueezed(call, x, arrays)
    named = ("shape", "size", "new_sizes")
    asked: Any = next((call.kwargs[k] for k in named if k in call.kwargs), None)
    if kind_of(call) == "squeeze" and "dimensions" in call.kwargs:
        asked = [n for i, n in enumerate(x.sizes) if i not in call.kwargs["dimensions"]]
    if asked is None and len(call.args) > 1 and isinstance(call.args[1], Ref):
        asked = arrays.get(call.args[1].name)
    if asked is None or not all(isinstance(n, int | np.integer) for n in asked):
        return None
    sizes: list[int | None] = [int(n) for n in asked]
    for at, size in enumerate(sizes):
        if size == 0 and at < len(x.sizes):
            sizes[at] = x.sizes[at]
    return None if -1 in sizes[1:] else tuple(sizes)


def unsqueezed(
    call: Call, x: Followed, arrays: Mapping[str, np.ndarray]
) -> tuple[int | None, ...] | None:
    """The sizes with ones put in at the places a call names; None if they are computed."""
    how, second = call.kwargs, call.args[1] if len(call.args) > 1 else None
    named = how.get("axes", how.get("dim", second))
    places = arrays.get(named.name) if isinstance(named, Ref) else named
    if places is None:
        return None
    listed = np.atleast_1d(places).tolist()
    rank = len(x.sizes) + len(listed)
    ones, left = {place % rank for place in listed}, iter(x.sizes)
    return tuple(1 if i in ones else next(left) for i in range(rank))


def fitting(program: Program) -> str:
    """The layout that has as many channels as the first convolution reads; empty if not one."""
    shape = program.inputs[0].shape
    for call in program.calls:
        if kind_of(call) in ("conv", "conv1d", "conv2d", "convolution"):
            given = call.kwargs.get("weight", call.args[1] if len(call.args) > 1 else None)
            kernel = program.arrays.get(given.name) if isinstance(given, Ref) else None
            if kernel is None or kernel.ndim not in (3, 4):
                return ""
            groups = call.kwargs.get("group", call.kwargs.get("groups", 1))
            channels = kernel.shape[1] * int(groups)
            first, last = shape[1] == channels, shape[-1] == channels
            return "" if first == last else NHWC if last else NCHW
    return ""


def likely(shape: Sequence[int | None]) -> str:
    """The layout that has as many channels as images have, and sides longer than that."""
    *sides, last = shape[1:]
    usual = COLOURS if len(sides) == 2 else (1,)
    return NHWC if last in usual and not set(usual).intersection(sides) else NCHW
