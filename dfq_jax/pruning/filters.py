"""What is known of the filters behind the channels of every tensor, from the weights alone.

Products of filters pass through sums as sums (what they read is taken as independent), through
depthwise layers as products, and through activations and pooling as they are: exact where these
are linear.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import (
    Activation,
    AdaptiveAvgPool,
    Add,
    AvgPool,
    BatchNorm,
    Clip,
    Concat,
    Conv2d,
    Elu,
    Flatten,
    GlobalAvgPool,
    LeakyRelu,
    Linear,
    MaxPool,
    PRelu,
    Relu,
    Resize,
    Slice,
)
from dfq_jax.numerics.substitution import FilterGram
from dfq_jax.pruning.groups import Subject
from dfq_jax.types import Moments

SAME = (
    *(Relu, LeakyRelu, PRelu, Clip, Elu, Activation),
    *(MaxPool, AvgPool, AdaptiveAvgPool, GlobalAvgPool, Resize, Flatten),
)
"""Operators behind which the filters are taken to be those before."""


def filter_grams(subject: Subject) -> dict[str, FilterGram]:
    """{tensor of the folded network: its filters}, wherever these are known."""
    model, known = subject.folded, dict[str, FilterGram]()
    for node in model.graph.nodes:
        read = [known.get(name) for name in node.inputs]
        made = behind(node, read, subject, model)
        if made is not None:
            known[node.name] = made
    return known


def behind(
    node: Node, read: list[FilterGram | None], subject: Subject, model: Model
) -> FilterGram | None:
    """The filters behind what a node makes; None where they are not known."""
    first = read[0] if read else None
    match node.op:
        case Conv2d() | Linear():
            return of_layer(node, first, subject)
        case _ if any(x is None for x in read) or first is None:
            return None
        case Add() if len(read) == 2 and read[1] is not None:
            return added(first, read[1])
        case BatchNorm():
            return behind_norm(first, model.params[node.name], node.op.eps)
        case Concat(axis) if axis in (-1, 3):
            return joined([x for x in read if x is not None])
        case Slice(bounds):
            part = slice(*bounds[-1])
            return FilterGram(first.gram[part, part], *(x[part] for x in first[1:]))
        case op if isinstance(op, SAME):
            return first
        case _:
            return None


def added(x: FilterGram, y: FilterGram) -> FilterGram:
    """The filters behind a sum of tensors that depend on different things; they have no gain."""
    return FilterGram(x.gram + y.gram, x.bias + y.bias, x.var + y.var, np.ones_like(x.bias))


def of_layer(node: Node, read: FilterGram | None, subject: Subject) -> FilterGram:
    """The filters of a layer itself; of a depthwise one times those of what it reads."""
    slots = {k: np.asarray(v, np.float64) for k, v in subject.folded.params[node.name].items()}
    raw = np.asarray(subject.model.params[node.name]["kernel"], np.float64)
    kernel, count = slots["kernel"], slots["kernel"].shape[-1]
    rows = kernel.reshape(-1, count).T
    gram = rows @ rows.T
    groups = node.op.groups if isinstance(node.op, Conv2d) else 1
    if groups > 1:
        gram = gram * within_groups(groups, count, read if kernel.shape[-2] == 1 else None)
    recorded = subject.folded.moments.get(node.name)
    var = np.diag(gram).copy() if recorded is None else variance(recorded)
    before = np.sqrt(np.maximum((raw.reshape(-1, count) ** 2).sum(0), 1e-30))
    gain = np.sqrt((rows**2).sum(1)) / before
    return FilterGram(gram, slots.get("bias", np.zeros(count)), var, np.where(gain > 0, gain, 1.0))


def variance(recorded: Moments) -> Float[np.ndarray, " c"]:
    """Of what a layer puts out, as its batch norm has it."""
    return np.asarray(recorded.var, np.float64)


def within_groups(groups: int, count: int, read: FilterGram | None) -> Float[np.ndarray, "c c"]:
    """By what products of filters in groups are multiplied: those of what they read, if known."""
    owner = np.repeat(np.arange(groups), count // groups)
    if read is None or len(read.bias) != groups:
        return (owner[:, None] == owner[None]).astype(np.float64)
    return read.gram[np.ix_(owner, owner)]


def behind_norm(known: FilterGram, slots: Mapping, eps: float) -> FilterGram:
    """The filters behind a batch norm that no layer took in."""
    bn = {name: np.asarray(x, np.float64) for name, x in slots.items()}
    gain = bn.get("scale", 1.0) / np.sqrt(bn["var"] + eps)
    bias = (known.bias - bn["mean"]) * gain + bn.get("bias", 0.0)
    return FilterGram(
        known.gram * np.outer(gain, gain), bias, known.var * gain**2, known.gain * gain
    )


def joined(parts: list[FilterGram]) -> FilterGram:
    """The filters of tensors beside each other."""
    size = sum(len(x.bias) for x in parts)
    gram, start = np.zeros((size, size)), 0
    for x in parts:
        gram[start : start + len(x.bias), start : start + len(x.bias)] = x.gram
        start += len(x.bias)
    return FilterGram(gram, *(np.concatenate(v) for v in zip(*(x[1:] for x in parts), strict=True)))
