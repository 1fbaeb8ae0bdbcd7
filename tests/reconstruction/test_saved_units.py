"""Finished units on disk."""

import jax
import numpy as np

from dfq_jax.optim.progress import UnitReport
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Rule, Scheme, resolve
from dfq_jax.reconstruction.saved_units import Finished, load_unit, save_unit
from dfq_jax.reconstruction.units import unit_model, unit_qparams, units_of

REPORT = UnitReport("layer", "method", 0.5, 0.25, kept=True, seconds=3.0)


def test_all_that_learned_comes_back(nets, tmp_path):
    """Biases of norms and of layers that a rule keeps in float learn as well."""
    reference = fold_batch_norm(nets.vit())
    plan = resolve(reference.graph, Scheme(4, 8), rules=[Rule("wide0", keep_float=True)])
    quantized = calibrate(reference, plan, nets.images(reference, 2))
    for number, unit in enumerate(units_of(reference.graph, plan)):
        model, qparams = unit_model(unit, quantized.model), unit_qparams(unit, quantized.qparams)
        learned = jax.tree.map(lambda v: v * 1.5, model)
        file = tmp_path / f"unit-{number}.npz"
        save_unit(file, Finished(learned, qparams, REPORT))
        found = load_unit(file, model, qparams)
        assert found is not None
        assert found.report == REPORT
        jax.tree.map(np.testing.assert_array_equal, found.model.params, learned.params)
        jax.tree.map(np.testing.assert_array_equal, found.qparams, qparams)
