"""What layers cost and what remedies buy, against NumPy and against costs of plans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.allocation.candidates import Judged, candidates
from dfq_jax.allocation.costs import cost_of
from dfq_jax.allocation.diagnosis import LayerCost, costs_alone, outcomes, worst_first
from dfq_jax.allocation.remedies import remedies_for
from dfq_jax.numerics.affine import fake_quantize
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.quantization.sites import Site


def judge(exact, rough):
    a, b = (np.float64(y[0]) for y in (exact, rough))
    noise = ((a - b) ** 2).sum()
    same = float((a.argmax(-1) == b.argmax(-1)).mean())
    return Judged(10 * np.log10((a**2).sum() / noise) if noise else np.inf, same)


@pytest.fixture(scope="module")
def reference(nets):
    return fold_batch_norm(nets.tiny())


@pytest.fixture(scope="module")
def images(reference):
    return jax.random.normal(jax.random.key(0), (8, *reference.contract.shape))


@pytest.fixture(scope="module")
def quantized(reference, images):
    return calibrate(reference, resolve(reference.graph, Scheme(2, 3)), images)


@pytest.fixture(scope="module")
def costs(reference, quantized, images):
    made = candidates(reference, quantized, images)
    return costs_alone(made, quantized.plan, images, judge, so_far={"conv2": 12.5})


def test_each_layer_alone_against_numpy(costs, quantized, reference, images, nets):
    table, qparams = quantized.plan.table, quantized.qparams
    snap = lambda site, x: np.asarray(
        fake_quantize(jnp.float32(x), qparams[site], table[site].grid)
    )
    exact = nets.forward(reference, images)["fc"]

    def rounded(bias, layer):
        scales = [np.asarray(qparams[Site(layer, i)].scale, np.float64) for i in (0, None)]
        step = (scales[0] * scales[1]).ravel()
        return np.round(bias / step) * step

    assert [c.name for c in costs] == [
        *("conv1", "depthwise", "project", "add", "conv2", "pool", "fc")  # maxpool only moves
    ]
    for cost in costs:
        mine = lambda node, i, x, n=cost.name: (
            snap(Site(node.name, i), x) if n == node.name and Site(n, i) in table else x
        )
        edge = lambda node, i, x, mine=mine: mine(node, i, x)
        slots = lambda node, p, mine=mine, n=cost.name: {
            k: mine(node, None, v) if k == "kernel" else rounded(v, n) if n == node.name else v
            for k, v in p.items()
        }
        rough = nets.forward(reference, images, edge, slots)["fc"]
        wanted = 10 * np.log10((exact**2).sum() / ((exact - rough) ** 2).sum())
        assert cost.alone_db == pytest.approx(wanted, abs=0.05)
        assert cost.noise == pytest.approx(10 ** (-cost.alone_db / 10))


def test_what_is_told_of_a_layer(costs):
    found = {c.name: c for c in costs}
    told = lambda name: found[name][1:4]
    assert told("conv1") == ("Conv2d", 8, 8)
    assert told("conv2") == ("Conv2d", 2, 3)
    assert told("add") == ("Add", None, 3)  # its other input has 8
    assert (found["conv2"].so_far_db, found["fc"].so_far_db) == (12.5, None)
    worst = worst_first(costs)
    assert [c.alone_db for c in worst] == sorted(c.alone_db for c in costs)
    data = LayerCost("a", "Conv2d", 8, 8, np.inf).to_dict()
    assert (data["alone_db"], data["so_far_db"], data["weight_bits"]) == (None, None, 8)


def test_more_layers_at_8_bits_are_worth_more_and_cost_what_plans_cost(
    costs, reference, quantized, images
):
    made, plan = candidates(reference, quantized, images), quantized.plan
    remedies = remedies_for(reference, plan, [c.name for c in worst_first(costs)])
    now, found = outcomes(made, plan, remedies, images, judge)
    before = cost_of(reference, plan, "bytes").amount
    for x in found:
        assert x.bytes == cost_of(reference, x.remedy.plan, "bytes").amount - before
        assert x.seconds > 0
    named = {x.remedy.name: x.judged.sqnr_db for x in found}
    one, two = named["the worst layer at 8 bits"], named["the 2 worst layers at 8 bits"]
    assert now.sqnr_db < one < two < named["everything at 8 bits"]
    assert named["everything at 8 bits"] > 25
    assert (
        max(named["all weights at 8 bits"], named["all activations at 8 bits"])
        < (named["everything at 8 bits"])
    )
