"""Every operator as ONNX nodes: the only table from operators here to those of ONNX.

Families of their own are written by `io/onnx/curves.py`, `io/onnx/windows.py` and
`io/onnx/arrange.py`.
"""

from collections.abc import Mapping
from typing import assert_never

import numpy as np
from onnx import TensorProto

from dfq_jax.graph.ops import (
    Activation,
    AdaptiveAvgPool,
    Add,
    AvgPool,
    BatchNorm,
    Broadcast,
    Clip,
    Combine,
    Compare,
    Concat,
    Constant,
    Conv2d,
    ConvTranspose2d,
    Div,
    Elu,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    LayerNorm,
    LeakyRelu,
    Linear,
    LocalNorm,
    LogSoftmax,
    MatMul,
    Maximum,
    MaxPool,
    Minimum,
    Mul,
    Norm,
    Pad,
    Pads,
    Pair,
    Power,
    PRelu,
    Recurrent,
    Reduce,
    Relation,
    Relu,
    Reshape,
    Resize,
    Scale,
    Select,
    Slice,
    Softmax,
    Sub,
    Transpose,
    Weighted,
)
from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.graph.token_ops import Column, Embed, Leading, Present, RmsNorm, Rotary
from dfq_jax.graph.volume_ops import Conv3d
from dfq_jax.io.onnx.arrange import add_arranged
from dfq_jax.io.onnx.builder import Link, OnnxBuilder, WrittenNode
from dfq_jax.io.onnx.curves import add_pointwise
from dfq_jax.io.onnx.layout import FIRST, VOLUMES, file_axis, in_layout
from dfq_jax.io.onnx.recurrent import add_recurrent
from dfq_jax.io.onnx.slots import kernel_form
from dfq_jax.io.onnx.tokens import add_of_tokens, add_rms_norm
from dfq_jax.io.onnx.windows import AXES_AS_INPUT, add_pooled, add_resized, as_pads

RELATIONS: Mapping[Relation, str] = {
    "equal": "Equal",
    "greater": "Greater",
    "greater_equal": "GreaterOrEqual",
    "less": "Less",
    "less_equal": "LessOrEqual",
}


def add_operator(b: OnnxBuilder, step: WrittenNode) -> None:  # noqa: C901 - one case per family
    """Adds the ONNX nodes that compute one node of the network.

    Args:
      b: receives them.
      step: what to compute from which values.
    """
    op = step.node.op
    match op:
        case Conv2d() | ConvTranspose2d() | Conv3d() | Linear():
            add_weighted(b, op, step)
        case MatMul(transposed):
            add_matmul(b, transposed, step)
        case BatchNorm() | LayerNorm() | RmsNorm() | GroupNorm() | LocalNorm():
            add_norm(b, op, step)
        case Relu() | LeakyRelu() | PRelu() | Clip() | Elu() | Activation() | Scale() | Power():
            add_pointwise(b, op, step)
        case Softmax(axis) | LogSoftmax(axis):
            axis = file_axis(axis, step.rank, step.layout)
            b.add(type(op).__name__, step.name, step.args, step.output, axis=axis)
        case Compare():
            found = b.part(combining(op), f"{step.output}.truth", step.args)
            b.add("Cast", step.name, (found,), step.output, to=TensorProto.FLOAT)
        case Select():
            which = b.part("Cast", f"{step.output}.which", step.args[:1], to=TensorProto.BOOL)
            b.add("Where", step.name, (which, *step.args[1:]), step.output)
        case Add() | Sub() | Mul() | Div() | Maximum() | Minimum():
            b.add(combining(op), step.name, step.args, step.output)
        case MaxPool() | AvgPool() | AdaptiveAvgPool() | GlobalAvgPool():
            add_pooled(b, op, step)
        case Recurrent():
            add_recurrent(b, op, step)
        case Reduce():
            add_reduced(b, op, step)
        case Flatten() | Reshape() | Transpose() | Slice() | Concat() | Broadcast() | Pad():
            add_arranged(b, op, step)
        case DepthToSpace():
            add_arranged(b, op, step)
        case Resize():
            add_resized(b, op, step)
        case Column() | Leading() | Embed() | Present() | Rotary():
            add_of_tokens(b, op, step)
        case Constant():
            pass  # its value is a parameter
        case _:
            assert_never(op)


def combining(op: Combine) -> str:
    """The ONNX operator of two tensors."""
    match op:
        case Add():
            return "Add"
        case Sub():
            return "Sub"
        case Mul():
            return "Mul"
        case Div():
            return "Div"
        case Maximum():
            return "Max"
        case Minimum():
            return "Min"
        case Compare(relation):
            return RELATIONS[relation]
        case _:
            assert_never(op)


