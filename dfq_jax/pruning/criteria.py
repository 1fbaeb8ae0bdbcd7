"""What each set of channels is worth: criteria of papers, by name.

All take a `Subject` and give every set of its coupling a score; small ones go first.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from dfq_jax.base.words import CriterionName
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import BatchNorm
from dfq_jax.graph.query import batch_norms, weighted_nodes
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics import importance
from dfq_jax.numerics.regression import too_wide
from dfq_jax.pruning.groups import Subject
from dfq_jax.quantization.node_by_node import in_batches

SetScores = Float[np.ndarray, " sets"]
DAMPING = 0.01
"""Of the Gram matrices of features, in units of their mean diagonal."""


class Criterion(NamedTuple):
    """A way to score sets of channels.

    Attributes:
      score: what each set is worth.
      looks: whether it looks at images.
    """

    score: Callable[[Subject], SetScores]
    looks: bool = False


# By weights


def filter_rows(subject: Subject) -> Iterator[tuple[np.ndarray, importance.Rows]]:
    """(numbers of sets, filters) of every layer that makes some.

    Batch norms are folded in: papers that judge filters by norms or medians take them without.
    """
    for node in weighted_nodes(subject.folded.graph):
        numbers = subject.coupled.slots[node.name]["kernel"][-1]
        if numbers.any():
            kernel = np.asarray(subject.folded.params[node.name]["kernel"], np.float64)
            yield numbers, kernel.reshape(-1, kernel.shape[-1]).T


def by_filters(subject: Subject, of: Callable[[importance.Rows], importance.Scores]) -> SetScores:
    """The mean over all filters of a set."""
    scores, count = np.zeros(len(subject.coupled)), np.zeros(len(subject.coupled))
    for numbers, rows in filter_rows(subject):
        scores += subject.by_set(numbers, of(rows))
        count += subject.by_set(numbers, np.ones(len(numbers)))
    return scores / np.maximum(count, 1)


def group_power(subject: Subject, p: float = 2.0) -> SetScores:
    """`sum |w|^p` over all members of a set (filters, columns of readers, gains of norms), divided
    by their number: the score of Torch-Pruning.

    Reference:
      Fang et al. 2023, "DepGraph: Towards Any Structural Pruning".
    """
    scores, members = np.zeros(len(subject.coupled)), np.zeros(len(subject.coupled))
    for name, slots in subject.coupled.slots.items():
        for slot in {"kernel", "scale"} & set(slots):
            powers = np.abs(np.asarray(subject.model.params[name][slot], np.float64)) ** p
            for axis, numbers in enumerate(slots[slot]):
                others = tuple(a for a in range(powers.ndim) if a != axis)
                scores += subject.by_set(numbers, powers.sum(others))
                members += subject.by_set(numbers, np.ones(len(numbers))) > 0
    return scores / np.maximum(members, 1)


def norm_scale(subject: Subject) -> SetScores:
    """`|gamma|` of batch norms; the mean where several have a set, the filter's norm where none.

    Reference:
      Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming".
    """
    scores, count = np.zeros(len(subject.coupled)), np.zeros(len(subject.coupled))
    for node in batch_norms(subject.model.graph):
        slots = subject.coupled.slots.get(node.name, {})
        if isinstance(node.op, BatchNorm) and "scale" in slots:
            gains = np.abs(np.asarray(subject.model.params[node.name]["scale"], np.float64))
            scores += subject.by_set(slots["scale"][-1], gains)
            count += subject.by_set(slots["scale"][-1], np.ones(len(gains)))
    alone = by_filters(subject, partial(importance.norm, p=2.0))
    return np.where(count > 0, scores / np.maximum(count, 1), alone)


# By what is done with the channels


def reading_columns(subject: Subject) -> Iterator[tuple[Node, np.ndarray, np.ndarray]]:
    """(layer, numbers of sets, energy of the kernel's column) for all that read removable ones."""
    for node in weighted_nodes(subject.folded.graph):
        numbers = subject.coupled.slots[node.name]["kernel"][-2]
        if numbers.any():
            kernel = np.asarray(subject.folded.params[node.name]["kernel"], np.float64)
            energy = (kernel**2).sum(tuple(a for a in range(kernel.ndim) if a != kernel.ndim - 2))
            yield node, numbers, energy


def by_readers(
    subject: Subject, mean_square: Callable[[Node], Float[np.ndarray, " channels"] | None]
) -> SetScores:
    """`sum E[x^2] |V|^2` over all columns that read a set; its filters' power where none does.

    Args:
      subject: the network.
      mean_square: of what a layer reads, channel by channel; None where nobody knows, which
        counts as 1.
    """
    scores, read = np.zeros(len(subject.coupled)), np.zeros(len(subject.coupled))
    for node, numbers, energy in reading_columns(subject):
        known = mean_square(node)
        square = np.ones(len(numbers)) if known is None else np.resize(known, len(numbers))
        scores += subject.by_set(numbers, energy * square)
        read += subject.by_set(numbers, np.ones(len(numbers)))
    return np.where(read > 0, scores, by_filters(subject, partial(importance.power, p=2.0)))


def energy(subject: Subject) -> SetScores:
    """`E[x^2] |V|^2`: expected energy of a channel behind its activation, by the clipped normal
    distribution of its batch norm, times the energy of the columns that read it.

    What dropping a channel does to the next layer if channels are independent, without an image.
    """

    def expected(node: Node) -> Float[np.ndarray, " channels"] | None:
        found = subject.expected.get(node.inputs[0])
        return None if found is None else np.asarray(found.var + found.mean**2, np.float64)

    return by_readers(subject, expected)


def reconstruction(subject: Subject) -> SetScores:
    """What is left of the energy of a channel that the others cannot make up for, times that of
    the columns that read it: the error of the next layer, once it is solved anew. Of too many
    channels all of their energy counts.

    Looks at images. Reference: `numerics.importance.left_unexplained`.
    """
    images = subject.seen
    read = {node.inputs[0] for node, _, _ in reading_columns(subject)}
    known = channel_moments(subject.folded, tuple(sorted(read)), images)
    unexplained = partial(importance.left_unexplained, damping=DAMPING)
    alone = {n: unexplained(x.spread) if x.spread.ndim > 1 else x.spread for n, x in known.items()}
    return by_readers(subject, lambda node: alone[node.inputs[0]])


class ChannelMoments(NamedTuple):
    """Channels of a tensor over images and positions.

    Attributes:
      mean: of each.
      spread: their covariances; of too many channels their variances alone.
    """

    mean: Float[np.ndarray, " c"]
    spread: Float[np.ndarray, "..."]


def channel_moments(
    model: Model, names: tuple[str, ...], images: Shaped[Array, "n ..."]
) -> dict[str, ChannelMoments]:
    """Means and covariances of the channels of some tensors."""
    sums: dict[str, np.ndarray] = {}
    means: dict[str, np.ndarray] = {}
    count: dict[str, int] = {}
    taps = jax.jit(lambda model, x: evaluate(model, x, taps=names)[1])
    for batch in in_batches(images):
        for name, found in taps(model, batch.images).items():
            rows = batch.counting(found).astype(np.float64)
            rows = rows.reshape(-1, rows.shape[-1])
            wide = too_wide(rows.shape[-1])
            sums[name] = sums.get(name, 0) + ((rows**2).sum(0) if wide else rows.T @ rows)
            means[name] = means.get(name, 0) + rows.sum(0)
            count[name] = count.get(name, 0) + len(rows)
    found = {}
    for name in names:
        mean = means[name] / count[name]
        square = mean**2 if sums[name].ndim == 1 else np.outer(mean, mean)
        found[name] = ChannelMoments(mean, sums[name] / count[name] - square)
    return found


# By gradients


def by_gradients(subject: Subject, p: float) -> SetScores:
    """Means over images of `|dL/dm_j|^p`, for a factor `m_j` on every channel.

    `L` is the divergence from the network's own most likely class on each image, in place of
    labels, summed over its outputs; `dL/dm_j = sum_v v dL/dv` over all columns `v` that read the
    channel.

    Reference:
      Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient
      Inference" (p = 1: the absolute value image by image); Theis et al. 2018, "Faster Gaze
      Prediction With Dense Networks and Fisher Pruning" (p = 2, without its factor 1/2).
    """
    images = subject.seen
    total = np.zeros(len(subject.coupled))
    read = [(node.name, numbers) for node, numbers, _ in reading_columns(subject)]
    run = jax.jit(partial(column_products, names=tuple(name for name, _ in read)))
    for batch in in_batches(images):
        found = run(subject.folded, batch.images)
        rows = [
            np.stack([subject.by_set(numbers, row) for row in batch.counting(found[name])])
            for name, numbers in read
        ]
        each = np.sum(rows, 0) if rows else np.zeros((batch.valid, len(total)))
        total += importance.power(each.T, p)
    return total / len(images)


def column_products(
    model: Model, images: Shaped[Array, "n ..."], *, names: tuple[str, ...]
) -> dict[str, Float[Array, "n _"]]:
    """`sum_v v dL/dv` of each column of some kernels, for every image."""
    kernels = {name: model.params[name]["kernel"] for name in names}

    def loss(kernels: Mapping[str, Array], image: Float[Array, "h w c"]) -> Float[Array, ""]:
        changed = with_params(model, {name: {"kernel": k} for name, k in kernels.items()})
        outputs, _ = evaluate(changed, image[None])
        return sum((own_loss(out) for out in outputs), jnp.zeros(()))

    def one(image: Float[Array, "h w c"]) -> dict[str, Float[Array, " _"]]:
        slopes = jax.grad(loss)(kernels, image)
        product = lambda v, slope: jnp.moveaxis(v * slope, -2, 0).reshape(v.shape[-2], -1).sum(1)
        return {name: product(kernels[name], slopes[name]) for name in names}

    return jax.lax.map(one, images)


def own_loss(out: Float[Array, "..."]) -> Float[Array, ""]:
    """Cross-entropy with the most likely class of every vector along the last axis; of single
    values half their square."""
    if out.shape[-1] < 2:
        return jnp.sum(out**2) / 2
    scores = jax.nn.log_softmax(out.reshape(-1, out.shape[-1]))
    return -jnp.mean(jnp.max(scores, -1))


CRITERIA: Mapping[CriterionName, Criterion] = {
    "energy": Criterion(energy),
    "reconstruction": Criterion(reconstruction, looks=True),
    "l1": Criterion(partial(by_filters, of=partial(importance.norm, p=1.0))),
    "l2": Criterion(partial(by_filters, of=partial(importance.norm, p=2.0))),
    "median": Criterion(partial(by_filters, of=importance.distances)),
    "norm": Criterion(norm_scale),
    "group": Criterion(group_power),
    "taylor": Criterion(partial(by_gradients, p=1.0), looks=True),
    "fisher": Criterion(partial(by_gradients, p=2.0), looks=True),
}
