import itertools
import os

import numpy as np
import pytest
import scipy.optimize

from dfq_jax.numerics.knapsack import Knapsack, SharedCost, best_choice, lost, spending, spent


def drawn(seed, items=5, levels=4, size=1000, shared=False, rounded=False):
    """A random problem with losses of very different sizes; `rounded` makes many of them equal."""
    rng = np.random.default_rng(seed)
    loss = rng.uniform(size=(items, levels)) * 10.0 ** rng.uniform(-4, 0, (items, 1))
    loss = np.sort(np.round(4 * loss) / 4 if rounded else loss, 1)[:, ::-1].copy()
    cost = np.sort(rng.integers(1, size, (items, levels)), 1)
    table = lambda n: np.prod(np.indices((levels,) * n) + 1, 0) * int(rng.integers(1, size))
    chained = [SharedCost((i, i + 1), table(2)) for i in range(0, items - 1, 2)]
    chained.append(SharedCost((0, items - 1, 1), table(3)))
    return Knapsack(loss, cost, tuple(chained) if shared else (), int(rng.integers(50)))


def everything(problem):
    """All choices with their costs and losses, by definition."""
    items, levels = problem.loss.shape
    rows = []
    for picks in itertools.product(range(levels), repeat=items):
        cost = problem.fixed + sum(problem.cost[i, p] for i, p in enumerate(picks))
        cost += sum(x.cost[tuple(picks[i] for i in x.items)] for x in problem.shared)
        rows.append((picks, int(cost), sum(problem.loss[i, p] for i, p in enumerate(picks))))
    return rows


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [10, 10**4, 10**9])
def test_equals_brute_force(size, shared, rounded):
    for seed in range(3):
        problem = drawn(seed, size=size, shared=shared, rounded=rounded)
        rows = everything(problem)
        costs = sorted(cost for _, cost, _ in rows)
        for limit in (costs[0], costs[len(costs) // 3], costs[-1]):
            least = min(loss for _, cost, loss in rows if cost <= limit)
            equal = [r for r in rows if r[1] <= limit and r[2] <= least + 1e-9]
            cheapest = min(cost for _, cost, _ in equal)
            picks = best_choice(problem, limit)
            assert (spent(problem, picks), lost(problem, picks)) in [
                (cost, pytest.approx(loss)) for _, cost, loss in equal if cost == cheapest
            ]
            assert spending(problem) == (costs[0], costs[-1])


def test_costs_that_floats_hardly_tell_apart():
    cost = np.array([[0, 10**12], [0, 10**12 + 1]])
    problem = Knapsack(np.array([[1.0, 0.0], [1.0, 0.1]]), cost)
    assert best_choice(problem, 10**12).tolist() == [1, 0]
    assert best_choice(problem, 2 * 10**12).tolist() == [1, 0]
    assert best_choice(problem, 2 * 10**12 + 1).tolist() == [1, 1]


def test_ties_favour_low_cost_then_high_levels_then_early_items():
    loss = np.array([[1.0, 0.0, 0.0]] * 3)
    cost = np.array([[0, 5, 9]] * 3)
    assert best_choice(Knapsack(loss, cost), 100).tolist() == [1, 1, 1]
    assert best_choice(Knapsack(loss, cost), 10).tolist() == [1, 1, 0]
    level = Knapsack(loss, np.array([[0, 5, 5]] * 3))
    assert best_choice(level, 5).tolist() == [2, 0, 0]


def test_same_problem_same_answer():
    problem = drawn(4, items=8, rounded=True, shared=True)
    limit = sum(spending(problem)) // 2
    first = best_choice(problem, limit)
    assert all(best_choice(problem, limit).tolist() == first.tolist() for _ in range(3))


def test_an_answer_that_costs_too_much_is_excluded(monkeypatch):
    problem = Knapsack(np.array([[3.0, 0.0], [2.0, 0.0]]), np.array([[0, 4], [0, 4]]))
    honest, calls = scipy.optimize.milp, []

    def lenient(*args, **kwargs):
        """As if a tolerance let everything through at first."""
        calls.append(len(kwargs["constraints"]))
        if len(calls) == 1:
            kwargs["constraints"] = kwargs["constraints"][:1]
        return honest(*args, **kwargs)

    monkeypatch.setattr(scipy.optimize, "milp", lenient)
    assert best_choice(problem, 7).tolist() == [1, 0]
    assert calls[:2] == [2, 3]


def test_what_the_solver_prints_is_not_heard(monkeypatch, capfd):
    """It would stand before the object of a `--json` run."""
    honest = scipy.optimize.milp

    def loud(*args, **kwargs):
        os.write(1, b"HighsMipSolverData::something")
        return honest(*args, **kwargs)

    monkeypatch.setattr(scipy.optimize, "milp", loud)
    problem = Knapsack(np.array([[3.0, 0.0], [2.0, 0.0]]), np.array([[0, 4], [0, 4]]))
    assert best_choice(problem, 7).tolist() == [1, 0]
    print("heard")
    assert capfd.readouterr().out == "heard\n"


def test_refusals():
    problem = drawn(0, items=12, levels=6, shared=True)
    least, most = spending(problem)
    with pytest.raises(ValueError, match=f"no less than {least}, got the limit {least - 1}"):
        best_choice(problem, least - 1)
    with pytest.raises(TimeoutError, match="no proven optimum within 0 s"):
        best_choice(problem, (least + most) // 2, seconds=0.0)
