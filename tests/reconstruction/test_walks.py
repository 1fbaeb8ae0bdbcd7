"""Walks through a network, what they leave in float, and what a unit's input is rounded by."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.query import weighted_nodes
from dfq_jax.numerics.affine import Affine, fake_quantize
from dfq_jax.numerics.rounding import straight_through
from dfq_jax.optim.progress import Watcher
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, Site, resolve
from dfq_jax.recipes.adaround import adaround
from dfq_jax.recipes.brecq import brecq
from dfq_jax.recipes.qdrop import qdrop
from dfq_jax.reconstruction.closed_form import ClosedForm
from dfq_jax.reconstruction.engine import reconstruct
from dfq_jax.reconstruction.method import Phase
from dfq_jax.reconstruction.objective import DrawnShare, UnitContext, drawn, training_hook
from dfq_jax.reconstruction.walks import walks_of

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def given(nets):
    reference = fold_batch_norm(nets.tiny())
    images = nets.images(reference, 8)
    plan = resolve(reference.graph, Scheme(3, 4), "zsq_all_low")
    return calibrate(reference, plan, images), reference, np.asarray(images)


def test_walks():
    """Weights before activations in BRECQ; all others walk once."""
    first, second = walks_of(brecq(steps=8))
    assert (first.weights_alone, second.weights_alone) == (True, False)
    assert (first.part, second.before, second.part) == pytest.approx((0.8, 0.8, 0.2))
    for method in (adaround(), qdrop(), ClosedForm()):
        (only,) = walks_of(method)
        assert only.weights_alone is (method == adaround())
        assert (only.method, only.part) == (method, 1.0)


def test_weights_alone_do_not_see_activations_rounded(given):
    """The same kernels whatever the grids of activations, which stay as calibrated."""
    quantized, reference, images = given
    wide = {s: Affine(a.scale * 4, a.zero_point) for s, a in quantized.affines.items()}
    coarse = {s: wide[s] if s.argument is not None else a for s, a in quantized.qparams.items()}
    other = dataclasses.replace(quantized, qparams=coarse)
    method = adaround(steps=4, batch=4)
    found = [reconstruct(q, reference, images, method, KEY)[0] for q in (quantized, other)]
    for node in weighted_nodes(reference.graph):
        one, two = (q.model.params[node.name]["kernel"] for q in found)
        np.testing.assert_array_equal(one, two)
    assert found[0].plan == quantized.plan
    edges = [s for s in quantized.qparams if s.argument is not None]
    assert edges
    assert all(found[1].affines[s].scale == coarse[s].scale for s in edges)


def test_both_walks_are_told_as_one(given):
    quantized, reference, images = given
    ended, done = [], []
    watch = Watcher(unit=lambda *at: ended.append(at), progress=lambda at: done.append(at.done))
    method = brecq(steps=4, batch=4)
    found, reports = reconstruct(quantized, reference, images, method, KEY, watch=watch)
    assert [(i, n) for i, n, _ in ended] == [
        (i, 2 * len(reports) // 2) for i in range(len(reports))
    ]
    assert done == sorted(done)
    assert done[-1] <= 1
    names = [node.name for node in weighted_nodes(reference.graph)]
    kernel = lambda q, name: np.asarray(q.model.params[name]["kernel"])
    np.testing.assert_array_equal(kernel(found, names[0]), kernel(quantized, names[0]))
    assert not np.array_equal(kernel(found, names[-1]), kernel(quantized, names[-1]))


@pytest.mark.parametrize("once", [True, False])
def test_the_input_of_a_unit_is_rounded_once_or_as_any_activation(given, once):
    quantized, reference, _ = given
    layer = weighted_nodes(reference.graph)[1]
    site, phase = Site(layer.name, 0), Phase(1, input_once=once)
    shown = jax.random.uniform(KEY, (2, 8, 8, 4))
    came = drawn(jax.random.key(1), shown.shape, 0.5)
    trained = {"kernels": {}, "edges": {}, "biases": {}, "borders": {}}
    context = UnitContext(reference, quantized.affines, {}, jnp.ones(()))
    entering = (shown, came) if once else None
    share = DrawnShare(jax.random.key(2), entering)
    hook = training_hook(quantized.plan, straight_through(), phase, trained, context, share)
    _, (seen,) = hook(layer, reference.params[layer.name], (shown,))
    spec = quantized.plan.table[site]
    rounded = np.asarray(fake_quantize(shown, quantized.affines[site], spec.grid))
    changed = np.asarray(seen) != np.asarray(shown)
    assert (changed <= (rounded != np.asarray(shown))).all()
    assert np.array_equal(changed, np.asarray(came) & (rounded != np.asarray(shown))) is once
