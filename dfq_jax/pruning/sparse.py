"""Weights at zero in a pattern (2:4) or anywhere, with what is left making up for them."""

import re
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import weighted_nodes
from dfq_jax.numerics.sparsity import Pattern, sparse
from dfq_jax.pruning.groups import Subject
from dfq_jax.pruning.refit import Layer, by_group, moments_read, refit


class Sparse(NamedTuple):
    """A network with weights at zero.

    Attributes:
      model: of the shapes it had.
      zeros: {layer: share of its weights that are zero}.
    """

    model: Model
    zeros: Mapping[str, float]


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


def sparsified(subject: Subject, pattern: str | Pattern) -> Sparse:
    """The network with weights at zero, layer after layer, norms re-estimated.

    Neighbours are input channels. Layers stay as they are whose inputs cannot be divided so (those
    that read images), and layers in groups, which have few weights.

    Args:
      subject: the network, with images.
      pattern: as `parse_pattern` reads it.

    Returns:
      The network; zero on every symmetric grid is zero, so quantization keeps what it got.

    Raises:
      UsageError: for a pattern that is none, or without images.
    """
    pattern = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    kept = np.ones(len(subject.coupled), bool)
    mend = partial(thinned, pattern=pattern)
    model = refit(subject, kept, subject.model, mend, norms=True, everywhere=True)
    share = lambda name: float(np.mean(np.asarray(model.params[name]["kernel"]) == 0))
    return Sparse(model, {n.name: share(n.name) for n in weighted_nodes(model.graph)})


def thinned(layer: Layer, *, pattern: Pattern) -> Float[np.ndarray, "..."]:
    """The kernel of a layer with weights at zero."""
    inputs = layer.whole.shape[-2]
    if getattr(layer.op, "groups", 1) > 1 or not pattern.fits(inputs):
        return layer.whole
    gram, _, samples = moments_read(layer)
    noise = len(gram[0]) / samples * np.trace(gram[0]) / len(gram[0])
    found = sparse(by_group(layer.whole, 1)[0], gram[0] + noise * np.eye(len(gram[0])), pattern)
    return found.reshape(layer.whole.shape)
