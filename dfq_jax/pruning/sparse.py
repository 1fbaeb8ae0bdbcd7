"""Weights at zero in a pattern (2:4) or anywhere, with what is left making up for them."""

import re
from collections.abc import Container, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from dfq_jax.base.words import RestorationName
from dfq_jax.errors import UsageError
from dfq_jax.graph.channels import groups_of
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import weighted_nodes
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.channels import by_group
from dfq_jax.numerics.regression import refitted, refitted_where, too_wide
from dfq_jax.numerics.sparsity import DAMPING, Pattern, arranged, sparse, surviving
from dfq_jax.passes.reorder import exchangeable, places, reordered
from dfq_jax.pruning.criteria import ChannelMoments, channel_moments, reading_columns
from dfq_jax.pruning.groups import Subject, left_alone
from dfq_jax.pruning.refit import Layer, moments_read, refit


class Sparse(NamedTuple):
    """A network with weights at zero.

    Attributes:
      model: of the shapes it had.
      zeros: {layer: share of its weights that are zero}.
      pattern: in which they are.
      order: {tensor: which channel of the original comes to each place}, where they moved.
    """

    model: Model
    zeros: Mapping[str, float]
    pattern: Pattern
    order: Mapping[str, Int[np.ndarray, " _"]] = MappingProxyType({})


class LayerZeros(NamedTuple):
    """Zeros of a layer, and what quantization made of them.

    Attributes:
      name: of the layer.
      weights: in its kernel.
      before: how many of them were zero in float.
      after: how many are on their grid; small weights round to zero too.
    """

    name: str
    weights: int
    before: int
    after: int


class Zeros(NamedTuple):
    """Zeros of a quantized network.

    Attributes:
      pattern: in which they were asked for.
      layers: in execution order.
    """

    pattern: Pattern
    layers: tuple[LayerZeros, ...]

    @property
    def shares(self) -> tuple[float, float]:
        """Of all weights, those that are zero before quantization and after."""
        count = max(sum(x.weights for x in self.layers), 1)
        return sum(x.before for x in self.layers) / count, sum(x.after for x in self.layers) / count

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        before, after = self.shares
        layers = [x._asdict() for x in self.layers]
        return {"pattern": str(self.pattern), "before": before, "after": after, "layers": layers}


def zeros_of(before: Model, after: Model, pattern: Pattern) -> Zeros:
    """How many weights are zero in a float network, and in the one on grids made of it."""
    found = []
    for node in weighted_nodes(before.graph):
        if node.name not in after.params:
            continue
        kernels = [np.asarray(m.params[node.name]["kernel"]) for m in (before, after)]
        counts = [int(np.sum(kernel == 0)) for kernel in kernels]
        found.append(LayerZeros(node.name, kernels[0].size, counts[0], counts[1]))
    return Zeros(pattern, tuple(found))


def parse_pattern(text: str) -> Pattern:
    """Reads `2:4` (2 of 4 stay), or `80%` (so many weights of a layer become zero).

    Raises:
      UsageError: on anything else.
    """
    told = text.strip()
    if match := re.fullmatch(r"([0-9]+):([0-9]+)", told):
        kept, among = int(match[1]), int(match[2])
        if 0 < kept < among:
            return Pattern(kept, among)
    elif (match := re.fullmatch(r"([0-9]*\.?[0-9]+)%", told)) and 0 < float(match[1]) < 100:
        return Pattern(1 - float(match[1]) / 100)
    raise UsageError(
        f"pattern {text!r} is none: write 2:4, of which 2 of 4 weights stay, or 80%, of which so "
        "many become zero."
    )


def sparsified(
    subject: Subject,
    pattern: str | Pattern,
    *,
    untouched: tuple[str, ...] = (),
    restore: RestorationName = "ridge",
    arrange: bool = False,
) -> Sparse:
    """The network with weights at zero, layer after layer, norms re-estimated.

    Neighbours are input channels. Layers stay as they are whose inputs cannot be divided so (those
    that read images), and layers in groups, which have few weights.

    Args:
      subject: the network, with images, unless `restore` looks at none.
      pattern: as `parse_pattern` reads it.
      untouched: patterns of layers that keep all their weights.
      restore: `none` makes the smallest weights zero in the order there is, and nothing makes up
        for them; with all others what is left does, as images say.
      arrange: bring channels into an order first in which more of the weights stay
        (`arranged_channels`). What is left then makes up for less: it gained nothing on ResNet-20.

    Returns:
      The network; zero lies on every grid of weights, so rounding to nearest keeps what it got.

    Raises:
      UsageError: for a pattern that is none or that matches no layer, or without images.
    """
    pattern = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    kept, left = np.ones(len(subject.coupled), bool), left_alone(subject.model, untouched)
    order = {}
    if restore == "none":
        model = dropped(subject.model, pattern, left)
    else:
        if arrange:
            subject, order = arranged_channels(subject, pattern, left)
        mend = partial(thinned, pattern=pattern, left=left)
        model = refit(subject, kept, subject.model, mend, norms=True, everywhere=True)
    share = lambda name: float(np.mean(np.asarray(model.params[name]["kernel"]) == 0))
    zeros = {n.name: share(n.name) for n in weighted_nodes(model.graph)}
    return Sparse(model, zeros, pattern, order)


