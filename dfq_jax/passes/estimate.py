"""Statistics for networks that recorded none: estimated, and put where batch norms would be.

A network without batch norm, or with its batch norms folded away, gets one after every convolution
and linear layer: it changes nothing, since it undoes its own normalisation, but it holds estimated
statistics where methods that match recorded ones look for them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import (
    WEIGHTED,
    Add,
    BatchNorm,
    Concat,
    Flatten,
    GroupNorm,
    LayerNorm,
    Maximum,
    Minimum,
    Mul,
    Reshape,
    Sub,
)
from dfq_jax.graph.query import constants, last_weighted, output_shapes, weighted_nodes
from dfq_jax.graph.rewrite import with_params
from dfq_jax.graph.semantics import Slots
from dfq_jax.passes.moments import Around, mean_output, propagated
from dfq_jax.types import Moments

Estimator = Literal["gzsq", "analytic", "noise"]
SizeRule = Literal["min", "mean-min", "mean+min", "mean", "max-mean", "max+mean", "max"]
Vector = Float[np.ndarray, "..."]
MomentPair = tuple[Vector, Vector]
"""Means and deviations of channels, in double precision."""

SUFFIX = ".estimated"


def with_estimated_norms(
    model: Model,
    mode: Estimator = "gzsq",
    *,
    inputs: Moments | None = None,
    images: Float[Array, "n h w c"] | None = None,
    rule: SizeRule = "mean",
) -> Model:
    """Puts a batch norm with estimated statistics behind every layer but the last.

    Fold real batch norms first: their statistics say more, but those that stay are kept.

    Args:
      model: the network.
      mode: `gzsq`: the paper's recursion over weights, see `recursive_moments`; `analytic`: normal
        variables through every operator, see `analytic_moments`; `noise`: what `images` show.
      inputs: moments of the normalised images; None for mean 0 and variance 1.
      images: normalised; for `noise` only.
      rule: how `gzsq` makes vectors of different sizes equal.

    Returns:
      The same function. Layers whose statistics the mode cannot tell have no norm behind them.

    Raises:
      ValueError: for `noise` without images.
    """
    if inputs is None:
        inputs = Moments(*(jnp.full(model.contract.channels, v) for v in (0.0, 1.0)))
    match mode:
        case "gzsq":
            found = recursive_moments(model, inputs, rule=rule)
        case "analytic":
            found = analytic_moments(model, inputs)
        case "noise":
            if images is None:
                raise ValueError("with_estimated_norms() needs images for mode 'noise'.")
            found = measured_moments(model, images)
    return with_norms(model, {name: found[name] for name in inner_layers(model) if name in found})


def inner_layers(model: Model) -> tuple[str, ...]:
    """Convolutions and linear layers, without the last one before each output."""
    last = last_weighted(model.graph)
    return tuple(n.name for n in weighted_nodes(model.graph) if n.name not in last)


def with_norms(model: Model, moments: Mapping[str, Moments]) -> Model:
    """Puts a batch norm that changes nothing behind each of some nodes.

    Args:
      model: the network.
      moments: {node: statistics its norm is said to have recorded}.

    Returns:
      The same function, with a batch norm of scale `sqrt(var + eps)` and bias `mean` behind each
      node. Channels with statistics that are not finite hold variance 0: unusable.
    """
    nodes, renamed, params, op = [], {}, {}, BatchNorm()
    for node in model.graph.nodes:
        inputs = tuple(renamed.get(i, i) for i in node.inputs)
        nodes.append(dataclasses.replace(node, inputs=inputs))
        if node.name in moments:
            norm = Node(node.name + SUFFIX, op, (node.name,))
            nodes.append(norm)
            renamed[node.name] = norm.name
            params[norm.name] = identity_slots(moments[node.name], op.eps)
    outputs = tuple(renamed.get(o, o) for o in model.graph.outputs)
    graph = Graph(tuple(nodes), model.graph.inputs, outputs)
    return dataclasses.replace(with_params(model, params), graph=graph)


def identity_slots(moments: Moments, eps: float) -> dict[str, Float[Array, " c"]]:
    """Slots of a batch norm that recorded `moments` and changes nothing."""
    sound = jnp.isfinite(moments.mean) & jnp.isfinite(moments.var)
    mean, var = (jnp.where(sound, v, 0.0) for v in moments)
    return {"mean": mean, "var": var, "scale": jnp.sqrt(var + eps), "bias": mean}


def measured_moments(model: Model, images: Float[Array, "n h w c"]) -> dict[str, Moments]:
    """{layer: mean and variance of its output} over images, positions included."""
    layers = inner_layers(model)

    @jax.jit
    def measure(model: Model, images: Float[Array, "n h w c"]) -> list[Moments]:
        seen, _ = evaluate(model, images)
        axes = lambda x: tuple(range(x.ndim - 1))
        return [Moments(jnp.mean(x, axes(x)), jnp.var(x, axes(x))) for x in seen]

    graph = dataclasses.replace(model.graph, outputs=layers)
    found = measure(dataclasses.replace(model, graph=graph), images)
    return dict(zip(layers, found, strict=True))


# the recursion


def recursive_moments(
    model: Model, inputs: Moments, *, rule: SizeRule = "mean"
) -> dict[str, Moments]:
    """GZSQ's estimate of each layer's output, from the mean and deviation of its weights.

    A layer adds the mean of its kernel and its bias to the mean, and the variance of its kernel to
    the variance; fan-in is ignored, as in the paper, and so is what follows a layer. Where tensors
    meet, each channel keeps the moments with the larger deviation: those that came through more
    layers, as if there were no skip connection. (Sums would double them at every residual block,
    far beyond what tensors hold.)

    Args:
      model: the network; batch norms, if any, count as the affine functions they are.
      inputs: moments of the images.
      rule: see `resize_vector`.

    Returns:
      {layer: mean and variance of its output per channel}.

    Reference:
      Sharma et al. 2022, "A Generalized Zero-Shot Quantization of Deep Convolutional Neural
      Networks via Learned Weights Statistics": statistics estimation, equalizing sizes.
    """
    shapes, fixed = output_shapes(model), constants(model.graph)
    start = np.asarray(inputs.mean, np.float64), np.sqrt(np.asarray(inputs.var, np.float64))
    known = dict.fromkeys(model.graph.inputs, start)
    for node in model.graph.nodes:
        if node.name in fixed:
            continue
        slots = {k: np.asarray(v, np.float64) for k, v in model.params.get(node.name, {}).items()}
        pairs = [known[i] for i in node.inputs if i not in fixed]
        known[node.name] = next_pair(node, slots, pairs, shapes[node.name][-1], rule)
    pairs = {n.name: known[n.name] for n in weighted_nodes(model.graph) if n.name in known}
    floats = lambda v: jnp.asarray(v, jnp.float32)
    return {name: Moments(floats(mean), floats(std**2)) for name, (mean, std) in pairs.items()}


def next_pair(
    node: Node,
    slots: Mapping[str, np.ndarray],
    pairs: Sequence[MomentPair],
    width: int,
    rule: SizeRule,
) -> MomentPair:
    """Mean and deviation behind a node, from those of what it reads of the images."""
    op = node.op
    joined = tuple(map(np.concatenate, zip(*pairs, strict=True)))
    pair = (joined[0], joined[1]) if isinstance(op, Concat) else pairs[0]
    mean, std = (resize_vector(v, width, rule) for v in pair)
    if isinstance(op, WEIGHTED):
        kernel = slots["kernel"].reshape(-1, width)
        mean = kernel.mean(0) + mean + slots.get("bias", 0.0)
        return mean, np.sqrt(kernel.var(0) + std**2)
    if isinstance(op, BatchNorm):
        gain, shift = affine(slots, op.eps)
        return mean * gain + shift, std * np.abs(gain)
    if isinstance(op, Add | Sub | Mul | Maximum | Minimum):
        for other in pairs[1:]:
            theirs, spread = (resize_vector(v, width, rule) for v in other)
            mean, std = np.where(spread > std, theirs, mean), np.maximum(spread, std)
    return mean, std


def resize_vector(
    vector: Float[np.ndarray, " c"], size: int, rule: SizeRule = "mean"
) -> Float[np.ndarray, " size"]:
    """A vector of another length, filled with one statistic of it.

    A longer one keeps the values it has and gets the statistic in the channels added; a shorter
    one holds nothing but the statistic. The paper picks the statistic for each architecture
    (`mean+min` for the contractions of MobileNetV2); its table is not known to us, hence `mean`.

    Args:
      vector: means or deviations of channels.
      size: the length wanted.
      rule: the statistic.

    Returns:
      The vector itself if it has that length.

    Reference:
      Sharma et al. 2022, "A Generalized Zero-Shot Quantization ...", equalizing sizes.
    """
    if size == vector.size:
        return vector
    low, mean, high = vector.min(), vector.mean(), vector.max()
    value = {
        "min": low,
        "mean-min": mean - low,
        "mean+min": mean + low,
        "mean": mean,
        "max-mean": high - mean,
        "max+mean": high + mean,
        "max": high,
    }[rule]
    kept = vector if size > vector.size else vector[:0]
    return np.concatenate([kept, np.full(size - kept.size, value)])


# normal variables


@jax.jit
def analytic_moments(model: Model, inputs: Moments) -> dict[str, Moments]:
    """Moments of every tensor they can be told of, from the weights and those of the images.

    Pixels and channels count as independent and normal. Beyond what `passes.moments.propagated`
    knows, layers sum their inputs, norms normalise them (a layer or group norm of something unknown
    starts anew), flattening repeats them, and gates multiply independent tensors.

    Args:
      model: the network; batch norms count as the affine functions they are.
      inputs: moments of the images.

    Returns:
      {tensor: mean and variance per channel}.
    """
    shapes, fixed = output_shapes(model), constants(model.graph)
    known = dict.fromkeys(model.graph.inputs, inputs)
    shapes |= dict.fromkeys(model.graph.inputs, (1, *model.contract.shape))
    for node in model.graph.nodes:
        read, made = tuple(shapes[i] for i in node.inputs), shapes[node.name]
        slots = model.params.get(node.name, {})
        around = Around(slots, read, made, tuple(i in fixed for i in node.inputs))
        found = expected(node, [known.get(i) for i in node.inputs], around)
        if found is not None:
            known[node.name] = found
    return {name: moments for name, moments in known.items() if moments.mean.ndim == 1}


def expected(node: Node, inputs: Sequence[Moments | None], around: Around) -> Moments | None:
    """Moments behind a node; None if they cannot be told."""
    op, width = node.op, around.made[-1]
    given = [m for m in inputs if m is not None]
    plain = len(given) == len(inputs) and all(m.mean.ndim == 1 for m in given)
    if isinstance(op, LayerNorm | GroupNorm):
        x = given[0] if plain else Moments(jnp.zeros(width), jnp.ones(width))
        groups = op.groups if isinstance(op, GroupNorm) else 1
        return normalised(x, groups, op.eps, around.slots)
    if len(given) < len(inputs):
        return None
    if plain and isinstance(op, WEIGHTED):
        return weighted_sum(node, given[0], around.slots)
    if plain and isinstance(op, BatchNorm):
        gain, shift = affine(around.slots, op.eps)
        return Moments(given[0].mean * gain + shift, given[0].var * gain**2)
    if plain and isinstance(op, Mul) and not any(around.fixed):
        return propagated(op, given, around._replace(fixed=(True, False)))
    found = None if isinstance(op, Flatten) else propagated(op, given, around)
    if found is None and plain and isinstance(op, Flatten | Reshape):
        return repeated(given[0], width)
    return found


def weighted_sum(node: Node, x: Moments, slots: Slots) -> Moments:
    """Moments behind a layer: `sum w m + b` and `sum w^2 v`, borders ignored."""
    kernel = slots["kernel"]
    mean, var = mean_output(node, kernel, x.mean), mean_output(node, kernel**2, x.var)
    return Moments(mean + slots["bias"] if "bias" in slots else mean, var)


def affine(slots: Mapping, eps: float) -> tuple:
    """Factor and offset per channel of a batch norm."""
    gain = slots.get("scale", 1.0) / (slots["var"] + eps) ** 0.5
    return gain, slots.get("bias", 0.0) - slots["mean"] * gain


def normalised(x: Moments, groups: int, eps: float, slots: Slots) -> Moments:
    """Moments behind a layer norm (one group) or a group norm.

    A group's variance is the mean variance of its channels plus the variance of their means.
    """
    mean, var = (v.reshape(groups, -1) for v in x)
    spread = jnp.mean(var, 1, keepdims=True) + jnp.var(mean, 1, keepdims=True) + eps
    centred = (mean - jnp.mean(mean, 1, keepdims=True)) / jnp.sqrt(spread)
    scale = slots.get("scale", 1.0)
    found = Moments(centred.reshape(-1) * scale, (var / spread).reshape(-1) * scale**2)
    return found._replace(mean=found.mean + slots.get("bias", 0.0))


def repeated(x: Moments, width: int) -> Moments | None:
    """Moments of positions laid out one after the other, channels last."""
    times, rest = divmod(width, x.mean.size)
    return None if rest else Moments(*(jnp.tile(v, times) for v in x))
