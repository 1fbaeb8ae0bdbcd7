"""Mixed precision without data: bits where the network feels them, within a budget.

ZeroQ (Cai et al. 2020, section 3.2) measures how each layer's bits move the outputs on synthetic
images and reads the best allocation off a Pareto front; HAWQ-V3 (Yao et al. 2021) solves an integer
program instead, which is what happens here. The allocation is a tuple of rules, so everything after
`quantization.plan.resolve` stays as it is.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

from jaxtyping import Array, Key, Shaped

from dfq_jax.allocation.allocate import (
    POINTS,
    Allocation,
    LossTable,
    allocate,
    limit_of,
    pareto,
    priced,
)
from dfq_jax.allocation.choices import BITS, Space, space_of
from dfq_jax.allocation.costs import BudgetUnit
from dfq_jax.allocation.sensitivity import sensitivities
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.tasks import Task
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.passes.thrifty_ranges import thrifty_ranges
from dfq_jax.quantization.observers import DEFAULT_OBSERVERS
from dfq_jax.quantization.plan import WIDE, Rule, stored_as
from dfq_jax.recipes.pipeline import Pipeline


class Mixed(NamedTuple):
    """Bits for every layer, and what they were chosen from.

    Attributes:
      rules: give these to `plan.resolve` with the same scheme and preset.
      chosen: the allocation within the budget.
      uniform: the scheme's own bits everywhere.
      front: the best allocations for other budgets, by rising cost.
      space: what could be chosen.
      losses: the predicted loss of each choice at each candidate, in nats.
    """

    rules: tuple[Rule, ...]
    chosen: Allocation
    uniform: Allocation
    front: tuple[Allocation, ...]
    space: Space
    losses: LossTable


def mixed(
    reference: Model,
    images: Shaped[Array, "n ..."],
    how: Pipeline,
    *,
    points: int = POINTS,
    task: Task | None = None,
    key: Key[Array, ""],
    watch: Watcher = SILENT,
) -> Mixed:
    """Chooses bits for the kernels of a network; under a budget of bit operations, for tensors too.

    Args:
      reference: folded float network, in which the rules will be used. Where bias correction is
        going to add biases, a budget of bytes needs those of `costs.with_biases_of` to count them.
      images: normalised synthetic images; 32 to 256 do.
      how: how it is quantized. Its scheme is what a uniform network would have, and holds for
        activations wherever tensors are not chosen; pinned layers and rules stay as they are, and
        count into the budget, None for as many bits a weight as the scheme takes.
      points: budgets tried for the front.
      task: what the network is for; None for what its graph says.
      key: for sensitivities that draw.
      watch: told what is being done.

    Returns:
      The rules with what they were chosen from. The predicted loss is never above that of the
      uniform network where the budget allows that one.

    Raises:
      PlanError: if nothing is left to choose, or a rule or the images do not fit the network.
      BudgetError: if the budget is out of reach.
      ResourceError: if a best allocation cannot be proven within a minute.
    """
    budget, scheme, sensitivity = how.budget, how.scheme, how.sensitivity
    unit = "bits" if budget is None else budget.unit
    space = offered(reference.graph, how, unit)
    if budget is not None:
        limit_of(reference, space, budget)  # refused before minutes are spent
    watch.says(
        f"predicting what bits cost {len(space.choices)} kernels and tensors ({sensitivity})"
    )
    measure = partial(
        sensitivities, expected=thrifty_ranges(reference), widen=how.observers is None
    )
    losses = measure(reference, space, images, method=sensitivity, key=key, task=task)
    edges = scheme.activation_bits or WIDE
    same = [scheme.weight_bits if c.weight else edges for c in space.choices]
    uniform = priced(reference, space, losses, same, unit)
    watch.says("allocating bits")
    chosen = allocate(reference, space, losses, uniform.cost if budget is None else budget)
    front = pareto(reference, space, losses, unit, points)
    return Mixed(chosen.rules, chosen, uniform, front, space, losses)


def offered(graph: Graph, how: Pipeline, unit: BudgetUnit) -> Space:
    """What can be chosen under a budget of some unit, the scheme's own bits among the candidates.

    Args:
      graph: of the folded network.
      how: how it is quantized.
      unit: of the budget.
    """
    scheme = how.scheme
    scheme_bits = (scheme.weight_bits, scheme.activation_bits)
    candidates = (*BITS, *(b for b in scheme_bits if b is not None and b < WIDE))
    space = space_of(
        graph,
        how.layers,
        how.rules,
        scheme=scheme,
        tensors=unit == "bops" and scheme.activation_bits is not None,
        bits=candidates,
        observers=how.observers or DEFAULT_OBSERVERS,
    )
    return dataclasses.replace(space, rest=stored_as(space.rest, how.store))
