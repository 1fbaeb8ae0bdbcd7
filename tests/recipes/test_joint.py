"""Bits and channels decided together: bytes as in the file, the choice by brute force."""

import itertools

import jax
import numpy as np
import pytest

from dfq_jax.allocation.costs import cost_of
from dfq_jax.errors import BudgetError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.ops import Add, GlobalAvgPool, Relu
from dfq_jax.numerics.knapsack import Knapsack, best_choice, lost, proven_front, spending, spent
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.select import select
from dfq_jax.pruning.budget import Ceiling, at_levels, ladders_of
from dfq_jax.pruning.choose import ALL_BUT_ONE
from dfq_jax.pruning.criteria import CRITERIA
from dfq_jax.pruning.damage import channel_losses, explained
from dfq_jax.pruning.groups import Subject, removables
from dfq_jax.quantization.plan import resolve
from dfq_jax.recipes.joint import (
    LEVELS,
    MOST_GROUPS,
    at_scheme,
    choices_of,
    costs_of,
    few_enough,
    joint,
    limit_in_bytes,
    unproven,
    within,
)
from dfq_jax.recipes.pipeline import pipeline_for
from dfq_jax.types import InputContract


@pytest.fixture(scope="module")
def chain(nets):
    """Two blocks with a sum; the second reads and makes channels that may go."""
    b = nets.Builder(InputContract(8, 8))
    x = b.unit("stem", "images", 8)
    y = b.unit("mid0", b.unit("in0", x, 12), 16)
    y = b.bn("out0.bn", b.conv("out0", y, 8))
    x = b.op("relu0", Relu(), b.op("sum0", Add(), y, x))
    return b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), x), 5))


@pytest.fixture(scope="module")
def seen(chain, nets):
    return Subject(chain, nets.images(chain, 32))


@pytest.fixture(scope="module")
def choices(seen):
    groups, notes = few_enough(seen, removables(seen).groups)
    assert not notes
    scores = CRITERIA["energy"].score(seen)
    return choices_of(seen.folded, seen, groups, scores, pipeline_for(seen.model), ALL_BUT_ONE)


def test_bytes_are_those_of_the_smaller_network(choices, seen):
    """Of kernels too small to be packed, at several widths and bits."""
    costs, rng = costs_of(choices), np.random.default_rng(0)
    assert {len(x.items) for x in costs.shared} == {2, 3}
    groups, how = len(choices.ladders), pipeline_for(seen.model)
    for _ in range(4):
        picks = rng.integers(0, LEVELS, len(costs.loss))
        kept = at_levels(choices.ladders, picks[:groups], len(seen.coupled))
        small = fold_batch_norm(select(seen.model, seen.coupled, kept))
        rules = choices.space.rules_for([choices.bits[p] for p in picks[groups:]])
        plan = resolve(small.graph, how.scheme, how.layers, rules)
        exact = cost_of(small, plan, "bytes").amount
        assert exact <= spent(costs, picks) <= exact + 1024 * len(choices.space.choices)
        if (picks[groups:] >= choices.bits.index(8)).all():
            assert spent(costs, picks) == exact


