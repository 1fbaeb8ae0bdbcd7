"""Layers fitted anew, and norms re-estimated, with the original beside the pruned network.

Both run node by node over the same images, what goes being zero in the one. Each layer is mended
before its output travels on, so that later ones make up for what is left of earlier errors.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import WEIGHTED, BatchNorm
from dfq_jax.graph.query import consumers
from dfq_jax.graph.rewrite import with_params
from dfq_jax.graph.semantics import Slots
from dfq_jax.numerics.channels import by_group
from dfq_jax.numerics.regression import refitted, too_wide
from dfq_jax.passes.select import Kept, standing
from dfq_jax.pruning.groups import Subject
from dfq_jax.quantization.node_by_node import BATCH, apply_float
from dfq_jax.quantization.second_moments import WindowLayer, moments_of

MOST_RATIO = 16.0
"""Largest factor of a re-estimated variance, and its reciprocal the smallest."""

Batches = tuple[Array, ...]


class Both(NamedTuple):
    """A tensor in the original and in the pruned network, batch by batch."""

    exact: Batches
    rough: Batches


class Layer(NamedTuple):
    """A layer that is mended.

    Attributes:
      name: of its node.
      op: what it is.
      whole: its kernel in the original, zero in what it no longer makes.
      start: its kernel before it is mended.
      left: which of the channels are left that a group of it reads.
      read: what it reads.
      caught: whether a bias or a norm makes up for differences of means.
    """

    name: str
    op: WindowLayer
    whole: Float[np.ndarray, "..."]
    start: Float[np.ndarray, "..."]
    left: Kept
    read: Both
    caught: bool


Mend = Callable[[Layer], Float[np.ndarray, "..."]]
"""A layer -> its kernel."""


def refit(
    subject: Subject,
    kept: Kept,
    zeros: Model,
    mend: Mend | None,
    *,
    norms: bool,
    everywhere: bool = False,
) -> Model:
    """The pruned network, mended by what images show.

    Args:
      subject: the network as it was, with images; those beyond whole batches of `BATCH` are left
        out.
      kept: which sets stay.
      zeros: the network with zeros where channels go.
      mend: what becomes of kernels; None leaves them as they are.
      norms: whether means and variances of batch norms follow what images show, and biases.
      everywhere: whether layers are mended that lose no channel and read what they read before.

    Returns:
      The network, zeros where they were.
    """
    stays = standing(subject.coupled, kept)
    batches = in_whole_batches(subject.seen)
    found: dict[str, Slots] = {}

    def apply(node: Node, slots: Slots, args: tuple[Both, ...]) -> Both:
        original = subject.model.params.get(node.name, {})
        exact = computed(node, original, tuple(x.exact for x in args), len(batches))
        axes = subject.coupled.slots.get(node.name, {})
        losing = any(not stays[v].all() for each in axes.values() for v in each)
        if not (losing or everywhere) and all(x.rough is x.exact for x in args):
            return Both(exact, exact)
        if mend is not None and isinstance(node.op, WindowLayer):
            read, written = (stays[v] for v in axes["kernel"][-2:])
            start = np.asarray(slots["kernel"], np.float64)
            whole = np.asarray(original["kernel"], np.float64) * written
            caught = norms and has_mean(subject.model, node)
            kernel = mend(Layer(node.name, node.op, whole, start, read, args[0], caught))
            slots = {**slots, "kernel": jax.device_put(kernel.astype(np.float32))}
        if norms and isinstance(node.op, BatchNorm):
            slots = renormed(slots, args[0])
        rough = computed(node, slots, tuple(x.rough for x in args), len(batches))
        if norms and isinstance(node.op, WEIGHTED) and "bias" in slots:
            gap = (mean_of(exact) - mean_of(rough)) * stays[axes["bias"][-1]]
            slots = {**slots, "bias": slots["bias"] + gap.astype(np.float32)}
            rough = computed(node, slots, tuple(x.rough for x in args), len(batches))
        found[node.name] = slots
        return Both(exact, rough)

    env = dict.fromkeys(zeros.graph.inputs, Both(batches, batches))
    last = {name: node.name for node in zeros.graph.nodes for name in node.inputs}
    for node in zeros.graph.nodes:
        args = tuple(env[name] for name in node.inputs)
        env[node.name] = apply(node, zeros.params.get(node.name, {}), args)
        for name in {n for n in node.inputs if last[n] == node.name}:
            del env[name]
    return with_params(zeros, {name: slots for name, slots in found.items() if slots})


def has_mean(model: Model, node: Node) -> bool:
    """Whether a bias, or a norm that reads a layer, makes up for differences of its mean."""
    readers = consumers(model.graph)[node.name]
    norm = any(isinstance(reader.op, BatchNorm) for reader, _ in readers)
    return norm or "bias" in model.params[node.name]


def in_whole_batches(images: Array) -> Batches:
    """Images in batches of one size, without the rest."""
    size = min(BATCH, len(images))
    return tuple(images[i : i + size] for i in range(0, len(images) - size + 1, size))


def computed(node: Node, slots: Slots, args: tuple[Batches, ...], count: int) -> Batches:
    """What a node makes of every batch; a constant makes the same of all."""
    if not args:
        return (apply_float(node, slots, ()),) * count
    return tuple(apply_float(node, slots, xs) for xs in zip(*args, strict=True))


class ReadMoments(NamedTuple):
    """Second moments of what the groups of a layer read.

    Attributes:
      gram: in the pruned network.
      cross: there with the original.
      samples: positions that were seen.
    """

    gram: Float[np.ndarray, "g k k"]
    cross: Float[np.ndarray, "g k k"]
    samples: float


def moments_read(layer: Layer) -> ReadMoments:
    """What a layer reads; about the means where something makes up for these."""
    rough, exact = (map(np.asarray, batches) for batches in layer.read[::-1])
    pairs = zip(rough, exact, strict=True)
    moments, samples = moments_of(layer.op, layer.whole.shape, pairs, None)
    gram, cross, mean, wanted = (np.asarray(v, np.float64) for v in moments)
    if layer.caught:
        gram = gram - mean[:, :, None] * mean[:, None]
        cross = cross - mean[:, :, None] * wanted[:, None]
    return ReadMoments(gram, cross, float(samples))


def fitted(layer: Layer, *, damping: float) -> Float[np.ndarray, "..."]:
    """The kernel that makes of what is left what the whole one made of all.

    Args:
      layer: what it reads, in the order of the kernel's entries.
      damping: pull towards the kernel it starts from, in units of the mean power of what is read,
        beside the number of inputs for each sample.

    Returns:
      A kernel; that which it starts from where it has too many inputs to solve for.
    """
    if too_wide(math.prod(layer.whole.shape[:-1])):
        return layer.start
    gram, cross, samples = moments_read(layer)
    rows = np.flatnonzero(np.tile(layer.left, gram.shape[-1] // layer.left.size))
    pull = damping + len(rows) / samples
    kernels, starts = (by_group(v, len(gram)) for v in (layer.whole, layer.start))
    made = np.zeros_like(kernels)
    for g, (kernel, begun) in enumerate(zip(kernels, starts, strict=True)):
        inner, outer = gram[g][np.ix_(rows, rows)], cross[g][rows]
        made[g, rows] = refitted(inner, outer, kernel, begun[rows], pull)
    return np.moveaxis(made, 0, 1).reshape(layer.whole.shape)


class HostMoments(NamedTuple):
    """Mean and variance of each channel, on the host."""

    mean: Float[np.ndarray, " c"]
    var: Float[np.ndarray, " c"]


def renormed(slots: Slots, read: Both) -> Slots:
    """A batch norm whose statistics have moved as those of images did between the networks."""
    old = HostMoments(*(np.asarray(slots[name], np.float64) for name in ("mean", "var")))
    new = moved_as(old, moments_over(read.exact), moments_over(read.rough))
    return {**slots, **{k: jax.device_put(v.astype(np.float32)) for k, v in new._asdict().items()}}


def moved_as(recorded: HostMoments, was: HostMoments, now: HostMoments) -> HostMoments:
    """Recorded statistics, moved as those of images did.

    The means by their difference, the variances by their ratio: images that do not match what was
    recorded do no harm. A channel that shows no variance keeps its own.
    """
    alive = (now.var > 0) & (was.var > 0)
    ratio = np.where(alive, now.var / np.where(alive, was.var, 1.0), 1.0)
    ratio = np.clip(ratio, 1 / MOST_RATIO, MOST_RATIO)
    shift = np.where(alive, now.mean - was.mean, 0.0)
    return HostMoments(recorded.mean + shift, recorded.var * ratio)


def moments_over(batches: Batches) -> HostMoments:
    """Mean and variance of each channel over images and positions."""
    rows = np.concatenate([np.asarray(x).reshape(-1, x.shape[-1]) for x in batches])
    return HostMoments(rows.mean(0, dtype=np.float64), rows.var(0, dtype=np.float64))


def mean_of(batches: Batches) -> Float[np.ndarray, " c"]:
    """Mean of each channel over images and positions."""
    return moments_over(batches).mean
