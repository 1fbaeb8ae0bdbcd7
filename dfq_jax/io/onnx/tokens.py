"""Operators of networks that read tokens, as ONNX nodes."""

from typing import assert_never

import numpy as np
from onnx import TensorProto

from dfq_jax.graph.token_ops import Column, Embed, Leading, OfTokens, Present, Rotary
from dfq_jax.io.onnx.builder import Link, OnnxBuilder, WrittenNode
from dfq_jax.io.onnx.windows import AXES_AS_INPUT


def add_of_tokens(b: OnnxBuilder, op: OfTokens, step: WrittenNode) -> None:
    """Adds a look-up in a table, a test of ids, or a rotation by places."""
    name, output = step.name, step.output
    match op:
        case Column():
            pass  # an input of the file
        case Leading(axes):
            add_beginning(b, axes, step)
        case Embed():
            b.add("Gather", name, (step.slots["table"], *step.args), output, axis=0)
        case Present(absent):
            nothing = b.constant(f"{name}.absent", np.array(absent, np.int64))
            same = b.part("Equal", f"{output}.same", (*step.args, nothing))
            other = b.part("Not", f"{output}.other", (same,))
            b.add("Cast", name, (other,), output, to=TensorProto.FLOAT)
        case Rotary():
            add_rotary(b, step)
        case _:
            assert_never(op)


def add_beginning(b: OnnxBuilder, axes: tuple[int, ...], step: WrittenNode) -> None:
    """Adds a slice of a table that ends where the ids do."""
    (ids,), name = step.args, step.name
    count = b.shared(("count", ids), lambda: b.part("Shape", f"{ids}.count", (ids,), start=1))
    ends = count
    if len(axes) > 1:
        key = ("count", ids, len(axes))
        several = [count] * len(axes)
        ends = b.shared(key, lambda: b.part("Concat", f"{ids}.counts", several, axis=0))
    starts, along = b.integers(f"{name}.starts", [0] * len(axes)), b.integers(f"{name}.axes", axes)
    b.add("Slice", name, (step.slots["value"], starts, ends, along), step.output)


def add_rotary(b: OnnxBuilder, step: WrittenNode) -> None:
    """Adds `x * cos + turned(x) * sin`, with the second half negative and in front in `turned`."""
    (x,), name, output = step.args, step.name, step.output
    half = step.result[-1] // 2
    axes = b.shared(("rotary", "axes"), lambda: b.integers("rotary.axes", (-1,)))
    ends = [
        b.shared(("rotary", n), lambda n=n: b.integers(f"rotary.at{n}", (n,)))
        for n in (0, half, 2 * half)
    ]
    first = b.part("Slice", f"{output}.first", (x, ends[0], ends[1], axes))
    second = b.part("Slice", f"{output}.second", (x, ends[1], ends[2], axes))
    negative = b.part("Neg", f"{output}.negative", (second,))
    turned = b.part("Concat", f"{output}.turned", (negative, first), axis=-1)
    along = b.part("Mul", f"{output}.along", (x, step.slots["cos"]))
    across = b.part("Mul", f"{output}.across", (turned, step.slots["sin"]))
    b.add("Add", name, (along, across), output)


def add_rms_norm(b: OnnxBuilder, eps: float, step: WrittenNode) -> None:
    """Adds `x / sqrt(mean(x^2) + eps) * scale`."""
    (x,), name, output = step.args, step.name, step.output
    square = b.part("Mul", f"{output}.square", (x, x))
    axes = b.integers(f"{name}.axes", (-1,)) if b.opset >= AXES_AS_INPUT else None
    inputs, how = ((square, axes), {}) if axes is not None else ((square,), {"axes": [-1]})
    power = b.part("ReduceMean", f"{output}.power", inputs, **how)
    added = b.part("Add", f"{output}.added", (power, b.number(f"{name}.eps", eps)))
    links = [Link("Div", (b.part("Sqrt", f"{output}.root", (added,)),))]
    links += [Link("Mul", (step.slots["scale"],))] if "scale" in step.slots else []
    b.chain(name, x, links, output)
