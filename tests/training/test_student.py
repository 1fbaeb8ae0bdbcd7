"""A student is the network it began as until it learns, and what it learns is in the result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.numerics.levels import on_levels
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.quantization.simulate import simulate
from dfq_jax.training.level_rules import as_calibrated, clipped, learned_steps, min_max
from dfq_jax.training.student import (
    StudentKind,
    finished,
    float_student,
    kernel_codes,
    on_learned_levels,
    share_changed,
    student_hook,
    student_start,
    trained_at_first,
    with_rounded_kernels,
)
from dfq_jax.training.tracking import Tracking

KINDS = {
    "LSQ": StudentKind(learned_steps(), learned_steps(images=True)),
    "PACT": StudentKind(as_calibrated(), clipped()),
    "min-max": StudentKind(min_max(), as_calibrated()),
    "live norms": StudentKind(as_calibrated(), as_calibrated(), live=True),
}


@pytest.fixture(scope="module")
def start(nets):
    model = nets.tiny()
    folded = fold_batch_norm(model)
    plan = resolve(folded.graph, Scheme(4, 4))
    images = nets.images(folded, 8)
    return model, calibrate(folded, plan, images), images


def outputs(kind, plan, x, begun, images):
    hook = student_hook(kind, plan, x, begun, {})
    return evaluate(float_student(kind, x, begun), images, hook=hook)[0][0]


@pytest.mark.parametrize("name", [k for k in KINDS if k != "min-max"])
def test_it_begins_as_the_network_it_is(start, name):
    model, quantized, images = start
    kind, plan = KINDS[name], quantized.plan
    begun = student_start(kind, quantized, model)
    x = trained_at_first(kind, plan, begun)
    wanted = simulate(quantized, images)
    np.testing.assert_allclose(outputs(kind, plan, x, begun, images), wanted, atol=1e-5)
    back = finished(kind, plan, x, begun, {})
    np.testing.assert_allclose(simulate(back, images), wanted, atol=1e-5)


@pytest.mark.parametrize("name", list(KINDS))
def test_what_is_trained_is_in_the_result(start, name):
    model, quantized, images = start
    kind, plan = KINDS[name], quantized.plan
    begun = student_start(kind, quantized, model)
    moved = jax.tree.map(lambda v: v * 1.05, trained_at_first(kind, plan, begun))
    found = outputs(kind, plan, moved, begun, images)
    result = simulate(finished(kind, plan, moved, begun, {}), images)
    np.testing.assert_allclose(found, result, atol=1e-5)
    assert np.abs(np.asarray(result - simulate(quantized, images))).max() > 1e-3


def test_norms_that_are_live_keep_their_statistics(start):
    model, quantized, _ = start
    kind = KINDS["live norms"]
    begun = student_start(kind, quantized, model)
    weights = trained_at_first(kind, quantized.plan, begun)["weights"]
    slots = {slot for node in weights.values() for slot in node}
    assert slots == {"kernel", "bias", "scale"}
    with pytest.raises(ValueError, match="live batch norms"):
        student_start(kind, quantized, None)


def test_bytes_do_not_learn(start):
    model, quantized, _ = start
    kind = KINDS["LSQ"]
    x = trained_at_first(kind, quantized.plan, student_start(kind, quantized, model))
    table = quantized.plan.table
    low = {t for t, sites in quantized.plan.groups if table[sites[0]].levels.bits < 8}
    assert {name.split(":", 1)[1] for name in x["edges"]} == low


def test_changed_codes_are_counted(start):
    model, quantized, _ = start
    kind = KINDS["LSQ"]
    begun = student_start(kind, quantized, model)
    x = trained_at_first(kind, quantized.plan, begun)
    codes = kernel_codes(kind, quantized.plan, x, begun)
    assert float(share_changed(codes, codes)) == 0.0
    layer = next(iter(codes))
    other = {**codes, layer: codes[layer] + jnp.ones((), codes[layer].dtype)}
    whole = sum(v.size for v in codes.values())
    np.testing.assert_allclose(share_changed(codes, other), codes[layer].size / whole, rtol=1e-6)


def test_a_network_of_learned_levels_stays_what_it_is(start):
    """Extremes found anew would undo what was learned for the scales at hand."""
    model, quantized, images = start
    narrow = lambda q: q._replace(scale=0.6 * q.scale)
    table = quantized.plan.table
    scales = {s: narrow(q) if s.argument is None else q for s, q in quantized.qparams.items()}
    learned = dataclasses.replace(quantized, qparams=scales)
    assert any(s.argument is None for s in table)
    kind = StudentKind(min_max(), live=True, tracking=Tracking(3))
    kept, told = on_learned_levels(kind)
    assert told == ("norms stay folded", "kernels keep its scales", "ranges stay")
    wanted = simulate(learned, images)

    def begun(kind):
        given = student_start(kind, learned, model)
        x = trained_at_first(kind, learned.plan, given)
        return outputs(kind, learned.plan, x, given, images)

    np.testing.assert_allclose(begun(kept), wanted, atol=1e-5)
    assert np.abs(begun(kind) - wanted).max() > 0.01
    assert on_learned_levels(KINDS["LSQ"]) == (KINDS["LSQ"], ())


def test_losses_see_kernels_on_their_levels(start):
    model, quantized, _ = start
    kind, plan = KINDS["min-max"], quantized.plan
    begun = student_start(kind, quantized, model)
    x = trained_at_first(kind, plan, begun)
    seen = with_rounded_kernels(kind, plan, x, begun, float_student(kind, x, begun))
    for site, spec in plan.entries:
        if site.argument is None:
            kernel = quantized.model.params[site.node]["kernel"]
            now = kind.kernels.parameters(kernel, spec.levels, None, quantized.qparams[site])
            wanted = on_levels(kernel, spec.levels, now)
            np.testing.assert_allclose(seen.params[site.node]["kernel"], wanted, atol=1e-6)
