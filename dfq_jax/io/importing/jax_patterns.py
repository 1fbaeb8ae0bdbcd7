"""Operators that JAX spells out, found again: softmax, means over windows, biases."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dfq_jax.io.frontends.program import Call, Program, Ref
from dfq_jax.io.importing.jax_makers import PREFIX, Makers, kind_of, makers_of
from dfq_jax.io.importing.jax_statistics import present_norm

Shapes = Mapping[str, tuple[int, ...]]
PatternRule = Callable[[Call, Makers, Shapes], Call | None]


def with_patterns(program: Program, shapes: Shapes) -> Program:
    """The program with one call for what several spell out; it computes the same.

    Args:
      program: in the primitives of JAX.
      shapes: of its tensors.

    Returns:
      A program; calls that nobody reads any more are still in it.
    """
    makers = makers_of(program)
    calls = []
    for call in program.calls:
        found = (rule(call, makers, shapes) for rule in RULES)
        calls.append(next((new for new in found if new is not None), call))
    return dataclasses.replace(program, calls=tuple(calls))


def softmax(call: Call, makers: Makers, shapes: Shapes) -> Call | None:
    """exp(x - max(x)) / sum(exp(x - max(x))), or without the maximum."""
    if kind_of(call) != "div":
        return None
    shares = makers.of(call.args[0], "exp")
    axis = summed_axis(call.args[1], call.args[0], makers)
    if shares is None or axis is None:
        return None
    x = less_maximum(shares.args[0], axis, makers)
    return renamed(call, "softmax", (shares.args[0] if x is None else x,), axis=axis)


def log_softmax(call: Call, makers: Makers, shapes: Shapes) -> Call | None:
    """x - max(x) - log(sum(exp(x - max(x))))."""
    if kind_of(call) != "sub":
        return None
    logarithm = makers.of(makers.root(call.args[1]), "log")
    total = None if logarithm is None else makers.of(makers.root(logarithm.args[0]), "reduce_sum")
    shares = None if total is None else makers.of(total.args[0], "exp")
    if total is None or shares is None or shares.args[0] != call.args[0]:
        return None
    axis = summed_axis(Ref(str(total.outputs[0])), total.args[0], makers)
    x = None if axis is None else less_maximum(call.args[0], axis, makers)
    source = call.args[0] if x is None else x
    return None if axis is None else renamed(call, "log_softmax", (source,), axis=axis)


def summed_axis(total: Any, parts: Any, makers: Makers) -> int | None:
    """The one axis along which `total` is the sum of `parts`; None if it is not."""
    call = makers.of(makers.root(total), "reduce_sum")
    if call is None or call.args[0] != parts or len(call.kwargs["axes"]) != 1:
        return None
    return int(call.kwargs["axes"][0])


def less_maximum(argument: Any, axis: int, makers: Makers) -> Any:
    """x of `x - max(x)` along an axis; None if it is something else."""
    call = makers.of(argument, "sub")
    if call is None:
        return None
    largest = makers.root(call.args[1])
    if (limit := makers.of(largest, "max")) is not None:  # with -inf, which is never larger
        rest = [a for a in limit.args if makers.number(a) != -np.inf]
        largest = makers.root(rest[0]) if len(rest) == 1 else largest
    found = makers.of(largest, "reduce_max")
    fits = found is not None and found.args[0] == call.args[0] and found.kwargs["axes"] == (axis,)
    return call.args[0] if fits else None


def window_mean(call: Call, makers: Makers, shapes: Shapes) -> Call | None:
    """A sum over windows, divided by how many values of the image each window holds."""
    if kind_of(call) != "div" or not makers.is_fixed(call.args[1]):
        return None
    total = makers.of(call.args[0], "reduce_window_sum")
    if total is None or makers.number(call.args[1]) is not None:
        return None
    target = f"{PREFIX}window_mean"
    return dataclasses.replace(
        total, target=target, args=(*total.args, call.args[1]), outputs=call.outputs
    )


def renamed(call: Call, kind: str, args: tuple[Any, ...], **kwargs: Any) -> Call:
    """The call of another operator in the place of one."""
    return dataclasses.replace(call, target=f"{PREFIX}{kind}", args=args, kwargs=kwargs)


def bias(call: Call, makers: Makers, shapes: Shapes) -> Call | None:
    """A constant added to what a layer makes, which nobody else reads."""
    if kind_of(call) != "add":
        return None
    for x, other in (call.args, call.args[::-1]):
        layer = makers.of(makers.plain(x), "conv_general_dilated", "dot_general")
        if layer is not None and makers.is_fixed(other) and not makers.is_fixed(x):
            alone = makers.readers[x.name] == makers.readers[str(layer.outputs[0])] == 1
            return renamed(call, "add_bias", (x, other)) if alone else None
    return None


RULES: tuple[PatternRule, ...] = (softmax, log_softmax, window_mean, present_norm, bias)
