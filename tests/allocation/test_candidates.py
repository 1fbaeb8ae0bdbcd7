"""One program for networks quantized in part: against the simulator and against NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.allocation.candidates import (
    AS_IS,
    FINE,
    at_fine,
    candidates,
    levels_between,
    outputs_at,
    raised,
    run,
    without_fine,
)
from dfq_jax.numerics.affine import fake_quantize
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Rule, Scheme, resolve
from dfq_jax.quantization.simulate import QuantizedModel, simulate
from dfq_jax.quantization.sites import Site
from dfq_jax.recipes.dfq_biases import corrected_analytically


@pytest.fixture(scope="module")
def reference(nets):
    return fold_batch_norm(nets.tiny())


@pytest.fixture(scope="module")
def images(reference):
    return jax.random.normal(jax.random.key(0), (6, *reference.contract.shape))


@pytest.fixture(scope="module")
def quantized(reference, images):
    """With biases that correction has moved."""
    made = calibrate(reference, resolve(reference.graph, Scheme(3, 4)), images)
    return corrected_analytically(made)


@pytest.fixture(scope="module")
def made(reference, quantized, images):
    return candidates(reference, quantized, images, batch=4)


def near(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())


def test_sites_in_float_leave_the_float_network(made, reference, images, nets):
    (found,) = outputs_at(made, images, {}, batch=4)
    near(found, np.asarray(nets.run(reference, images)))


def test_all_sites_as_they_are_make_the_quantized_network(made, quantized, images):
    (found,) = outputs_at(made, images, dict.fromkeys(made.sites, AS_IS), batch=4)
    near(found, np.asarray(simulate(quantized, images)))


def test_all_sites_at_8_bits_make_the_network_of_that_scheme(made, reference, images):
    (found,) = outputs_at(made, images, dict.fromkeys(made.sites, FINE), batch=4)
    plan = resolve(reference.graph, Scheme(8, 8))
    whole = calibrate(reference, plan, images, batch=4)
    near(found, np.asarray(simulate(whole, images)))


@pytest.mark.parametrize("layer", ["depthwise", "conv2", "add"])
def test_one_operator_alone_against_numpy(layer, made, quantized, reference, images, nets):
    table, qparams = quantized.plan.table, quantized.qparams
    snap = lambda site, x: np.asarray(fake_quantize(x, qparams[site], table[site].grid))

    def edge(node, index, x):
        site = Site(node.name, index)
        return snap(site, jnp.float32(x)) if node.name == layer and site in table else x

    def slots(node, p):
        if node.name != layer or "kernel" not in p:
            return p
        ours = quantized.model.params[layer]
        kernel = Site(layer)
        scales = [np.asarray(qparams[s].scale, np.float64) for s in (Site(layer, 0), kernel)]
        step = (scales[0] * scales[1]).ravel()
        bias = np.round(np.asarray(ours["bias"], np.float64) / step) * step
        return {"kernel": snap(kernel, ours["kernel"]), "bias": bias}

    sites = [site for site in made.sites if site.node == layer]
    (found,) = outputs_at(made, images, dict.fromkeys(sites, AS_IS), batch=4)
    near(found, nets.forward(reference, images, edge, slots)["fc"])


def test_every_question_is_a_run_of_one_program(made, images):
    jitted: Any = run
    before = jitted._cache_size()
    for site in made.sites:
        outputs_at(made, images, {site: AS_IS}, batch=4)
    assert jitted._cache_size() - before <= 1


def test_the_last_batch_is_not_counted_twice(made, images):
    whole, parts = (outputs_at(made, images, {}, batch=n)[0] for n in (6, 4))
    assert parts.shape == whole.shape
    near(parts, whole)


def test_raising_bits_raises_them_for_all_who_share_a_grid(reference, quantized):
    plan = quantized.plan
    finer = raised(reference, plan, [Site("depthwise", 0)])
    assert finer == resolve(reference.graph, Scheme(3, 4), rules=[Rule("depthwise", None, 8)])
    assert finer.table[Site("add", 1)].grid.bits == 8
    assert at_fine(reference, plan).table == resolve(reference.graph, Scheme(8, 8)).table


def test_levels_between_plans(reference, quantized):
    plan = quantized.plan
    rules = [Rule("conv2", 8, 8), Rule("project", keep_float=True)]
    found = levels_between(plan, resolve(reference.graph, Scheme(3, 4), rules=rules))
    fine = {Site("conv2"), Site("conv2", 0), Site("maxpool", 0)}
    floats = {Site("project"), Site("project", 0)}
    assert {site for site, level in found.items() if level == FINE} == fine
    assert {site for site, level in found.items() if level == 0} == floats
    assert set(found) == {site for site, _ in plan.entries}


def test_without_ranges_of_8_bits_nothing_is_calibrated(reference, quantized, images, made):
    bare = without_fine(reference, quantized)
    levels = dict.fromkeys(made.sites, AS_IS)
    near(outputs_at(bare, images, levels)[0], outputs_at(made, images, levels)[0])
    assert isinstance(quantized, QuantizedModel)
