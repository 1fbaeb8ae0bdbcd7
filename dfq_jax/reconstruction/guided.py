"""Many blocks at once: each is drawn to what it puts out in the float network.

Block after block, every one of them is compiled, and none knows what those behind it make of its
errors. Here one program trains all blocks of a unit: they run as they will be deployed, and their
gaps, each in units of its variance over all images, add up to the loss. A block then learns from
its own gap and from those of all that follow in the unit.

Romero et al. 2015, "FitNets: Hints for Thin Deep Nets" (hints from within the teacher).
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dfq_jax.graph.cuts import blocks
from dfq_jax.graph.evaluate import Hook, Tensor, apply_tiled, evaluate
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.optim.chunk_data import Fed
from dfq_jax.optim.steps import Now
from dfq_jax.quantization.plan import Plan
from dfq_jax.quantization.second_moments import pieces
from dfq_jax.reconstruction.batches import read_rows
from dfq_jax.reconstruction.method import Phase, Reconstruction
from dfq_jax.reconstruction.objective import DrawnShare, Losses, UnitContext, blended, training_hook
from dfq_jax.reconstruction.unit_at_work import BATCH
from dfq_jax.reconstruction.units import Host
from dfq_jax.values import Bound, bound

CHUNK = 10
"""Steps between two visits of the host: they are long."""
SMALLEST = 1e-12
"""Least variance that is divided by."""


def guides(graph: Graph) -> tuple[str, ...]:
    """What every block puts out, in order; then what the unit does, if that is more."""
    ends = [block.graph.outputs[0] for block in blocks(graph)]
    return tuple(dict.fromkeys([*ends, *graph.outputs]))


def variances(reference: Model, images: Host) -> dict[str, Float[Array, ""]]:
    """Of what every block puts out for all images, mean over channels: the units of its gap.

    A few images a step may be nearly flat; in units of their own variance they would count most.
    """
    names, count = guides(reference.graph), len(images)
    sums = [moments(reference, names, x) for x in pieces(images, BATCH)]
    first, second = (jax.tree.map(lambda *v: sum(v) / count, *m) for m in zip(*sums, strict=True))
    spread = lambda mean, power: jnp.maximum(jnp.mean(power - mean**2), SMALLEST)
    return jax.tree.map(spread, first, second)


@partial(jax.jit, static_argnames="names")
def moments(
    reference: Model, names: tuple[str, ...], images: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums over a batch of the mean and the mean square of every channel of these tensors."""
    _, found = evaluate(reference, images, taps=names, apply=apply_tiled)
    of = lambda v: jnp.sum(jnp.mean(v, tuple(range(1, v.ndim - 1))), 0)
    return {n: of(v) for n, v in found.items()}, {n: of(v**2) for n, v in found.items()}


def gaps(
    graph: Graph,
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    units: Mapping[str, Float[Array, ""]],
) -> dict[str, Float[Array, ""]]:
    """The mean gap of what is inside, and that of what the unit puts out.

    A gap is the mean squared distance, in these units.
    """
    gap = lambda name: jnp.mean((found[name] - wanted[name]) ** 2) / units[name]
    one = lambda names: jnp.mean(jnp.stack([gap(name) for name in names]))
    inside = [name for name in wanted if name not in graph.outputs]
    ends = [name for name in wanted if name in graph.outputs]
    return ({"blocks": one(inside)} if inside else {}) | {"reconstruction": one(ends)}


def guided_objective_of(plan: Plan, method: Reconstruction, phase: Phase) -> Bound[Losses]:
    """The objective of a phase of a method that is guided."""
    return bound(guided_loss, plan, method, phase)


def guided_loss(
    plan: Plan, method: Reconstruction, phase: Phase, x: PyTree, context: Fed, now: Now
) -> Losses:
    """The gaps of all blocks of a unit."""
    given: UnitContext = context.context
    rows = read_rows(given.rows, context.at(now.step))
    input_key, edge_key = jax.random.split(now.key)
    shown = blended(input_key, rows.rough, rows.exact, phase.rough)
    hook = training_hook(plan, method.rounding, phase, x, given, DrawnShare(edge_key))
    parts = guided(given, rows.exact, shown, hook)
    return sum(parts.values(), jnp.zeros(())), (parts, ())


def guided(
    given: UnitContext, exact: Tensor, shown: Tensor, hook: Hook
) -> dict[str, Float[Array, ""]]:
    """The parts of the loss on one batch, of what each of the two reads.

    Raises:
      ValueError: without a float unit.
    """
    if given.guide is None:
        raise ValueError("guided() needs the float unit: Given.guide is missing.")
    names = guides(given.model.graph)
    _, wanted = evaluate(given.guide.model, exact, taps=names, apply=apply_tiled)
    _, found = evaluate(given.model, shown, taps=names, hook=hook, apply=apply_tiled)
    return gaps(given.model.graph, found, wanted, given.guide.units)
