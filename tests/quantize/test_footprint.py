"""Memory of a reconstruction, foretold from shapes."""

import jax
import numpy as np
import pytest

from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantize.calibrate import calibrate
from dfq_jax.quantize.closed_form import ClosedForm
from dfq_jax.quantize.footprint import footprint, largest_step, unit_footprint, values_of
from dfq_jax.quantize.plan import Scheme, resolve
from dfq_jax.quantize.units import unit_model, units_of
from dfq_jax.quantize.work import passed
from dfq_jax.recipes.dfq import Quantized
from dfq_jax.recipes.qdrop import qdrop
from dfq_jax.recipes.reconstructions import foretold


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
        found = unit_footprint(unit, values, reference, 6, ClosedForm(), 2**30)
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