def add_weighted(b: OnnxBuilder, op: Weighted, step: WrittenNode) -> None:
    """Adds a convolution or linear layer; a linear layer over pixels is a 1x1 convolution."""
    (x,), name, output = step.args, step.name, step.output
    parameters = [step.slots["kernel"], *([step.slots["bias"]] if "bias" in step.slots else [])]
    match op:
        case Conv2d(strides, padding, groups, dilation):
            how = {"strides": strides, "pads": as_pads(padding), "dilations": dilation}
            b.add("Conv", name, (x, *parameters), output, group=groups, **how)
        case ConvTranspose2d(strides, _, groups, dilation):
            x, padding, extra = widened(b, name, x, op)
            how = {"strides": strides, "pads": as_pads(padding), "dilations": dilation}
            how |= {"group": groups, "output_padding": extra}
            b.add("ConvTranspose", name, (x, *parameters), output, **how)
        case Conv3d(strides, padding, groups, dilation):
            how = {"strides": strides, "pads": as_pads(padding), "dilations": dilation}
            how |= {"group": groups}
            add_on_volumes(b, step, Link("Conv", tuple(parameters), how))
        case Linear():
            add_linear(b, op, step, parameters)
        case _:
            assert_never(op)


def add_on_volumes(b: OnnxBuilder, step: WrittenNode, link: Link) -> None:
    """Adds an operator that reads and writes volumes channels first, as the file holds none."""
    x = b.part("Transpose", f"{step.output}.first", step.args, perm=(0, 4, 1, 2, 3))
    back = Link("Transpose", (), {"perm": (0, 2, 3, 4, 1)})
    b.chain(step.name, x, (link, back), step.output)


