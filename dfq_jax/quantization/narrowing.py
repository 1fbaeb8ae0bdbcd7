"""Where images show more than statistics predict: which of the two ends a grid should have.

A grid of 8 bits covers both (`quantization.calibrate`). A few outliers of a sum can make it four
times as wide as predicted, and everything else then has a quarter of the codes. Which is worse,
clipping the outliers or rounding the rest, is asked of the network's outputs, tensor by tensor.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from dfq_jax.graph.evaluate import Tensor, evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.numerics.affine import Affine, from_range
from dfq_jax.numerics.levels import scales_of
from dfq_jax.quantization.calibrate import Ranges
from dfq_jax.quantization.node_by_node import (
    NodeWalk,
    in_float,
    outputs_of,
    rounding_activations,
    simulating,
)
from dfq_jax.quantization.plan import Plan
from dfq_jax.quantization.simulate import QParams, QuantizedModel, argument_hook

CONTESTED = 1.25
"""How many times as wide as predicted a grid must be to be asked about."""
IMAGES = 16
"""How many images are asked."""


def with_narrowed_ranges(
    quantized: QuantizedModel, expected: Ranges, images: Shaped[Array, "n ..."]
) -> QuantizedModel:
    """The network with 8-bit grids of activations narrowed to what is predicted, where that pays.

    All begin as predicted; one tensor after the other, the most contested first, becomes as wide
    as images ask for if the outputs gain. Kernels are in float meanwhile.

    Args:
      quantized: calibrated on images, its grids as wide as both say.
      expected: ranges that statistics predict.
      images: normalised; the first `IMAGES` are used.

    Returns:
      The network with the grids under which its outputs are nearest to the float ones.
    """
    plan, qparams = quantized.plan, dict(quantized.qparams)
    rivals = contested(plan, qparams, expected)
    if not rivals:
        return quantized
    shown = images[:IMAGES]
    wanted = float_outputs(quantized.model, shown)
    gap = lambda tried: float(squared_gap(quantized.model, plan, tried, shown, wanted))
    sites = {tensor: group for tensor, group in plan.groups if tensor in rivals}
    narrow = {site: rivals[tensor][1] for tensor in sites for site in sites[tensor]}
    chosen, wide = qparams | narrow, qparams
    least = gap(chosen)
    for tensor in sorted(sites, key=lambda tensor: -rivals[tensor][0]):
        tried = chosen | {site: wide[site] for site in sites[tensor]}
        if (found := gap(tried)) < least:
            chosen, least = tried, found
    return QuantizedModel(quantized.model, plan, chosen if least < gap(wide) else wide)


def contested(plan: Plan, qparams: QParams, expected: Ranges) -> dict[str, tuple[float, Affine]]:
    """{tensor: (how many times too wide its grid is, the grid predicted)}."""
    table, found = plan.table, {}
    for tensor, sites in plan.groups:
        grid = table[sites[0]].grid
        if tensor not in expected or grid.bits != 8:
            continue
        predicted = from_range(*expected[tensor], grid)
        ratio = float(scales_of(qparams[sites[0]]) / predicted.scale)
        if ratio > CONTESTED:
            found[tensor] = ratio, predicted
    return found


@jax.jit
def float_outputs(model: Model, images: Tensor) -> tuple[Tensor, ...]:
    """All outputs of the float network."""
    return evaluate(model, images)[0]


@partial(jax.jit, static_argnames="plan")
def squared_gap(
    model: Model, plan: Plan, qparams: QParams, images: Tensor, wanted: tuple[Tensor, ...]
) -> Float[Array, ""]:
    """Squared error of the outputs, each in units of its own power, with activations on grids."""
    return gap_of(evaluate(model, images, hook=argument_hook(plan, qparams))[0], wanted)


def output_gap(
    quantized: QuantizedModel, reference: Model, images: Shaped[Array, "n ..."]
) -> float:
    """Squared error of a quantized network's outputs in units of their power, summed over outputs.

    Args:
      quantized: kernels are rounded to nearest.
      reference: the float network.
      images: normalised; the first `IMAGES` are used.
    """
    found = simulating(quantized)
    return gap_between(in_float(reference), found, reference.graph.outputs, images[:IMAGES])


def activation_gap(
    quantized: QuantizedModel, reference: Model, images: Shaped[Array, "n ..."]
) -> float:
    """`output_gap` with kernels as they are: what grids of activations cost by themselves.

    Kernels of few bits drown it, until they have learned.
    """
    found = rounding_activations(quantized)
    return gap_between(in_float(reference), found, reference.graph.outputs, images[:IMAGES])


def gap_between(
    exact: NodeWalk, rough: NodeWalk, outputs: tuple[str, ...], images: Shaped[Array, "n ..."]
) -> float:
    """Squared error of the outputs of one way to run a network, in units of another's power."""
    wanted, found = (outputs_of(run, outputs, images) for run in (exact, rough))
    return float(gap_alone(found, wanted))


def gap_of(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> Float[Array, ""]:
    """Squared error of outputs, each in units of its own power; no square is beyond float32."""
    largest = lambda x: jnp.maximum(jnp.max(jnp.abs(x)), 1e-15)
    units = [(f / largest(w), w / largest(w)) for f, w in zip(found, wanted, strict=True)]
    power = lambda x: jnp.maximum(jnp.mean(x**2), 1e-30)
    gaps = [jnp.mean((f - w) ** 2) / power(w) for f, w in units]
    return jnp.sum(jnp.stack(gaps))


gap_alone = jax.jit(gap_of)