def test_the_choice_is_the_best_there_is(choices):
    """Of three levels of every item, against all of them."""
    costs, rng = costs_of(choices), np.random.default_rng(1)
    few = [0, LEVELS // 2, LEVELS - 1]
    cut = lambda table: table[np.ix_(*[few] * table.ndim)]
    small = costs._replace(
        loss=np.sort(rng.uniform(size=(len(costs.loss), 3)))[:, ::-1].copy(),
        cost=costs.cost[:, few],
        shared=tuple(x._replace(cost=cut(x.cost)) for x in costs.shared),
    )
    every = [np.array(x) for x in itertools.product(range(3), repeat=len(small.loss))]
    limit = sum(spending(small)) // 2
    least = min(lost(small, picks) for picks in every if spent(small, picks) <= limit)
    assert lost(small, within(small, limit)) == pytest.approx(least)


def test_what_channels_cost_is_the_divergence_they_cause(seen):
    """None while all stay, the most where nearly all go, and measured as the output shows it."""
    groups = removables(seen).groups
    ladders = ladders_of(groups, CRITERIA["energy"].score(seen), ALL_BUT_ONE, LEVELS)
    losses = channel_losses(seen, ladders)
    assert (losses[:, -1] == 0).all()
    assert (np.diff(losses, axis=1) <= 0).all()
    assert (losses[:, 0] > 1e-5).all()


def test_what_others_say_of_a_channel_is_least_squares():
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(4000, 3)) @ rng.normal(size=(3, 5))
    rows[:, 4] = 0.7 * rows[:, 0] - 0.2 * rows[:, 1] + 0.01 * rng.normal(size=4000)
    found = explained(np.cov(rows.T), np.array([4]), np.arange(4))
    solved = np.linalg.lstsq(rows[:, :4], rows[:, 4], rcond=None)[0]
    far = np.std(rows[:, :4] @ (found[0] - solved)) / np.std(rows[:, 4])
    assert found.shape == (1, 4)
    assert far < 0.05
    assert (explained(np.ones(5), np.array([4]), np.arange(4)) == 0).all()


def test_a_budget_is_kept_and_a_front_falls(choices, seen):
    how = pipeline_for(seen.model)
    half = Ceiling(0.5, "bytes", relative=True)
    found = joint(choices, half, how, points=4, key=jax.random.key(0))
    assert found.chosen.cost.amount <= 0.5 * found.uniform.cost.amount
    assert found.uniform.bits == (8,) * len(found.uniform.bits)
    pairs = list(itertools.pairwise(found.front))
    assert all(a.cost.amount < b.cost.amount and a.loss > b.loss for a, b in pairs)
    small = select(seen.model, seen.coupled, found.kept)
    outputs = evaluate(small, seen.seen)[0]
    assert np.isfinite(np.asarray(outputs[0])).all()
    assert resolve(fold_batch_norm(small).graph, how.scheme, how.layers, found.rules)


def test_a_point_of_the_front_that_is_not_proven_is_left_out(monkeypatch):
    """What was chosen is kept."""
    loss, cost = np.array([[3.0, 1.0, 0.0]]), np.array([[1, 2, 3]])
    problem = Knapsack(loss, cost)
    whole, missed = proven_front(problem, 3)
    assert [p.tolist() for p in whole] == [[0], [1], [2]]
    assert missed == ()

    def slow(problem, limit):
        if limit == 2:
            raise TimeoutError
        return best_choice(problem, limit)

    monkeypatch.setattr("dfq_jax.numerics.knapsack.best_choice", slow)
    found, missed = proven_front(problem, 3)
    assert [p.tolist() for p in found] == [[0], [2]]
    assert tuple(map(unproven, missed)) == (
        "the front has no point at 2 bytes: none was proven in time",
    )


def test_bytes_out_of_reach_name_the_least(choices, seen):
    costs = costs_of(choices)
    whole = spent(costs, at_scheme(choices, pipeline_for(seen.model)))
    with pytest.raises(BudgetError, match=r"1% B is out of reach.* takes \d+\.?\d*% B"):
        limit_in_bytes(costs, Ceiling(0.01, "bytes", relative=True), whole)


def test_layers_that_read_many_groups_leave_some_alone(nets):
    subject = Subject(nets.dense())
    groups = removables(subject, channels="all").groups
    left, notes = few_enough(subject, groups)
    assert len(left) + len(notes) == len(groups)
    for slots in subject.coupled.slots.values():
        numbers = np.concatenate([v for v in slots.get("kernel", ())] or [np.zeros(1, int)])
        touched = [g for g in left if np.isin(np.asarray(g.sets) + 1, numbers).any()]
        assert len(touched) <= MOST_GROUPS
