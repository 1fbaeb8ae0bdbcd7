import itertools

import numpy as np
import pytest

from dfq_jax.allocation import allocate as module
from dfq_jax.allocation import costs
from dfq_jax.allocation.allocate import allocate, pareto, priced
from dfq_jax.allocation.choices import space_of
from dfq_jax.allocation.costs import Budget, cost_of, parse_budget
from dfq_jax.errors import BudgetError, ResourceError
from dfq_jax.numerics.knapsack import best_choice
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.plan import Rule, parse_scheme, resolve

W4A4 = parse_scheme("w4a4")
UNITS = {"bits": (2, 4, 8), "bytes": (4, 6, 8), "bops": (3, 8)}


def losses_of(space, seed=0):
    rng = np.random.default_rng(seed)
    size = len(space.choices), len(space.bits)
    table = rng.uniform(size=size) * 10.0 ** rng.uniform(-3, 0, (size[0], 1))
    return np.sort(table, axis=1)[:, ::-1].copy()


@pytest.fixture(scope="module")
def model(nets):
    return fold_batch_norm(nets.tiny())


@pytest.fixture(scope="module", autouse=True)
def packs_all():
    """Bytes follow bits in kernels as small as these, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "UNPACKING", -1)
        yield


@pytest.fixture(scope="module", params=UNITS)
def enumerated(request, model):
    """(unit, space, losses, every choice with its loss and the cost of the plan it resolves to)."""
    unit = request.param
    space = space_of(model.graph, scheme=W4A4, tensors=unit == "bops", bits=UNITS[unit])
    losses, rows = losses_of(space), []
    for bits in itertools.product(space.bits, repeat=len(space.choices)):
        plan = resolve(model.graph, W4A4, rules=space.rules_for(bits))
        loss = sum(row[space.bits.index(b)] for row, b in zip(losses, bits, strict=True))
        rows.append((bits, loss, cost_of(model, plan, unit).amount))
    return unit, space, losses, rows


def test_allocation_equals_brute_force(enumerated, model):
    unit, space, losses, rows = enumerated
    costs = sorted({cost for *_, cost in rows})
    for amount in (costs[0], costs[len(costs) // 4], costs[len(costs) // 2], costs[-1]):
        found = allocate(model, space, losses, Budget(amount, unit))
        least = min(loss for _, loss, cost in rows if cost <= amount)
        assert found.loss == pytest.approx(least)
        assert (found.bits, pytest.approx(found.loss), found.cost.amount) in rows
        assert found.cost.amount <= amount
        assert found == allocate(model, space, losses, Budget(amount, unit))


def test_front_is_part_of_the_true_one(enumerated, model):
    unit, space, losses, rows = enumerated
    front = pareto(model, space, losses, unit, points=6)
    assert len(front) > 2
    for point in front:
        better = [r for r in rows if r[1] < point.loss - 1e-8 and r[2] <= point.cost.amount]
        assert better == []
    pairs = list(itertools.pairwise(front))
    assert all(a.cost.amount < b.cost.amount and a.loss > b.loss for a, b in pairs)
    assert front[-1].loss == pytest.approx(min(loss for _, loss, _ in rows))
    assert front[0].cost.amount == min(cost for *_, cost in rows)
    assert pareto(model, space, losses, unit, points=1) == front[:1]


def test_prices_of_given_bits(enumerated, model):
    unit, space, losses, rows = enumerated
    for bits, loss, cost in rows[:: max(len(rows) // 5, 1)]:
        found = priced(model, space, losses, bits, unit)
        assert (found.bits, found.rules) == (bits, space.rules_for(bits))
        assert (found.loss, found.cost.amount) == (pytest.approx(loss), cost)


def test_a_budget_out_of_reach_names_the_smallest(enumerated, model):
    unit, space, losses, rows = enumerated
    smallest = min(cost for *_, cost in rows)
    with pytest.raises(BudgetError, match="out of reach") as caught:
        allocate(model, space, losses, Budget(smallest * 0.99, unit))
    named = parse_budget(str(caught.value).partition("takes ")[2].partition(";")[0])
    assert named.amount == pytest.approx(smallest, rel=2e-4)
    assert allocate(model, space, losses, named).cost.amount == smallest


def test_products_of_tied_tensors_cost_the_square(nets):
    model = fold_batch_norm(nets.vit())
    space = space_of(model.graph, scheme=W4A4, tensors=True, bits=(2, 5, 8))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        bits = tuple(int(b) for b in rng.choice(space.bits, len(space.choices)))
        plan = resolve(model.graph, W4A4, rules=space.rules_for(bits))
        found = priced(model, space, losses_of(space), bits, "bops")
        assert found.cost == cost_of(model, plan, "bops")


@pytest.mark.parametrize(
    ("net", "layer", "budget"),
    [("vit", "attention0.scores", "160KBOPs"), ("inception", "one", "175KBOPs")],
)
def test_a_rule_for_one_of_several_readers_of_a_tensor_keeps_to_the_budget(
    net, layer, budget, nets
):
    """The tensor has the bits that its other readers want, which is more than the rule says."""
    model, limit = fold_batch_norm(getattr(nets, net)()), parse_budget(budget)
    rules, scheme = [Rule(layer, input_bits=4)], parse_scheme("w8a8")
    space = space_of(model.graph, rules=rules, scheme=scheme, tensors=True)
    for found in (
        allocate(model, space, losses_of(space), limit),
        priced(model, space, losses_of(space), [3] * len(space.choices), "bops"),
    ):
        plan = resolve(model.graph, scheme, rules=found.rules)
        assert found.cost == cost_of(model, plan, "bops")


def test_no_proof_in_time_is_an_error(model, monkeypatch):
    def slow(problem, limit):
        raise TimeoutError

    monkeypatch.setattr(module, "best_choice", slow)
    space = space_of(model.graph, scheme=W4A4)
    with pytest.raises(ResourceError, match="3 kernels and tensors within 60 s"):
        allocate(model, space, losses_of(space), parse_budget("6bits"))


def test_a_front_goes_without_a_point_that_is_not_proven(model, monkeypatch):
    space, asked = space_of(model.graph, scheme=W4A4), []
    losses = losses_of(space)
    whole = pareto(model, space, losses, "bits", points=6)

    def slow_once(problem, limit):
        asked.append(limit)
        if len(asked) == 2:
            raise TimeoutError
        return best_choice(problem, limit)

    monkeypatch.setattr("dfq_jax.numerics.knapsack.best_choice", slow_once)
    left = pareto(model, space, losses, "bits", points=6)
    assert len(asked) == 6
    assert left == (whole[0], *whole[2:])
