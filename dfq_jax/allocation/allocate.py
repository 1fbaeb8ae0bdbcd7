"""Bits for every layer: the least predicted damage within a budget, exactly."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dfq_jax.allocation.choices import Space
from dfq_jax.allocation.costs import Budget, BudgetUnit, bits_of, cost, per_unit, work_of
from dfq_jax.errors import BudgetError, ResourceError
from dfq_jax.graph.graph import Model
from dfq_jax.numerics.knapsack import (
    SECONDS,
    Knapsack,
    Picks,
    SharedCost,
    best_choice,
    lost,
    proven_front,
    spending,
    spent,
)
from dfq_jax.quantization.plan import Rule

POINTS = 16
"""Budgets at which a front is sought."""

LossTable = Float[np.ndarray, "choices bits"]


class Allocation(NamedTuple):
    """Bits for everything that can be chosen.

    Attributes:
      bits: of each choice of the space.
      cost: what it takes, pinned layers included.
      loss: the predicted divergence from the float network, in nats.
      rules: give these bits to `plan.resolve`.
    """

    bits: tuple[int, ...]
    cost: Budget
    loss: float
    rules: tuple[Rule, ...]


def allocate(model: Model, space: Space, losses: LossTable, budget: Budget) -> Allocation:
    """The bits of least predicted loss within a budget, proven by mixed-integer programming.

    Args:
      model: folded network.
      space: what can be chosen.
      losses: predicted loss of every candidate; losses of several choices add up.
      budget: what all layers together may take, pinned ones included.

    Returns:
      The optimum. Of equal ones the cheapest, then the one with more bits in early layers.

    Raises:
      BudgetError: if no choice keeps to the budget; names the smallest that one does.
      ResourceError: if there is no proven optimum within a minute.
    """
    limit = limit_of(model, space, budget)
    return within(model, space, problem_of(model, space, losses, budget.unit), limit, budget.unit)


def limit_of(model: Model, space: Space, budget: Budget) -> int:
    """A budget in whole units, before anything is known of losses.

    Args:
      model: folded network.
      space: what can be chosen.
      budget: what all layers together may take, pinned ones included.

    Raises:
      BudgetError: if no choice keeps to the budget; names the smallest that one does.
    """
    nothing = np.zeros((len(space.choices), len(space.bits)), np.float32)
    whole = per_unit(work_of(model, space.rest), budget.unit)
    limit = math.floor(budget.amount * whole + 1e-6)
    least = spending(problem_of(model, space, nothing, budget.unit))[0]
    if limit < least:
        smallest = Budget(least / whole, budget.unit)
        raise BudgetError(
            f"budget {budget} is out of reach: with {space.bits[0]} bits wherever there is a "
            f"choice, and pinned layers counted, the network takes {smallest}; allow that much, "
            "or pin fewer layers with another preset."
        )
    return limit


def pareto(
    model: Model, space: Space, losses: LossTable, unit: BudgetUnit, points: int = POINTS
) -> tuple[Allocation, ...]:
    """The front of predicted loss against cost.

    Args:
      model: folded network.
      space: what can be chosen.
      losses: predicted loss of every candidate.
      unit: of the cost.
      points: how many budgets to try, evenly between the least and the most one can spend.

    Returns:
      Optimal allocations by rising cost and falling loss: every one is a point of the exact front,
      which may have more. A budget for which none is proven within a minute is left out: a front
      is looked at, and no run depends on it.

    Reference:
      Cai et al. 2020, "ZeroQ: A Novel Zero Shot Quantization Framework", section 3.2.
    """
    problem = problem_of(model, space, losses, unit)
    front, _ = proven_front(problem, points)
    return tuple(described(model, space, problem, picks, unit) for picks in front)


def within(
    model: Model, space: Space, problem: Knapsack, limit: int, unit: BudgetUnit
) -> Allocation:
    """The best allocation that costs at most `limit` whole units."""
    try:
        picks = best_choice(problem, limit)
    except TimeoutError:
        raise ResourceError(
            f"no proven best choice of bits for {len(space.choices)} kernels and tensors within "
            f"{SECONDS:.0f} s: offer fewer candidates than {space.bits}, or another budget."
        ) from None
    return described(model, space, problem, picks, unit)


def priced(
    model: Model, space: Space, losses: LossTable, bits: Sequence[int], unit: BudgetUnit
) -> Allocation:
    """What given bits cost, and what they are predicted to lose.

    Args:
      model: folded network.
      space: what can be chosen.
      losses: predicted loss of every candidate.
      bits: of each choice, each one of the candidates.
      unit: of the cost.

    Returns:
      These bits as an allocation.
    """
    problem = problem_of(model, space, losses, unit)
    return described(model, space, problem, np.array([space.bits.index(b) for b in bits]), unit)


def described(
    model: Model, space: Space, problem: Knapsack, picks: Picks, unit: BudgetUnit
) -> Allocation:
    """An answer to a knapsack in terms of the network."""
    amount = spent(problem, picks) / per_unit(work_of(model, space.rest), unit)
    bits = tuple(space.bits[pick] for pick in picks)
    return Allocation(bits, Budget(amount, unit), lost(problem, picks), space.rules_for(bits))


def problem_of(model: Model, space: Space, losses: LossTable, unit: BudgetUnit) -> Knapsack:
    """The knapsack of a network: pinned layers are a fixed cost, two free operands a pair.

    What is no choice has the bits it has in the end, which are those of `space.rest`.

    Args:
      model: folded network.
      space: what can be chosen.
      losses: predicted loss of every candidate.
      unit: of costs.

    Returns:
      The problem in whole units.
    """
    levels, owners, store = len(space.bits), space.owners, space.rest.store
    costs = np.zeros((len(space.choices), levels), np.int64)
    fixed, pairs = 0, []
    for work in work_of(model, space.rest):
        counted = work.operands if unit == "bops" else work.operands[:1]
        first, second = (owners.get(s) if s in counted else None for s in work.operands)
        ours, theirs = (
            space.bits if chosen is not None else (bits_of(space.rest, site),) * levels
            for chosen, site in zip((first, second), work.operands, strict=True)
        )
        table = np.array([[cost(work, a, b, unit, store) for b in theirs] for a in ours], np.int64)
        match first, second:
            case None, None:
                fixed += int(table[0, 0])
            case int(), int() if first != second:
                pairs.append(SharedCost((first, second), table))
            case int(), int():
                costs[first] += np.diagonal(table)
            case int(), None:
                costs[first] += table[:, 0]
            case None, int():
                costs[second] += table[0]
    return Knapsack(losses, costs, tuple(pairs), fixed)
