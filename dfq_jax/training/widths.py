"""A student of many widths: one kernel a layer, of which each width reads as many bits as it has.

Steps and biases are each width's own, which is a batch norm of its own where norms are folded.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dfq_jax.graph.graph import Model
from dfq_jax.numerics.bit_planes import TOP, on_cut_codes
from dfq_jax.numerics.levels import affine_of
from dfq_jax.quantization.plan import Plan
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.sites import Site
from dfq_jax.quantization.vertical import (
    VerticalNetwork,
    WidthParameters,
    channel_units,
    nested_layers,
)


def widths_at_first(
    plan: Plan, model: Model, widths: tuple[int, ...]
) -> dict[str, dict[str, dict[str, Array]]]:
    """What of each width is trained, before the first step: gains of its steps, and biases."""
    layers = nested_layers(plan, model.graph)
    biases = {n: model.params[n]["bias"] for n in layers if "bias" in model.params[n]}
    gains = {n: jnp.ones(model.params[n]["kernel"].shape[-1]) for n in layers}
    return {str(bits): {"gains": gains, "biases": dict(biases)} for bits in widths}


class AtWidth(NamedTuple):
    """A student of one width.

    Attributes:
      plan: without the kernels that are cut, which lie on their levels.
      x: what is trained, with these kernels and the biases of the width.
    """

    plan: Plan
    x: PyTree


def at_width(
    plan: Plan, start: QuantizedModel, x: PyTree, own: PyTree, merged: float | Float[Array, ""]
) -> AtWidth:
    """The student of a width; slopes pass to the kernels of all.

    Args:
      plan: of all bits.
      start: the float network and the scales as calibrated, which whole codes keep.
      x: what is trained.
      own: the width's part of it.
      merged: how many whole codes become one of the width's: `2**(8 - bits)`, may be traced.
    """
    weights, layers = dict(x["weights"]), nested_layers(plan, start.model.graph)
    for layer in layers:
        unit = affine_of(start.qparams[Site(layer)]).scale
        step = jnp.abs(own["gains"][layer]) * unit * merged
        kernel = on_cut_codes(weights[layer]["kernel"], unit, step, merged)
        biases = {"bias": own["biases"][layer]} if layer in own["biases"] else {}
        weights[layer] = {**weights[layer], "kernel": kernel, **biases}
    cut = {Site(layer) for layer in layers}
    entries = tuple((site, spec) for site, spec in plan.entries if site not in cut)
    return AtWidth(dataclasses.replace(plan, entries=entries), {**x, "weights": weights})


def stacked_widths(x: PyTree, widths: tuple[int, ...]) -> tuple[Float[Array, " w"], PyTree]:
    """What `at_width` is told of each width, along a first axis: one program serves all."""
    own = [x["widths"][str(bits)] for bits in widths]
    merged = jnp.asarray([2.0 ** (TOP - bits) for bits in widths])
    return merged, jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)


def vertical_network(top: QuantizedModel, x: PyTree) -> VerticalNetwork:
    """The student as what it was made of, with all its widths."""
    found = {}
    for name, own in x["widths"].items():
        gains: Any = own["gains"]
        bits = int(name)
        step = lambda layer, bits=bits, gains=gains: (
            jnp.abs(gains[layer]) * channel_units(top, layer) * 2 ** (TOP - bits)
        )
        found[bits] = WidthParameters({n: step(n) for n in gains}, dict(own["biases"]))
    ordered = dict(sorted(found.items(), reverse=True))
    return VerticalNetwork(top, ordered)
