"""The ways in which JAX runs a quantized network, to be compared with what runs its file."""

from functools import partial
from typing import Literal

import jax
from jaxtyping import Array, Float

from dfq_jax.graph.evaluate import Tensor, apply_node, evaluate
from dfq_jax.quantization.integer import integer_node
from dfq_jax.quantization.simulate import (
    QuantizedModel,
    argument_hook,
    simulate,
    simulation_hook,
    weight_hook,
)
from dfq_jax.quantization.sums import overflowing

simulated = jax.jit(simulate)

Way = Literal["plain", "simulator", "integer"]
WAYS: tuple[Way, ...] = ("plain", "simulator", "integer")
"""Activations not rounded; all simulated in floats; all computed in integers."""


@partial(jax.jit, static_argnames="way")
def outputs(
    quantized: QuantizedModel, images: Float[Array, "n h w c"], *, way: Way
) -> tuple[Tensor, ...]:
    """Every output of the quantized network once, computed in one of `WAYS`."""
    plan, qparams = quantized.plan, quantized.qparams
    hooks = {"plain": weight_hook, "simulator": simulation_hook, "integer": argument_hook}
    apply = partial(integer_node, quantized) if way == "integer" else apply_node
    found = evaluate(quantized.model, images, hook=hooks[way](plan, qparams), apply=apply)[0]
    return tuple(dict(zip(quantized.model.graph.outputs, found, strict=True)).values())


def beyond_integers(quantized: QuantizedModel) -> str | None:
    """Why integers cannot run the network for certain, in words; None if they can."""
    return next((f"{long}." for long in overflowing(quantized)), None)
