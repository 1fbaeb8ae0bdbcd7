"""LQ-Nets' levels while kernels move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.numerics.basis import Basis, LearnedLevels, fit_basis
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.plan import Scheme, Site
from dfq_jax.recipes.dfq import dfq
from dfq_jax.recipes.lq_nets import lq_nets
from dfq_jax.recipes.lq_nets_qat import lq_nets_qat
from dfq_jax.training.engine import TrainingSetup, trained
from dfq_jax.training.level_rules import solved_anew, within_levels

KEY = jax.random.key(5)
DONE = jnp.ones(())
"""Share of the steps that are taken."""


def test_a_basis_is_solved_for_the_kernel_of_a_step():
    """Against least squares in NumPy, channel by channel, for codes of the basis before."""
    rng = np.random.default_rng(0)
    levels = LearnedLevels(2, "signs", axis=-1)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 4, 2)), jnp.float32)
    given = fit_basis(levels.rows(kernel), 2, "signs").basis
    moved = kernel * 1.3 + 0.02
    rule = solved_anew(turns=1)
    assert rule == solved_anew(turns=1)
    found = rule.parameters(moved, levels, None, given)
    assert isinstance(found, Basis)
    for channel, row in enumerate(np.asarray(levels.rows(moved), np.float64)):
        codes = np.asarray(given.codes, np.float64)
        values = codes @ np.asarray(given.vectors[channel], np.float64)
        b = codes[np.abs(row[:, None] - values).argmin(1)]
        wanted = np.linalg.lstsq(b, row, rcond=None)[0]
        np.testing.assert_allclose(found.vectors[channel], wanted, rtol=2e-2)
    slope = jax.grad(lambda v: jnp.sum(rule.snap(v, levels, found, DONE)))(moved)
    np.testing.assert_array_equal(slope, jnp.ones_like(moved))
    assert rule.parameters(None, levels, None, given) is given


def test_slopes_of_activations_end_at_the_outer_level():
    levels = LearnedLevels(2, "bits")
    x = jnp.linspace(0.05, 3.0, 31)
    basis = fit_basis(levels.rows(x), 2, "bits").basis
    rule = within_levels()
    assert rule.parameters(x, levels, None, basis) is basis
    top = float(jnp.sum(jnp.abs(basis.vectors)))
    slope = np.asarray(jax.grad(lambda v: jnp.sum(rule.snap(v, levels, basis, DONE)))(x))
    np.testing.assert_array_equal(slope[np.asarray(x) < top - 0.1], 1)
    np.testing.assert_array_equal(slope[np.asarray(x) > top + 0.01], 0)


def test_rates_are_those_of_the_card():
    made = lq_nets_qat()
    assert (made, made.batch) == (lq_nets_qat(), 256)
    assert {term.name for term in made.terms} == {"CE"}
    assert "0.1" in repr(made.optimizer)
    assert "(6000, 12000, 17000, 19000, 21000)" in repr(made.optimizer)


@pytest.mark.slow
def test_a_student_on_learned_levels_learns(nets):
    model = nets.tiny()
    images = nets.images(fold_batch_norm(model), 16)
    made = dfq(model, images, Scheme(2, 2), layers="zsq_all_low")
    student = lq_nets(made, images).quantized
    method = lq_nets_qat(steps=6, batch=8, learning_rate=1e-2)
    found, report = trained(
        student, made.reference, method, TrainingSetup(images[:8], images[8:], KEY)
    )
    assert report.steps == 6
    assert np.isfinite(report.after)
    assert isinstance(found.plan.table[Site("conv1")].levels, LearnedLevels)
