"""Layer, group and instance norms found in their arithmetic: `(x - mean(x)) * rsqrt(var(x) + eps)`.

Variances are mean squares of what is left without the mean, or mean squares less squared means, as
Flax writes them.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dfq_jax.io.frontends.program import Call, Ref
from dfq_jax.io.importing.jax_makers import PREFIX, Makers, kind_of

Shapes = Mapping[str, tuple[int, ...]]


class Mean(NamedTuple):
    """A mean: of which tensor, along which axes."""

    source: Any
    axes: tuple[int, ...]


class Parts(NamedTuple):
    """What a product consists of: `centred / root * scale`.

    Attributes:
      centred: the call that takes the mean away.
      root: what the square root is taken of.
      scale: a constant; None if there is none.
    """

    centred: Call
    root: Any
    scale: Any


def present_norm(call: Call, makers: Makers, shapes: Shapes) -> Call | None:
    """The norm by statistics of the tensor itself that a product, or a bias added to it, ends."""
    if kind_of(call) in ("mul", "div"):
        return normalised(call, makers, shapes)
    for x, bias in (call.args, call.args[::-1]) if kind_of(call) == "add" else ():
        product = makers.of(x, "mul", "div")
        if product is None or not makers.is_fixed(bias) or makers.readers[x.name] > 1:
            continue
        found = normalised(product, makers, shapes)
        if found is not None and makers.number(bias) is None:
            source, scale, _ = found.args
            return dataclasses.replace(found, args=(source, scale, bias), outputs=call.outputs)
    return None


def normalised(call: Call, makers: Makers, shapes: Shapes) -> Call | None:
    """The norm that a product is; None if it is none."""
    parts = parts_of(call, makers)
    if parts is None:
        return None
    x, mean = parts.centred.args
    found, epsilon = mean_of(mean, makers, shapes), under_root(parts.root, makers)
    if found is None or epsilon is None or makers.root(found.source) != makers.root(x):
        return None
    variance, eps = epsilon
    if variance_of(variance, mean, makers, shapes) != found:
        return None
    how = kind_of_norm(shapes[x.name], shapes[found.source.name], found.axes)
    if how is None:
        return None
    kind, kwargs = how
    return dataclasses.replace(
        call,
        target=f"{PREFIX}{kind}",
        args=(x, parts.scale, None),
        kwargs={**kwargs, "eps": eps},
    )


def parts_of(call: Call, makers: Makers) -> Parts | None:
    """The parts of a product; None if there are others."""
    centred, roots, scales = [], [], []
    for operand, power in factors(Ref(str(call.outputs[0])), makers, 1):
        found = makers.of(operand, "sub", "rsqrt", "sqrt")
        kind = "" if found is None else kind_of(found)
        if makers.is_fixed(operand) and power == 1 and makers.number(operand) is None:
            scales.append(operand)
        elif found is not None and kind == "sub" and power == 1:
            centred.append(found)
        elif found is not None and (kind, power) in (("rsqrt", 1), ("sqrt", -1)):
            roots.append(found.args[0])
        else:
            return None
    if (len(centred), len(roots)) != (1, 1) or len(scales) > 1:
        return None
    return Parts(centred[0], roots[0], scales[0] if scales else None)


def factors(argument: Any, makers: Makers, power: int) -> Iterator[tuple[Any, int]]:
    """The operands of a product with their powers, 1 or -1."""
    found = makers.plain(argument)
    call = None if makers.is_fixed(found) else makers.of(found, "mul", "div")
    if call is None:
        yield found, power
        return
    first, second = call.args
    yield from factors(first, makers, power)
    yield from factors(second, makers, -power if kind_of(call) == "div" else power)


def under_root(argument: Any, makers: Makers) -> tuple[Any, float] | None:
    """The variance and epsilon of `variance + eps`."""
    call = makers.of(makers.root(argument), "add")
    for variance, eps in (call.args, call.args[::-1]) if call is not None else ():
        number = makers.number(eps)
        if number is not None:
            return variance, number
    return None


def mean_of(argument: Any, makers: Makers, shapes: Shapes) -> Mean | None:
    """What an operand is the mean of; None if it is no mean."""
    call = makers.of(makers.root(argument), "div", "mul")
    number = None if call is None else makers.number(call.args[1])
    if call is None or not number:
        return None
    count = number if kind_of(call) == "div" else 1 / number
    total = makers.of(makers.root(call.args[0]), "reduce_sum")
    if total is None:
        return None
    source, axes = makers.plain(total.args[0]), tuple(total.kwargs["axes"])
    size = math.prod(shapes[source.name][a] for a in axes)
    return Mean(source, axes) if math.isclose(size, count, rel_tol=1e-6) else None


def variance_of(argument: Any, mean: Any, makers: Makers, shapes: Shapes) -> Mean | None:
    """The tensor and axes that an operand is the variance of, about its `mean`."""
    found = makers.root(argument)
    if (limit := makers.of(found, "max")) is not None:
        rest = [a for a in limit.args if makers.number(a) != 0]
        found = makers.root(rest[0]) if len(rest) == 1 else found
    same = lambda a: makers.root(a) == makers.root(mean)
    if (call := makers.of(found, "sub")) is not None:
        squares, square = mean_of(call.args[0], makers, shapes), squared(call.args[1], makers)
        source = None if squares is None else squared(squares.source, makers)
        fits = squares is not None and source is not None and square is not None and same(square)
        return Mean(source, squares.axes) if squares is not None and fits else None
    squares = mean_of(found, makers, shapes)
    centred = None if squares is None else makers.of(squared(squares.source, makers), "sub")
    if squares is None or centred is None or not same(centred.args[1]):
        return None
    return Mean(makers.plain(centred.args[0]), squares.axes)


def squared(argument: Any, makers: Makers) -> Any:
    """What an operand is the square of; None if it is no square."""
    call = makers.of(makers.root(argument), "square", "integer_pow", "mul")
    if call is None:
        return None
    kind, first = kind_of(call), call.args[0]
    power = kind != "integer_pow" or call.kwargs["y"] == 2
    twice = kind != "mul" or first == call.args[1]
    return makers.plain(first) if power and twice else None


def kind_of_norm(
    shape: tuple[int, ...], grouped: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[str, dict[str, int]] | None:
    """Which norm has these statistics: layer norm of the last axes, or group norm along one axis.

    Args:
      shape: of the tensor.
      grouped: of the tensor its statistics are taken of: the same, or with channels in groups.
      axes: of `grouped` along which they are taken.
    """
    rank, reduced = len(shape), sorted(axes)
    if grouped == shape and reduced == list(range(rank - len(reduced), rank)):
        return "layernorm", {"count": len(reduced)}
    kept = [i for i in range(1, len(grouped)) if i not in reduced]
    if 0 in reduced or len(kept) != 1:
        return None
    at, groups = kept[0], grouped[kept[0]]
    if grouped == shape:
        return "groupnorm", {"groups": groups, "axis": at}
    pair = grouped[at : at + 2]
    split = (*grouped[:at], math.prod(pair), *grouped[at + 2 :])
    return ("groupnorm", {"groups": groups, "axis": at}) if split == shape else None
