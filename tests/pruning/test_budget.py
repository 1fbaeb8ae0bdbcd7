"""Budgets of channels: counted as the network counts, solved exactly, refused out of reach."""

import numpy as np
import pytest

from dfq_jax.errors import BudgetError
from dfq_jax.graph.query import macs
from dfq_jax.numerics.knapsack import lost, spent
from dfq_jax.passes.select import select
from dfq_jax.pruning.budget import (
    LEVELS,
    Ceiling,
    Price,
    at_levels,
    by_budget,
    cost_of,
    ladders_of,
    parse_ceiling,
    problem_of,
    work_of,
)
from dfq_jax.pruning.choose import ALL_BUT_ONE, Floor, by_share, never_empty
from dfq_jax.pruning.groups import Subject, removables

IN_BYTES = Price(8, 17)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("50% MACs", Ceiling(0.5, "macs", True)),
        ("20MMACs", Ceiling(20e6, "macs")),
        ("40%params", Ceiling(0.4, "values", True)),
        ("300 Kparams", Ceiling(300e3, "values")),
        ("2MB", Ceiling(2e6, "bytes")),
        ("1.5MiB", Ceiling(1.5 * 2**20, "bytes")),
    ],
)
def test_budgets_are_read(text, wanted):
    assert parse_ceiling(text) == wanted
    if "iB" not in text:
        assert parse_ceiling(str(wanted)) == wanted


@pytest.mark.parametrize(
    "text", ["50%", "50", "MACs", "-2MB", "5% MiB", "4bits", "0MB", "120% MACs"]
)
def test_budgets_that_are_none(text):
    with pytest.raises(BudgetError, match="budget"):
        parse_ceiling(text)


def kernels_and_biases(model, price):
    """Bytes counted from the arrays themselves."""
    kernels = [slots["kernel"] for slots in model.params.values() if "kernel" in slots]
    return sum(k.size * price.bits / 8 + k.shape[-1] * price.channel for k in kernels)


@pytest.mark.parametrize(
    "name", ["tiny", "mixed", "dense", "inception", "shuffle", "excite", "unet"]
)
def test_costs_are_those_of_the_network_that_is_left(name, nets):
    subject = Subject(getattr(nets, name)())
    groups = removables(subject, channels="all").groups
    scores = np.random.default_rng(0).uniform(size=len(subject.coupled))
    chosen = never_empty(subject.coupled, scores, by_share(groups, scores, 0.4))
    small = select(subject.model, subject.coupled, chosen.kept)
    count = lambda unit: cost_of(work_of(subject, unit, IN_BYTES), chosen.kept)
    assert count("macs") == sum(macs(small).values())
    assert count("bytes") == 8 * kernels_and_biases(small, IN_BYTES)


@pytest.mark.parametrize("name", ["tiny", "shuffle"])
def test_the_knapsack_counts_what_the_network_costs(name, nets):
    subject = Subject(getattr(nets, name)())
    groups, rng = removables(subject, channels="all").groups, np.random.default_rng(0)
    scores = rng.uniform(size=len(subject.coupled))
    ladders, work = ladders_of(groups, scores, ALL_BUT_ONE), work_of(subject, "macs", IN_BYTES)
    problem = problem_of(work, ladders, scores)
    for _ in range(20):
        picks = rng.integers(0, LEVELS, len(groups))
        kept = at_levels(ladders, picks, len(scores))
        assert spent(problem, picks) == cost_of(work, kept)
        worth = [
            scores[list(g.sets)][~kept[list(g.sets)]].sum() / scores[list(g.sets)].sum()
            for g in groups
        ]
        assert np.isclose(lost(problem, picks), sum(worth))
        assert all(kept[list(g.sets)].any() for g in groups)


@pytest.mark.parametrize("text", ["60% MACs", "70% params", "1.2KB"])
def test_a_budget_is_kept(text, nets):
    subject, ceiling = Subject(nets.tiny()), parse_ceiling(text)
    groups = removables(subject, channels="all").groups
    scores = np.random.default_rng(0).uniform(size=len(subject.coupled))
    chosen = by_budget(subject, groups, scores, ceiling, floor=ALL_BUT_ONE, price=IN_BYTES)
    all_of_it = np.ones(len(scores), bool)
    work = work_of(subject, ceiling.unit, IN_BYTES)
    limit = ceiling.amount * (cost_of(work, all_of_it) if ceiling.relative else 8)
    assert 0.7 * limit <= cost_of(work, chosen.kept) <= limit


def test_a_budget_out_of_reach_names_the_least(nets):
    subject = Subject(nets.tiny())
    groups = removables(subject, channels="all").groups
    told = lambda text, floor: by_budget(
        subject,
        groups,
        np.ones(len(subject.coupled)),
        parse_ceiling(text),
        floor=floor,
        price=IN_BYTES,
    )
    with pytest.raises(
        BudgetError, match=r"budget 2% MACs is out of reach.* takes \d+\.?\d*% MACs"
    ):
        told("2% MACs", ALL_BUT_ONE)
    with pytest.raises(BudgetError, match=r"budget 100B is out of reach.* takes [\d.]+K?B; allow"):
        told("100B", Floor(least=4))
