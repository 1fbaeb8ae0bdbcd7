"""Functions of each element alone as ONNX nodes."""

import math
from typing import assert_never

from dfq_jax.graph.ops import (
    Activation,
    Clip,
    Curve,
    Elu,
    LeakyRelu,
    Pointwise,
    Power,
    PRelu,
    Relu,
    Scale,
)
from dfq_jax.io.onnx.builder import Link, OnnxBuilder, WrittenNode


def add_pointwise(b: OnnxBuilder, op: Pointwise, step: WrittenNode) -> None:  # noqa: C901
    """Adds a function of each element."""
    (x,), name, output = step.args, step.name, step.output
    match op:
        case Relu(None):
            b.add("Relu", name, (x,), output)
        case Relu(ceiling):
            add_clip(b, name, x, output, 0.0, ceiling)
        case LeakyRelu(slope):
            b.add("LeakyRelu", name, (x,), output, alpha=slope)
        case PRelu():
            b.add("PRelu", name, (x, step.slots["slope"]), output)
        case Clip(low, high):
            add_clip(b, name, x, output, low, high)
        case Elu(alpha, 1.0):
            b.add("Elu", name, (x,), output, alpha=alpha)
        case Elu(alpha, scale):
            b.add("Selu", name, (x,), output, alpha=alpha, gamma=scale)
        case Activation(curve):
            add_curve(b, curve, name, x, output)
        case Scale(factor, offset):
            add_scale(b, name, x, output, factor, offset)
        case Power(exponent):
            b.add("Pow", name, (x, b.number(f"{name}.exponent", exponent)), output)
        case _:
            assert_never(op)


def add_clip(
    b: OnnxBuilder, name: str, x: str, output: str, low: float | None, high: float | None
) -> None:
    """Adds a clip; None leaves an end open."""
    if low is None and high is None:
        b.add("Identity", name, (x,), output)
        return
    lowest = [] if low is None else [b.number(f"{name}.min", low)]
    highest = [] if high is None else [b.number(f"{name}.max", high)]
    b.add("Clip", name, (x, *(lowest or [""]), *highest), output)


def add_scale(b: OnnxBuilder, name: str, x: str, output: str, factor: float, offset: float) -> None:
    """Adds `factor * x + offset`, less what does nothing."""
    links = []
    if factor != 1.0:
        links.append(Link("Mul", (b.number(f"{name}.factor", factor),)))
    if offset != 0.0:
        links.append(Link("Add", (b.number(f"{name}.offset", offset),)))
    b.chain(name, x, links, output)


def add_curve(b: OnnxBuilder, curve: Curve, name: str, x: str, output: str) -> None:  # noqa: C901
    """Adds an activation, out of simpler ones where this opset has none."""
    match curve:
        case "sigmoid":
            b.add("Sigmoid", name, (x,), output)
        case "tanh":
            b.add("Tanh", name, (x,), output)
        case "silu":
            b.add("Mul", name, (x, b.part("Sigmoid", f"{output}.sigmoid", (x,))), output)
        case "gelu":
            add_gelu(b, name, x, output)
        case "gelu_tanh":
            add_gelu_tanh(b, name, x, output)
        case "hard_sigmoid":
            b.add("HardSigmoid", name, (x,), output, alpha=1 / 6, beta=0.5)
        case "hard_swish":
            b.add("HardSwish", name, (x,), output)
        case "mish":
            soft = b.part("Softplus", f"{output}.softplus", (x,))
            b.add("Mul", name, (x, b.part("Tanh", f"{output}.tanh", (soft,))), output)
        case "softplus":
            b.add("Softplus", name, (x,), output)
        case "elu":
            b.add("Elu", name, (x,), output, alpha=1.0)
        case "exp":
            b.add("Exp", name, (x,), output)
        case "sqrt":
            b.add("Sqrt", name, (x,), output)
        case "abs":
            b.add("Abs", name, (x,), output)
        case "erf":
            b.add("Erf", name, (x,), output)
        case "log":
            b.add("Log", name, (x,), output)
        case "round":
            b.add("Round", name, (x,), output)
        case _:
            assert_never(curve)


def add_gelu(b: OnnxBuilder, name: str, x: str, output: str) -> None:
    """Adds `x (1 + erf(x / sqrt 2)) / 2`, in the order of operations that runtimes recognise."""
    root = b.number(f"{name}.root", math.sqrt(2))
    bell = b.part("Erf", f"{output}.erf", (b.part("Div", f"{output}.scaled", (x, root)),))
    share = b.part("Add", f"{output}.share", (bell, b.number(f"{name}.one", 1.0)))
    twice = b.part("Mul", f"{output}.twice", (x, share))
    b.add("Mul", name, (twice, b.number(f"{name}.half", 0.5)), output)


def add_gelu_tanh(b: OnnxBuilder, name: str, x: str, output: str) -> None:
    """Adds `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`."""
    cube = b.part("Pow", f"{output}.cube", (x, b.number(f"{name}.three", 3.0)))
    small = b.part("Mul", f"{output}.small", (cube, b.number(f"{name}.factor", 0.044715)))
    inner = b.part("Add", f"{output}.inner", (x, small))
    root = b.number(f"{name}.root", math.sqrt(2 / math.pi))
    bell = b.part("Tanh", f"{output}.tanh", (b.part("Mul", f"{output}.scaled", (inner, root)),))
    share = b.part("Add", f"{output}.share", (bell, b.number(f"{name}.one", 1.0)))
    half = b.part("Mul", f"{output}.half", (x, b.number(f"{name}.half", 0.5)))
    b.add("Mul", name, (half, share), output)
