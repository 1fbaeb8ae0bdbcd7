"""One network of which any width can be read: codes of 8 bits, steps and biases for each width."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Graph
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.affine import Affine, Grid
from dfq_jax.numerics.bit_planes import TOP, doubled_and_one, without_lowest_bits
from dfq_jax.numerics.levels import affine_of
from dfq_jax.quantization.plan import Plan, Scheme, on_other_levels, resolve
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.sites import Site


class WidthParameters(NamedTuple):
    """What is a width's own; with biases, it is a batch norm of its own, folded.

    Attributes:
      steps: {layer: t_b of each output channel}.
      biases: {layer: its bias}, where it has one.
    """

    steps: Mapping[str, Float[Array, " c"]]
    biases: Mapping[str, Float[Array, " c"]]


class VerticalNetwork(NamedTuple):
    """A network of 8-bit kernels, and what it takes to read fewer of their bits.

    Attributes:
      top: all bits.
      widths: {bits: what is that width's own}, the widest first.
    """

    top: QuantizedModel
    widths: Mapping[int, WidthParameters]


def nested_layers(plan: Plan, graph: Graph) -> tuple[str, ...]:
    """The layers whose kernels may be cut: those that the plan's preset would not keep at 8 bits.

    Only kernels on symmetric grids of 8 bits, with a scale for each output channel or one.
    """
    low = resolve(graph, Scheme(2, 8), plan.layers).table
    free = lambda site: (spec := low.get(site)) is not None and spec.levels.bits < TOP
    whole = lambda spec: (
        isinstance(spec.levels, Grid) and spec.levels == Grid(TOP, True, spec.levels.axis)
    )
    kernels = [(s, spec) for s, spec in plan.entries if s.argument is None]
    return tuple(s.node for s, spec in kernels if whole(spec) and free(s))


def check_nested(plan: Plan, graph: Graph) -> tuple[str, ...]:
    """The layers whose kernels may be cut.

    Raises:
      UsageError: if there are none.
    """
    layers = nested_layers(plan, graph)
    if not layers:
        raise UsageError(
            "no kernel can be cut to fewer bits: that takes kernels of 8 bits without groups, as "
            "by scheme w8a8 and without rules that say otherwise, outside of the layers that "
            f"{plan.layers} keeps at 8 bits."
        )
    return layers


def narrowed(network: VerticalNetwork, bits: int) -> QuantizedModel:
    """The network of a width, as one that stands alone: codes are cut, nothing is rounded again.

    Levels of a cut are `t_b (q_b + 1/2)`, so its kernels lie on the odd codes of a grid of one bit
    more, with half the step.

    Args:
      network: of all widths.
      bits: of the nested kernels; 8 for the whole.

    Raises:
      UsageError: for a width that it does not have.
    """
    if bits == TOP:
        return network.top
    if bits not in network.widths:
        there = ", ".join(map(str, (TOP, *network.widths)))
        raise UsageError(f"this network has widths of {there} bits, and {bits} was asked for.")
    top, own = network.top, network.widths[bits]
    params, levels, qparams = {}, {}, dict(top.qparams)
    for layer, step in own.steps.items():
        site = Site(layer)
        kernel = top.model.params[layer]["kernel"]
        odd = doubled_and_one(top.codes(site.node), bits)
        shape = (1,) * (kernel.ndim - 1) + (-1,)
        half = jnp.reshape(step, shape) / 2
        params[layer] = {"kernel": jax.device_put(odd.astype(np.float32)) * half}
        if layer in own.biases:
            params[layer]["bias"] = own.biases[layer]
        levels[site] = Grid(bits + 1, True, -1)
        qparams[site] = Affine(half, jnp.zeros(half.shape, jnp.int8))
    plan = on_other_levels(top.plan, levels)
    plan = dataclasses.replace(plan, scheme=dataclasses.replace(plan.scheme, weight_bits=bits))
    return QuantizedModel(with_params(top.model, params), plan, qparams)


def as_cut(quantized: QuantizedModel, widths: tuple[int, ...]) -> VerticalNetwork:
    """A network of 8 bits, cut without any learning: steps are doubled for each bit.

    Args:
      quantized: its kernels on grids of 8 bits.
      widths: bits of a weight, from 7 down to 1, the widest first.

    Raises:
      UsageError: for other widths, and a network that has no kernel of 8 bits that may be cut.
    """
    if list(widths) != sorted(set(widths), reverse=True) or not all(0 < b < TOP for b in widths):
        raise UsageError(f"widths are bits from 7 down to 1, the widest first; got {widths}.")
    layers = check_nested(quantized.plan, quantized.model.graph)
    return VerticalNetwork(quantized, {b: cut_parameters(quantized, layers, b) for b in widths})


def cut_parameters(
    quantized: QuantizedModel, layers: tuple[str, ...], bits: int
) -> WidthParameters:
    """Steps of a cut as whole ones make them, and biases as they are."""
    params = quantized.model.params
    units = {name: channel_units(quantized, name) for name in layers}
    steps = {name: unit * 2 ** (TOP - bits) for name, unit in units.items()}
    return WidthParameters(
        steps, {name: params[name]["bias"] for name in layers if "bias" in params[name]}
    )


def channel_units(quantized: QuantizedModel, layer: str) -> Float[Array, " c"]:
    """The step of whole codes of each output channel."""
    unit = affine_of(quantized.qparams[Site(layer)]).scale.reshape(-1)
    channels = quantized.model.params[layer]["kernel"].shape[-1]
    return jnp.broadcast_to(unit, (channels,))


def cut_codes(quantized: QuantizedModel, layer: str, bits: int) -> np.ndarray:
    """Codes of a width: those of 8 bits without their lowest bits."""
    return without_lowest_bits(quantized.codes(layer), bits)
