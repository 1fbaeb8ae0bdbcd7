"""Outliers of activations moved into kernels, channel by channel, through norms and products.

Where a few channels of what layers read are far larger than the others, one grid for all wastes
its codes. A channel divided by a factor before the layer and multiplied in its kernel computes the
same. The division goes where it costs nothing: into the scale of the norm that makes the channel,
or into the layer on one side of a product.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import LayerNorm, Linear, Mul
from dfq_jax.graph.query import consumers, only_consumer
from dfq_jax.graph.rewrite import with_params
from dfq_jax.graph.token_ops import RmsNorm

LEAST = 1e-5
"""What largest values are at least, so that channels of zeros stay as they are."""
BATCH = 8
"""Examples looked at at a time."""


class Smoothed(NamedTuple):
    """A tensor whose channels can have other sizes.

    Attributes:
      tensor: its name.
      giver: the node whose parameters are divided.
      slots: those of it, channels last.
      readers: linear layers, all that read the tensor; rows of their kernels are multiplied.
    """

    tensor: str
    giver: str
    slots: tuple[str, ...]
    readers: tuple[str, ...]


def smoothable(model: Model) -> tuple[Smoothed, ...]:
    """The tensors of a network that can be smoothed, in execution order."""
    return tuple(found_in(model))


def found_in(model: Model) -> Iterator[Smoothed]:
    """The same, one after the other."""
    graph, readers = model.graph, consumers(model.graph)
    for node in graph.nodes:
        reading = [reader for reader, _ in readers[node.name]]
        linear = bool(reading) and all(isinstance(r.op, Linear) for r in reading)
        if not linear or node.name in graph.outputs:
            continue
        giver = giver_of(graph, readers, node)
        own = {} if giver is None else model.params.get(giver.name, {})
        slots = tuple(slot for slot in ("kernel", "scale", "bias") if slot in own)
        if giver is not None and slots and slots != ("bias",):
            yield Smoothed(node.name, giver.name, slots, tuple(r.name for r in reading))


def giver_of(graph: Graph, readers: dict[str, tuple], node: Node) -> Node | None:
    """The node whose parameters decide how large the channels of another are; None if none does."""
    match node.op:
        case LayerNorm() | RmsNorm():
            return node
        case Mul():
            made = [graph.by_name.get(name) for name in node.inputs]
            layers = [n for n in made if n is not None and isinstance(n.op, Linear)]
            alone = [n for n in layers if only_consumer(graph, readers, n.name) is node]
            return alone[0] if alone else None
        case _:
            return None


def smooth(model: Model, examples: Shaped[Array, "n ..."], strength: float = 0.5) -> Model:
    """The same function, channels before layers divided by what their kernels are multiplied with.

    Args:
      model: a network of one input.
      examples: that show how large channels get.
      strength: `alpha`; of 0 kernels, of 1 activations get channels of one size.

    Returns:
      The network with `s = max|x|^alpha / max|w|^(1 - alpha)` moved from activations to kernels;
      the geometric mean of all `s` of a tensor is 1.

    Reference:
      Xiao et al. 2023, "SmoothQuant", equation 4. The mean of 1 is ours: it changes no ratio.
    """
    places = smoothable(model)
    if not places:
        return model
    largest = [largest_of(model, examples[i : i + BATCH], places) for i in starts(len(examples))]
    peaks = {name: jnp.stack([part[name] for part in largest]).max(0) for name in largest[0]}
    for place in places:
        factors = factors_of(model, place, peaks[place.tensor], strength)
        own = model.params[place.giver]
        changed = {place.giver: {slot: own[slot] / factors for slot in place.slots}}
        for reader in place.readers:
            changed[reader] = {"kernel": model.params[reader]["kernel"] * factors[:, None]}
        model = with_params(model, changed)
    return model


def starts(count: int) -> range:
    """Where batches begin; the last may overlap none and be smaller."""
    return range(0, count, BATCH)


@partial(jax.jit, static_argnames="places")
def largest_of(
    model: Model, examples: Shaped[Array, "n ..."], places: tuple[Smoothed, ...]
) -> dict[str, Float[Array, " chan"]]:
    """{tensor: largest absolute value of each channel}."""
    _, found = evaluate(model, examples, taps={place.tensor for place in places})
    return {name: jnp.max(jnp.abs(x.reshape(-1, x.shape[-1])), axis=0) for name, x in found.items()}


def factors_of(
    model: Model, place: Smoothed, peaks: Float[Array, " chan"], strength: float
) -> Float[Array, " chan"]:
    """What channels are divided by; geometric mean 1."""
    kernels = [jnp.abs(model.params[reader]["kernel"]).max(1) for reader in place.readers]
    rows = jnp.maximum(jnp.stack(kernels).max(0), LEAST)
    logs = strength * jnp.log(jnp.maximum(peaks, LEAST)) - (1 - strength) * jnp.log(rows)
    return jnp.exp(logs - logs.mean())
