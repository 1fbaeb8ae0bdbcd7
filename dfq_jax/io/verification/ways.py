"""The ways in which JAX runs a quantized network, to be compared with what runs its file."""

from typing import Literal

from jaxtyping import Array, Shaped

from dfq_jax.graph.evaluate import Tensor
from dfq_jax.quantization.node_by_node import in_integers, rounding_kernels, simulating
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.sums import overflowing

Way = Literal["plain", "simulator", "integer"]
WAYS: tuple[Way, ...] = ("plain", "simulator", "integer")
"""Activations not rounded; all simulated in floats; all computed in integers."""


def outputs(
    quantized: QuantizedModel, images: Shaped[Array, "n ..."], *, way: Way
) -> tuple[Tensor, ...]:
    """Every output of the quantized network once, computed in one of `WAYS`."""
    ways = {"plain": rounding_kernels, "simulator": simulating, "integer": in_integers}
    names = tuple(dict.fromkeys(quantized.model.graph.outputs))
    made = {name: y for name, _, y in ways[way](quantized)(images) if name in names}
    return tuple(made[name] for name in names)


def simulated(quantized: QuantizedModel, images: Shaped[Array, "n ..."]) -> Tensor:
    """First output of the simulator."""
    return outputs(quantized, images, way="simulator")[0]


def beyond_integers(quantized: QuantizedModel) -> str | None:
    """Why integers cannot run the network for certain, in words; None if they can."""
    return next((f"{long}." for long in overflowing(quantized)), None)
