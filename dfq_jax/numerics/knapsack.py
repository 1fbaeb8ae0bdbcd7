"""The multiple-choice knapsack: one level for each item, least loss, a limit on whole-number costs.

Costs may couple several items, as bit operations couple the bits of weights and activations, and
bytes those of a kernel with the channels it reads and makes. The product of such choices is linear
in one variable for each combination of levels, so a mixed-integer linear program finds the exact
optimum.
"""

import contextlib
import os
from collections.abc import Iterator
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
    """A cost that several items share.

    Attributes:
      items: two or more, each another one.
      cost: for each combination of their levels, an axis for each item.
    """

    items: tuple[int, ...]
    cost: Int[np.ndarray, "..."]


class Knapsack(NamedTuple):
    """The problem. Levels are in order of cost: nothing gets cheaper with a higher one.

    Attributes:
      loss: what is minimised, summed over items.
      cost: of each level of each item.
      shared: costs of levels together.
      fixed: what is spent whatever is chosen.
    """

    loss: Float[np.ndarray, "items levels"]
    cost: Int[np.ndarray, "items levels"]
    shared: tuple[SharedCost, ...] = ()
    fixed: int = 0


def spent(problem: Knapsack, picks: Picks) -> int:
    """The exact cost of a choice."""
    single = int(np.sum(problem.cost[np.arange(len(picks)), picks], dtype=np.int64))
    shared = sum(int(x.cost[tuple(picks[list(x.items)])]) for x in problem.shared)
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


def proven_front(problem: Knapsack, points: int) -> tuple[tuple[Picks, ...], tuple[int, ...]]:
    """The best choices for limits evenly between the least and the most that can be spent.

    Args:
      problem: items, losses and costs.
      points: how many limits.

    Returns:
      Choices by rising cost and falling loss, and the limits for which none was proven in time:
      these are left out, since a front is looked at and nothing depends on it.
    """
    least, most = spending(problem)
    limits = (least + (most - least) * at // max(points - 1, 1) for at in range(points))
    found, missed = list[Picks](), list[int]()
    for limit in dict.fromkeys(limits):
        try:
            picks = best_choice(problem, limit)
        except TimeoutError:
            missed.append(limit)
            continue
        if not found or lost(problem, picks) < lost(problem, found[-1]):
            found.append(picks)
    return tuple(found), tuple(missed)


def loss_row(problem: Knapsack) -> Row:
    """The loss of each variable: first items by levels, then what is shared by
    levels of all."""
    return np.concatenate([problem.loss.ravel(), *(np.zeros(p.cost.size) for p in problem.shared)])


def cost_unit(problem: Knapsack) -> int:
    """The largest number that divides all costs."""
    parts = [problem.cost.ravel(), *(p.cost.ravel() for p in problem.shared)]
    return max(int(np.gcd.reduce(np.concatenate(parts))), 1)


def cost_row(problem: Knapsack) -> Row:
    """The cost of each variable, in units of what divides them all."""
    parts = [problem.cost.ravel(), *(p.cost.ravel() for p in problem.shared)]
    return np.concatenate(parts) / cost_unit(problem)


def preference(problem: Knapsack) -> Row:
    """A bonus for high levels of early items; all of them together are worth less than 1."""
    items, levels = problem.loss.shape
    rank = np.arange(items, 0, -1)[:, None] * np.arange(levels)
    bonus = 0.5 * rank / max(int(rank[:, -1].sum()), 1)
    return np.concatenate([bonus.ravel(), *(np.zeros(p.cost.size) for p in problem.shared)])


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
    equal, shares = structure(problem), sum(len(x.items) for x in problem.shared)
    right = (np.arange(items + levels * shares) < items).astype(float)
    whole = np.concatenate([np.ones(items * levels), np.zeros(len(objective) - items * levels)])
    rules = [bounded(equal, right, right)]
    rules += [upper(row, bound) for row, bound in limits]
    while True:
        with unheard():
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


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Keeps standard output clean: HiGHS writes lines of its own there now and then."""
    try:
        saved = os.dup(1)
    except OSError:  # closed, so that nothing is heard anyway
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(nowhere)
        os.close(saved)


def upper(row: Row, bound: float) -> scipy.optimize.LinearConstraint:
    """`row . x <= bound`, scaled so that tolerances mean the same for every row."""
    factor = SPAN / max(np.max(np.abs(row)), 1e-300)
    return bounded((row * factor)[None], -np.inf, bound * factor)


def bounded(rows: Any, low: Any, high: Any) -> scipy.optimize.LinearConstraint:
    """`low <= rows . x <= high`; SciPy's stubs know of scalar bounds only."""
    return scipy.optimize.LinearConstraint(rows, low, high)


def structure(problem: Knapsack) -> scipy.sparse.csr_array:
    """Rows of equalities: one level an item; what is shared sums to the variables of each item."""
    items, levels = problem.loss.shape
    start = items * levels
    width = start + sum(x.cost.size for x in problem.shared)
    single = np.repeat(np.eye(items), levels, axis=1)
    rows = [scipy.sparse.csr_array(np.pad(single, ((0, 0), (0, width - start))))]
    for x in problem.shared:
        places = np.indices(x.cost.shape).reshape(len(x.items), -1)
        columns = start + np.arange(x.cost.size)
        for item, at in zip(x.items, places, strict=True):
            own = item * levels + np.arange(levels)
            row = np.concatenate([at, np.arange(levels)])
            sign = np.concatenate([np.ones(x.cost.size), -np.ones(levels)])
            where = (row, np.concatenate([columns, own]))
            rows.append(scipy.sparse.csr_array((sign, where), shape=(levels, width)))
        start += x.cost.size
    return scipy.sparse.csr_array(scipy.sparse.vstack(rows))