def dropped(model: Model, pattern: Pattern, left: Container[str]) -> Model:
    """The network with its smallest weights at zero, and nothing that makes up for them."""
    for node in weighted_nodes(model.graph):
        kernel = np.asarray(model.params[node.name]["kernel"])
        if node.name in left or groups_of(node.op) > 1 or not pattern.fits(kernel.shape[-2]):
            continue
        rows = kernel.reshape(-1, kernel.shape[-1])
        thin = (rows * surviving(np.abs(rows), pattern)).reshape(kernel.shape)
        model = with_params(model, {node.name: {"kernel": jax.device_put(thin)}})
    return model


def arranged_channels(
    subject: Subject, pattern: Pattern, left: Container[str]
) -> tuple[Subject, dict[str, Int[np.ndarray, " _"]]]:
    """The network with channels in an order in which more of the weights survive a pattern.

    Channels move where nothing tells them apart, all that makes and reads them with them. A weight
    counts by its square times the variance of its channel on images, over all layers that read it.

    Args:
      subject: the network, with images.
      pattern: of neighbours; others need no order.
      left: layers that keep all their weights.

    Returns:
      The same function, and {tensor: which channel comes to each place}, where some moved.
    """
    if not pattern.among:
        return subject, {}
    read = tuple(sorted({node.inputs[0] for node, _, _ in reading_columns(subject)}))
    known = channel_moments(subject.folded, read, subject.seen)
    source = np.arange(len(subject.coupled))
    for sets in map(np.array, exchangeable(subject.coupled)):
        if len(sets) > pattern.among and pattern.fits(len(sets)):
            scores = readers_of(subject, sets, known, left)
            if scores:
                source[sets] = sets[arranged(np.concatenate(scores, 1), pattern)]
    model = reordered(subject.model, subject.coupled, source)
    last = {name: axes[-1] for name, axes in subject.coupled.tensors.items() if axes}
    order = {name: places(numbers, source) for name, numbers in last.items()}
    stay = lambda at: np.array_equal(at, np.arange(len(at)))
    return Subject(model, subject.images), {k: at for k, at in order.items() if not stay(at)}


def readers_of(
    subject: Subject,
    sets: Int[np.ndarray, " n"],
    known: Mapping[str, ChannelMoments],
    left: Container[str],
) -> list[Float[np.ndarray, "n _"]]:
    """Weights by channels, in the order of their sets, of each layer whose neighbours they are."""
    found = []
    for node, numbers, _ in reading_columns(subject):
        if node.name in left or groups_of(node.op) > 1 or len(numbers) % len(sets):
            continue
        if (numbers.reshape(-1, len(sets)) != sets + 1).any():
            continue
        spread = known[node.inputs[0]].spread
        power = spread if spread.ndim == 1 else np.diag(spread)
        kernel = np.asarray(subject.folded.params[node.name]["kernel"], np.float64)
        weights = kernel**2 * np.resize(power, len(numbers))[:, None]
        wide = weights.reshape(-1, len(sets), kernel.shape[-1])
        found.append(np.moveaxis(wide, 1, 0).reshape(len(sets), -1))
    return found


def thinned(
    layer: Layer, *, pattern: Pattern, left: Container[str] = ()
) -> Float[np.ndarray, "..."]:
    """The kernel of a layer with weights at zero, if it is not among those left alone.

    What is approached is what the whole kernel made of all it read, though the layer reads what is
    left of that. Once it is settled which weights stay, they are fitted together.

    Of a layer with too many inputs to relate the largest stay, and nothing makes up for the rest.
    """
    inputs = layer.whole.shape[-2]
    if layer.name in left or getattr(layer.op, "groups", 1) > 1 or not pattern.fits(inputs):
        return layer.whole
    whole = by_group(layer.whole, 1)[0]
    if too_wide(len(whole)):
        return (whole * surviving(np.abs(whole), pattern)).reshape(layer.whole.shape)
    grams, crosses, samples = moments_read(layer)
    gram, cross = grams[0], crosses[0]
    pull = DAMPING + len(gram) / samples
    wanted = refitted(gram, cross, whole, whole, pull)
    steady = gram + pull * np.trace(gram) / len(gram) * np.eye(len(gram))
    found = sparse(wanted, steady, pattern)
    return refitted_where(found != 0, steady, steady @ wanted).reshape(layer.whole.shape)
