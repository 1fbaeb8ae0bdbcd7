"""Many blocks at once: each is drawn to what it puts out in the float network.

Block after block, every one of them is compiled, and none knows what those behind it make of its
errors. Here one program trains all blocks of a unit: they run as they will be deployed, and their
gaps, each in units of its own variance, add up to the loss. A block then learns from its own gap
and from those of all that follow in the unit.

Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", eq. 3 (hints from within the teacher).
"""

from collections.abc import Mapping
from functools import cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.graph.cuts import blocks
from dfq_jax.graph.evaluate import Hook, Tensor, apply_tiled, values_at
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.optim.feed import Fed
from dfq_jax.optim.fit import Now, Objective
from dfq_jax.quantize.feeding import read
from dfq_jax.quantize.learning import (
    Given,
    Phase,
    Reconstruction,
    blended,
    training_hook,
)
from dfq_jax.quantize.plan import Plan

CHUNK = 10
"""Steps between two visits of the host: they are long."""


def guides(graph: Graph) -> tuple[str, ...]:
    """What every block puts out, in order; then what the unit does, if that is more."""
    ends = [block.graph.outputs[0] for block in blocks(graph)]
    return tuple(dict.fromkeys([*ends, *graph.outputs]))


def gap(found: Float[Array, "n ... c"], wanted: Float[Array, "n ... c"]) -> Float[Array, ""]:
    """Mean squared distance in units of the variance of what is wanted, by channel."""
    axes = tuple(range(wanted.ndim - 1))
    variance = jnp.mean(jnp.var(wanted, axes))
    return jnp.mean((found - wanted) ** 2) / jnp.maximum(variance, 1e-12)


def gaps(
    graph: Graph, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Float[Array, ""]]:
    """The mean gap of what is inside, and that of what the unit puts out."""
    one = lambda names: jnp.mean(jnp.stack([gap(found[name], wanted[name]) for name in names]))
    inside = [name for name in wanted if name not in graph.outputs]
    ends = [name for name in wanted if name in graph.outputs]
    return ({"blocks": one(inside)} if inside else {}) | {"reconstruction": one(ends)}


@cache
def guided_objective_of(plan: Plan, method: Reconstruction, phase: Phase) -> Objective:
    """The objective of a phase of a method that is guided."""

    def objective(x, context: Fed, now: Now):
        given: Given = context.context
        rows = read(given.rows, context.at(now.step))
        input_key, edge_key = jax.random.split(now.key)
        shown = blended(input_key, rows.rough, rows.exact, phase.rough)
        hook = training_hook(plan, method.rounding, phase, x, given, edge_key)
        parts = guided(given.reference or given.model, given.model, rows.exact, shown, hook)
        return sum(parts.values(), jnp.zeros(())), (parts, ())

    return objective


def guided(
    reference: Model, model: Model, exact: Tensor, shown: Tensor, hook: Hook
) -> dict[str, Float[Array, ""]]:
    """The parts of the loss on one batch, of what each of the two reads."""
    names = guides(model.graph)
    wanted = values_at(reference, exact, names, apply=apply_tiled)
    found = values_at(model, shown, names, hook=hook, apply=apply_tiled)
    return gaps(model.graph, found, wanted)