def widened(b: OnnxBuilder, name: str, x: str, op: ConvTranspose2d) -> tuple[str, Pads, Pair]:
    """An image with enough zeros around it for a transposed convolution that ONNX lacks.

    Runtimes cut no negative number of rows and add less than a stride of them; a row of zeros more
    at the input gives a stride of them more, to cut from.

    Returns:
      The image, what to cut from the result, and what to add at its end.
    """
    if min(as_pads(op.padding)) >= 0 and all(
        e < s for e, s in zip(op.extra, op.strides, strict=True)
    ):
        return x, op.padding, op.extra
    before = [-(min(low, 0) // s) for (low, _), s in zip(op.padding, op.strides, strict=True)]
    net = [high - e for (_, high), e in zip(op.padding, op.extra, strict=True)]
    after = [-(min(cut, 0) // s) for cut, s in zip(net, op.strides, strict=True)]
    top, left = (low + n * s for (low, _), n, s in zip(op.padding, before, op.strides, strict=True))
    bottom, right = (cut + n * s for cut, n, s in zip(net, after, op.strides, strict=True))
    amounts = b.integers(f"{name}.pads", (0, 0, *before, 0, 0, *after))
    x = b.part("Pad", f"{name}.widened", (x, amounts))
    return x, ((top, bottom), (left, right)), (0, 0)


def add_linear(b: OnnxBuilder, op: Linear, step: WrittenNode, parameters: list[str]) -> None:
    """Adds a linear layer."""
    (x,), name, output = step.args, step.name, step.output
    match kernel_form(op, step.rank, step.layout, step.integer):
        case "convolution":
            b.add("Conv", name, (x, *parameters), output)
        case "columns":
            kinds = ("MatMul", "Add")
            links = [Link(k, (p,)) for k, p in zip(kinds, parameters, strict=False)]
            b.chain(name, x, links, output)
        case _ if step.rank == 2:
            b.add("Gemm", name, (x, *parameters), output, transB=1)
        case _:
            rows = b.integers(f"{name}.rows", (-1, step.shapes[0][-1]))
            shape = shape_of_rows(b, x, step)
            gemm = Link("Gemm", tuple(parameters), {"transB": 1})
            b.chain(name, x, (Link("Reshape", (rows,)), gemm, Link("Reshape", (shape,))), output)


def shape_of_rows(b: OnnxBuilder, x: str, step: WrittenNode) -> str:
    """The shape of a linear layer's result; where rows have any length, found when it runs."""
    if not b.any_length:
        return b.integers(f"{step.name}.shape", (-1, *step.result[1:]))
    end = step.rank - 1
    find = lambda: b.part("Shape", f"{x}.lead", (x,), start=0, end=end)
    lead = b.shared(("lead", x), find)
    outputs = b.shared(
        ("sizes", step.result[-1]),
        lambda: b.integers(f"outputs.{step.result[-1]}", (step.result[-1],)),
    )
    whole = lambda: b.part("Concat", f"{x}.shape{step.result[-1]}", (lead, outputs), axis=0)
    return b.shared(("shape", x, step.result[-1]), whole)


def add_matmul(b: OnnxBuilder, transposed: bool, step: WrittenNode) -> None:
    """Adds a product of two tensors."""
    first, second = step.args
    if transposed:
        rank = len(step.shapes[1])
        perm = (*range(rank - 2), rank - 1, rank - 2)
        name = f"{step.output}.transposed"
        second = b.part("Transpose", name, (second,), perm=perm)
    b.add("MatMul", step.name, (first, second), step.output)


def add_norm(b: OnnxBuilder, op: Norm, step: WrittenNode) -> None:
    """Adds a normalisation."""
    (x,), slots, name, output = step.args, step.slots, step.name, step.output
    match op:
        case BatchNorm(eps) if "gain" not in slots:
            vectors = (slots[s] for s in ("scale", "bias", "mean", "var"))
            if step.rank == VOLUMES:  # whose statistics are read again from this file
                link = Link("BatchNormalization", tuple(vectors), {"epsilon": eps})
                add_on_volumes(b, step, link)
            else:
                b.add("BatchNormalization", name, (x, *vectors), output, epsilon=eps)
        case BatchNorm():
            links = (Link("Mul", (slots["gain"],)), Link("Add", (slots["shift"],)))
            b.chain(name, x, links, output)
        case LayerNorm(eps):
            scale = slots.get("scale") or b.constant(
                f"{name}.scale", np.ones(step.result[-1], np.float32)
            )
            inputs = [x, scale, *([slots["bias"]] if "bias" in slots else [])]
            b.add("LayerNormalization", name, inputs, output, axis=-1, epsilon=eps)
        case RmsNorm(eps):
            add_rms_norm(b, eps, step)
        case GroupNorm():
            add_group_norm(b, op, step)
        case LocalNorm(size, alpha, beta, offset):
            how = {"size": size, "alpha": alpha, "beta": beta, "bias": offset}
            b.add("LRN", name, (x,), output, **how)
        case _:
            assert_never(op)


def add_group_norm(b: OnnxBuilder, op: GroupNorm, step: WrittenNode) -> None:
    """Adds a group norm as an instance norm over groups laid out as channels.

    Channels lie before positions in an image; elsewhere they are brought there and back.
    """
    (x,), name, shape = step.args, step.name, step.result
    last = len(shape) - 1
    turned = step.layout != FIRST and last > 1
    there, back = (0, last, *range(1, last)), (0, *range(2, last + 1), 1)
    groups = b.integers(f"{name}.groups", (0, op.groups, -1))
    sizes = b.integers(f"{name}.shape", (0, shape[last], *shape[1:last]))
    ones = b.constant(f"{name}.ones", np.ones(op.groups, np.float32))
    zeros = b.constant(f"{name}.zeros", np.zeros(op.groups, np.float32))
    links = [Link("Transpose", (), {"perm": there})] if turned else []
    links.append(Link("Reshape", (groups,)))
    links.append(Link("InstanceNormalization", (ones, zeros), {"epsilon": op.eps}))
    links.append(Link("Reshape", (sizes,)))
    links += [Link("Transpose", (), {"perm": back})] if turned else []
    for slot, kind in (("scale", "Mul"), ("bias", "Add")):
        if slot in step.slots:
            links.append(Link(kind, (step.slots[slot],)))
    b.chain(name, x, links, step.output)


def add_reduced(b: OnnxBuilder, op: Reduce, step: WrittenNode) -> None:
    """Adds a reduction; its axes are an attribute or an input, as the opset has it."""
    marked = [axis in {a % step.rank for a in op.axes} for axis in range(step.rank)]
    axes = [i for i, is_reduced in enumerate(in_layout(marked, step.layout)) if is_reduced]
    kind = {"mean": "ReduceMean", "sum": "ReduceSum", "max": "ReduceMax", "l2": "ReduceL2"}[op.kind]
    keep, inputs, how = int(op.keepdims), list(step.args), {}
    if b.opset >= AXES_AS_INPUT or op.kind == "sum":
        inputs.append(b.integers(f"{step.name}.axes", axes))
    else:
        how["axes"] = axes
    b.add(kind, step.name, inputs, step.output, keepdims=keep, **how)
