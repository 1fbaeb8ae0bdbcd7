"""Memory of a reconstruction, foretold from shapes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.optim.chunk_data import Fed
from dfq_jax.optim.steps import Now
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.recipes.brecq import brecq
from dfq_jax.recipes.pd_quant import pd_quant
from dfq_jax.recipes.qdrop import qdrop
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.recipes.reconstructions import foretold
from dfq_jax.reconstruction.batches import Rows
from dfq_jax.reconstruction.closed_form import ClosedForm
from dfq_jax.reconstruction.footprint import (
    Passing,
    behind,
    footprint,
    largest_step,
    step_bytes,
    unit_footprint,
    values_of,
)
from dfq_jax.reconstruction.objective import UnitContext, objective_of
from dfq_jax.reconstruction.phases import begun, coarse_edges
from dfq_jax.reconstruction.unit_at_work import passed
from dfq_jax.reconstruction.units import rest_of, unit_model, unit_qparams, units_of


@pytest.fixture(scope="module")
def reference(nets):
    return fold_batch_norm(nets.tiny())


@pytest.fixture(scope="module")
def plan(reference):
    return resolve(reference.graph, Scheme(2, 8))


def test_what_is_kept_are_the_ends_of_a_unit(reference, plan, nets):
    """Twice, for the float and the quantized network; counted from what really passes."""
    data, values = np.asarray(nets.images(reference, 6)), values_of(reference)
    largest = footprint(reference, plan, 6, ClosedForm(), 2**30)
    every = []
    for unit in units_of(reference.graph, plan):
        after = passed(unit_model(unit, reference), None, None, data)
        found = unit_footprint(unit, Passing(reference, values, 6, 2**30), ClosedForm())
        assert found.kept == 2 * (data.nbytes + after.nbytes)
        every.append(found.total)
        data = after
    assert largest.total == max(every)


def test_values_are_those_of_the_tensors(reference, nets):
    values = values_of(reference)
    assert values[reference.graph.inputs[0]] == nets.images(reference, 1).size
    assert largest_step(reference.graph, values) == 3 * values["relu1"]  # a sum of two


def test_more_images_and_larger_batches_take_more(reference, plan):
    method = qdrop(steps=1)
    few, many = (footprint(reference, plan, n, method, 2**30) for n in (16, 64))
    assert many.kept == 4 * few.kept
    assert many.working == few.working
    large = footprint(reference, plan, 16, method._replace(batch=512), 2**30)
    assert large.working > 4 * few.working
    layers = footprint(reference, plan, 16, method._replace(batch=512, layers=True), 2**30)
    assert layers.working < large.working
    assert footprint(reference, plan, 64, method, 100).kept < many.kept


def test_units_that_memory_splits_count_layer_by_layer(reference, plan):
    method = qdrop(steps=1)._replace(batch=512)
    whole = footprint(reference, plan, 16, method)
    split = footprint(reference, plan, 16, method, whole.working - 1)
    layers = footprint(reference, plan, 16, method._replace(layers=True))
    assert layers.working <= split.working < whole.working


def test_looking_ahead_takes_more(reference, plan):
    """PD-Quant: two batches in the unit, one behind it, corrected copies; Fisher: slopes."""
    units, values = units_of(reference.graph, plan), values_of(reference)
    after = behind(units, values)
    assert after[-1] == 0
    assert after[0] == sum(values[n.name] for u in units[1:] for n in u.block.graph.nodes)
    given = Passing(reference, values, 64, 2**30)
    take = lambda method: unit_footprint(units[0], given, method, after[0])
    graph = units[0].block.graph
    enters, leaves = values[graph.inputs[0]], values[graph.outputs[0]]
    plain, predicting = take(qdrop()), take(pd_quant(closeness=None))
    logits = 2 * 64 * values["fc"] * 4  # on the host and on the device
    assert predicting.kept == plain.kept + logits
    assert predicting.working > 2 * plain.working
    assert take(pd_quant()).kept == predicting.kept + 64 * (enters + leaves) * 4
    brecqs = [take(brecq(fisher=fisher)) for fisher in (False, True)]
    assert brecqs[1].kept == brecqs[0].kept + 2 * 64 * leaves * 4 + logits
    few = brecq(fisher=True, batch=1)  # slopes are of 32 images all the same
    assert take(few).working >= 32 * (leaves + after[0]) * 4
    alone = take(pd_quant(closeness=None)._replace(layers=True))
    assert alone == take(qdrop()._replace(layers=True))


@pytest.mark.parametrize("method", [qdrop(batch=16), pd_quant(batch=16)])
def test_a_step_fits_into_what_is_foretold(method, nets, optimized):
    """XLA's own figure for gradients of the first unit, with optimizations as users have them."""
    reference = fold_batch_norm(nets.wide())
    plan = resolve(reference.graph, Scheme(4, 4), "zsq_all_low")
    exact = np.asarray(nets.images(reference, 16))
    calibrated = calibrate(reference, plan, jnp.asarray(exact))
    logits = passed(reference, None, None, exact) if method.prediction else None
    units, values = units_of(reference.graph, plan), values_of(reference)
    targets = passed(unit_model(units[0], reference), None, None, exact)
    rows: Any = (exact, exact, targets, None, logits)
    taken = xla_bytes(units[0], calibrated, method, Rows(*rows), rest_of(reference, units[1:]))
    found = step_bytes(units[0], values, method, behind(units, values)[0]) / taken
    assert 1 < found < 4, f"foretold {found:.2f} of {taken} bytes"


def xla_bytes(unit, calibrated, method, rows, beyond):
    """What XLA sets aside for the gradients of one step."""
    model, qparams = unit_model(unit, calibrated.model), unit_qparams(unit, calibrated.qparams)
    kernels, fixed = begun(model, qparams, unit.plan, method.rounding)
    x = {"kernels": kernels, "edges": coarse_edges(unit.plan, qparams), "biases": {}, "borders": {}}
    given = UnitContext(
        model, qparams, fixed, jnp.float32(1), beyond if method.prediction else None
    )
    fed = Fed(given, jnp.int32(0), jax.tree.map(lambda v: jnp.asarray(v)[None], rows))
    objective = objective_of(unit.plan, method, method.phases[0])
    leaves, tree = jax.tree.flatten((x, fed, Now(jax.random.key(0), jnp.int32(0))))
    gradients = jax.value_and_grad(objective, has_aux=True)
    step = jax.jit(lambda *leaves: gradients(*tree.unflatten(leaves)))
    stats = step.lower(*leaves).compile().memory_analysis()
    assert stats is not None
    return stats.temp_size_in_bytes


def test_several_methods_take_what_the_largest_does(reference, plan, nets):
    quantized = calibrate(reference, plan, nets.images(reference, 8))
    made = Quantized(quantized, reference, True)
    assert foretold(made, 8, (), None) == 0
    both = foretold(made, 8, (ClosedForm(), qdrop(steps=1)), None)
    each = [foretold(made, 8, (m,), None) for m in (ClosedForm(), qdrop(steps=1))]
    assert both == max(each) > 0


def test_nothing_is_computed(reference, plan, monkeypatch):
    monkeypatch.setattr(jax, "jit", None)
    assert footprint(reference, plan, 10**6, ClosedForm(), 2**30).total > 10**6
