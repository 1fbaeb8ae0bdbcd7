"""Weights at zero in a pattern (2:4) or anywhere, with what is left making up for them."""

import re
from collections.abc import Container, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import weighted_nodes
from dfq_jax.numerics.channels import by_group
from dfq_jax.numerics.regression import too_wide
from dfq_jax.numerics.sparsity import Pattern, sparse, surviving
from dfq_jax.pruning.groups import Subject, left_alone
from dfq_jax.pruning.refit import Layer, moments_read, refit


class Sparse(NamedTuple):
    """A network with weights at zero.

    Attributes:
      model: of the shapes it had.
      zeros: {layer: share of its weights that are zero}.
      pattern: in which they are.
    """

    model: Model
    zeros: Mapping[str, float]
    pattern: Pattern


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
    subject: Subject, pattern: str | Pattern, *, untouched: tuple[str, ...] = ()
) -> Sparse:
    """The network with weights at zero, layer after layer, norms re-estimated.

    Neighbours are input channels. Layers stay as they are whose inputs cannot be divided so (those
    that read images), and layers in groups, which have few weights.

    Args:
      subject: the network, with images.
      pattern: as `parse_pattern` reads it.
      untouched: patterns of layers that keep all their weights.

    Returns:
      The network; zero lies on every grid of weights, so rounding to nearest keeps what it got.

    Raises:
      UsageError: for a pattern that is none or that matches no layer, or without images.
    """
    pattern = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    kept, left = np.ones(len(subject.coupled), bool), left_alone(subject.model, untouched)
    mend = partial(thinned, pattern=pattern, left=left)
    model = refit(subject, kept, subject.model, mend, norms=True, everywhere=True)
    share = lambda name: float(np.mean(np.asarray(model.params[name]["kernel"]) == 0))
    return Sparse(model, {n.name: share(n.name) for n in weighted_nodes(model.graph)}, pattern)


def thinned(
    layer: Layer, *, pattern: Pattern, left: Container[str] = ()
) -> Float[np.ndarray, "..."]:
    """The kernel of a layer with weights at zero, if it is not among those left alone.

    Of a layer with too many inputs to relate the largest stay, and nothing makes up for the rest.
    """
    inputs = layer.whole.shape[-2]
    if layer.name in left or getattr(layer.op, "groups", 1) > 1 or not pattern.fits(inputs):
        return layer.whole
    whole = by_group(layer.whole, 1)[0]
    if too_wide(len(whole)):
        return (whole * surviving(np.abs(whole), pattern)).reshape(layer.whole.shape)
    gram, _, samples = moments_read(layer)
    noise = len(gram[0]) / samples * np.trace(gram[0]) / len(gram[0])
    found = sparse(whole, gram[0] + noise * np.eye(len(gram[0])), pattern)
    return found.reshape(layer.whole.shape)
