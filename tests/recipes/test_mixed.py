import jax
import numpy as np
import pytest

from dfq_jax.allocation.allocate import allocate, priced
from dfq_jax.allocation.costs import BudgetUnit, cost_of, parse_budget
from dfq_jax.allocation.sensitivity import sensitivities
from dfq_jax.errors import BudgetError
from dfq_jax.numerics.ranges import MinMax
from dfq_jax.optim.progress import Watcher
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.thrifty_ranges import thrifty_ranges
from dfq_jax.quantization.observers import DEFAULT_OBSERVERS, Observers
from dfq_jax.quantization.plan import Rule, parse_scheme, resolve
from dfq_jax.recipes.mixed import mixed
from dfq_jax.recipes.pipeline import Pipeline

SCHEMES: dict[BudgetUnit, str] = {"bits": "w4a8", "bytes": "w8a8", "bops": "w4a4"}


@pytest.fixture(scope="module")
def model(nets):
    return fold_batch_norm(nets.tiny())


@pytest.fixture(scope="module")
def found(model, nets):
    """{unit: scheme, what `mixed` makes of it within what the uniform network costs, stages}."""
    made = {}
    for unit, text in SCHEMES.items():
        scheme, stages = parse_scheme(text), []
        uniform = cost_of(model, resolve(model.graph, scheme), unit)
        mix = mixed(
            model,
            nets.images(model, 6),
            Pipeline(
                scheme,
                budget=None if unit == "bits" else uniform,
                sensitivity="trace" if unit == "bops" else "kl",
            ),
            points=4,
            key=jax.random.key(0),
            watch=Watcher(stages.append),
        )
        made[unit] = scheme, mix, stages
    return made


@pytest.mark.parametrize("unit", SCHEMES)
def test_never_predicted_worse_than_uniform_at_the_same_cost(unit, found, model):
    scheme, mix, stages = found[unit]
    uniform = cost_of(model, resolve(model.graph, scheme), unit)
    assert mix.uniform.cost == uniform
    assert mix.chosen.cost.amount <= uniform.amount
    assert mix.chosen.loss <= mix.uniform.loss + 1e-9 * mix.losses.max()
    assert stages == [stages[0], "allocating bits"]
    assert f"cost {len(mix.space.choices)} kernels and tensors" in stages[0]


@pytest.mark.parametrize("unit", SCHEMES)
def test_rules_make_a_plan_of_the_chosen_bits_and_cost(unit, found, model):
    scheme, mix, _ = found[unit]
    plan = resolve(model.graph, scheme, rules=mix.rules)
    assert cost_of(model, plan, unit) == mix.chosen.cost
    bits = {c.name: b for c, b in zip(mix.space.choices, mix.chosen.bits, strict=True)}
    assert {"conv1", "fc"}.isdisjoint(bits)
    assert len(bits) == (6 if unit == "bops" else 3)
    assert plan.scheme == scheme


def test_the_best_of_the_front_is_the_choice_for_its_cost(found, model):
    _, mix, _ = found["bops"]
    losses = [point.loss for point in mix.front]
    assert losses == sorted(losses, reverse=True)
    again = allocate(model, mix.space, mix.losses, mix.front[1].cost)
    assert again.loss == pytest.approx(mix.front[1].loss)
    repriced = priced(model, mix.space, mix.losses, again.bits, "bops")
    assert repriced == again


def test_rules_of_the_caller_hold(model, nets):
    rules = (Rule("conv2", weight_bits=3),)
    scheme = parse_scheme("w7a8")
    mix = mixed(
        model,
        nets.images(model, 4),
        Pipeline(scheme, rules=rules, budget=parse_budget("5bits")),
        points=2,
        key=jax.random.key(1),
    )
    assert mix.rules[:1] == rules
    assert [c.name for c in mix.space.choices] == ["depthwise", "project"]
    assert 7 in mix.space.bits
    plan = resolve(model.graph, scheme, rules=mix.rules)
    assert np.isclose(cost_of(model, plan, "bits").amount, mix.chosen.cost.amount)


@pytest.mark.parametrize("observers", [None, Observers(activations=MinMax())])
def test_losses_are_those_of_the_grids_that_dfq_would_take(observers, model, nets):
    images, key = nets.images(model, 4), jax.random.key(1)
    mix = mixed(
        model,
        images,
        Pipeline(parse_scheme("w4a4"), budget=parse_budget("1GBOPs"), observers=observers),
        points=2,
        key=key,
    )
    activations = {
        s.observer for p in mix.space.plans for site, s in p.entries if site.argument == 0
    }
    assert activations == {(observers or DEFAULT_OBSERVERS).activations}
    how = {"expected": thrifty_ranges(model), "widen": observers is None, "key": key}
    wanted = sensitivities(model, mix.space, images, **how)
    np.testing.assert_allclose(mix.losses, wanted, rtol=1e-4)


def test_a_budget_out_of_reach_is_told(model, nets, monkeypatch):
    """Before anything is measured."""
    monkeypatch.delattr("dfq_jax.recipes.mixed.sensitivities")
    with pytest.raises(BudgetError, match=r"budget 2bits is out of reach.* takes 3\.6741bits"):
        mixed(
            model,
            nets.images(model, 4),
            Pipeline(parse_scheme("w4a8"), budget=parse_budget("2bits")),
            key=jax.random.key(1),
        )
