"""The multiple-choice knapsack: one level for each item, least loss, a limit on whole-number costs.

Costs may couple pairs of items, as bit operations couple the bits of weights and activations. The
product of two choices is linear in one variable for each pair of levels, so a mixed-integer linear
program finds the exact optimum.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse
from jaxtyping import Float, Int

SECONDS = 60.0
"""Time limit of one linear program."""
EQUAL = 1e-9
"""Losses that differ by less than this share of the largest entry count as equal."""
SPAN = 1e5
"""Largest number of a program's objective and rows: far above HiGHS's absolute tolerances."""
OUT_OF_TIME = 1
"""The status of a program that was stopped."""

Picks = Int[np.ndarray, " items"]
Row = Float[np.ndarray, " variables"]


class SharedCost(NamedTuple):
    """A cost that two items share.

    Attributes:
      first: an item.
      second: another one.
      cost: for each level of the first and each of the second.
    """

    first: int
    second: int
    cost: Int[np.ndarray, "levels levels"]


class Knapsack(NamedTuple):
    """The problem. Levels are in order of cost: no item or pair gets cheaper with a higher one.

    Attributes:
      loss: what is minimised, summed over items.
      cost: of each level of each item.
      pairs: costs of two levels together.
      fixed: what is spent whatever is chosen.
    """

    loss: Float[np.ndarray, "items levels"]
    cost: Int[np.ndarray, "items levels"]
    pairs: tuple[SharedCost, ...] = ()
    fixed: int = 0


def spent(problem: Knapsack, picks: Picks) -> int:
    """The exact cost of a choice."""
    single = int(np.sum(problem.cost[np.arange(len(picks)), picks], dtype=np.int64))
    shared = sum(int(p.cost[picks[p.first], picks[p.second]]) for p in problem.pairs)
    return problem.fixed + single + shared


def lost(problem: Knapsack, picks: Picks) -> float:
    """The loss of a choice."""
    return float(np.sum(problem.loss[np.arange(len(picks)), picks]))


def spending(problem: Knapsack) -> tuple[int, int]:
    """The least and the most that can be spent."""
    items, levels = problem.loss.shape
    return spent(problem, np.zeros(items, int)), spent(problem, np.full(items, levels - 1))


def best_choice(problem: Knapsack, limit: int, *, seconds: float = SECONDS) -> Picks:
    """The choice of least loss within a limit.

    Equal losses (within `EQUAL`) are decided by lower cost, and equal costs by higher levels, those
    of earlier items first; the same problem always has the same answer.

    Args:
      problem: items, losses and costs.
      limit: what may be spent.
      seconds: time limit of each of the two programs that are solved.

    Returns:
      The level of each item.

    Raises:
      ValueError: if the limit is below the least that can be spent.
      TimeoutError: if a program takes longer.

    Reference:
      Yao et al. 2021, "HAWQ-V3: Dyadic Neural Network Quantization" (the integer linear
      program); products of binary variables as in McCormick 1976.
    """
    least = spending(problem)[0]
    if limit < least:
        raise ValueError(f"best() can spend no less than {least}, got the limit {limit}.")
    losses, costs, unit = loss_row(problem), cost_row(problem), cost_unit(problem)
    room = [(costs, (limit - problem.fixed) // unit + 0.5)]
    first = solved(problem, losses, room, limit, seconds)
    bound = lost(problem, first) + EQUAL * float(np.max(problem.loss))
    cheaper = solved(
        problem,
        costs - preference(problem),
        [*room, (losses, bound)],
        spent(problem, first),
        seconds,
    )
    return cheaper if lost(problem, cheaper) <= bound else first


def loss_row(problem: Knapsack) -> Row:
    """The loss of each variable: first items by levels, then pairs by levels of both."""
    return np.concatenate([problem.loss.ravel(), *(np.zeros(p.cost.size) for p in problem.pairs)])


def cost_unit(problem: Knapsack) -> int:
    """The largest number that divides all costs."""
    parts = [problem.cost.ravel(), *(p.cost.ravel() for p in problem.pairs)]
    return max(int(np.gcd.reduce(np.concatenate(parts))), 1)


def cost_row(problem: Knapsack) -> Row:
    """The cost of each variable, in units of what divides them all."""
    parts = [problem.cost.ravel(), *(p.cost.ravel() for p in problem.pairs)]
    return np.concatenate(parts) / cost_unit(problem)


def preference(problem: Knapsack) -> Row:
    """A bonus for high levels of early items; all of them together are worth less than 1."""
    items, levels = problem.loss.shape
    rank = np.arange(items, 0, -1)[:, None] * np.arange(levels)
    bonus = 0.5 * rank / max(int(rank[:, -1].sum()), 1)
    return np.concatenate([bonus.ravel(), *(np.zeros(p.cost.size) for p in problem.pairs)])


def solved(
    problem: Knapsack,
    objective: Row,
    limits: list[tuple[Row, float]],
    limit: int,
    seconds: float,
) -> Picks:
    """The choice of least objective under upper bounds on rows, exact in its cost.

    HiGHS knows numbers to a tolerance: a choice found to cost too much is excluded, and the rest
    searched again.
    """
    items, levels = problem.loss.shape
    equal = structure(problem)
    right = (np.arange(items + 2 * levels * len(problem.pairs)) < items).astype(float)
    whole = np.concatenate([np.ones(items * levels), np.zeros(len(objective) - items * levels)])
    rules = [bounded(equal, right, right)]
    rules += [upper(row, bound) for row, bound in limits]
    while True:
        found = scipy.optimize.milp(
            objective * (SPAN / max(np.max(np.abs(objective)), 1e-300)),
            integrality=whole,
            bounds=scipy.optimize.Bounds(0, 1),
            constraints=rules,
            options={"time_limit": seconds, "mip_rel_gap": 0.0},
        )
        if found.status == OUT_OF_TIME:
            raise TimeoutError(f"no proven optimum within {seconds:.0f} s.")
        if found.x is None:
            raise ValueError(f"no choice costs {limit} or less ({found.message}).")
        picks = np.argmax(found.x[: items * levels].reshape(items, levels), axis=1)
        if spent(problem, picks) <= limit:
            return picks
        chosen = np.zeros(len(objective))
        chosen[np.arange(items) * levels + picks] = 1
        rules.append(upper(chosen, items - 0.5))


def upper(row: Row, bound: float) -> scipy.optimize.LinearConstraint:
    """`row . x <= bound`, scaled so that tolerances mean the same for every row."""
    factor = SPAN / max(np.max(np.abs(row)), 1e-300)
    return bounded((row * factor)[None], -np.inf, bound * factor)


def bounded(rows: Any, low: Any, high: Any) -> scipy.optimize.LinearConstraint:
    """`low <= rows . x <= high`; SciPy's stubs know of scalar bounds only."""
    return scipy.optimize.LinearConstraint(rows, low, high)


def structure(problem: Knapsack) -> scipy.sparse.csr_array:
    """Rows of equalities: one level an item; a pair's variables sum to those of its two items."""
    items, levels = problem.loss.shape
    single = items * levels
    width = single + len(problem.pairs) * levels * levels
    rows = [np.repeat(np.eye(items), levels, axis=1)]
    for index, pair in enumerate(problem.pairs):
        block = np.eye(levels * levels).reshape(levels, levels, -1)
        for item, table in ((pair.first, block.sum(1)), (pair.second, block.sum(0))):
            row = np.zeros((levels, width))
            start = single + index * levels * levels
            row[:, start : start + levels * levels] = table
            row[np.arange(levels), item * levels + np.arange(levels)] = -1
            rows.append(row)
    rows[0] = np.pad(rows[0], ((0, 0), (0, width - single)))
    return scipy.sparse.csr_array(np.concatenate(rows))
