"""Channels pruned by scales that learn: silence first, then the cut."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.select import select
from dfq_jax.pruning.groups import Subject
from dfq_jax.quantization.plan import Plan
from dfq_jax.recipes.zhu import zhu_pruning
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.gates import (
    gates_of,
    l1_of_gates,
    pruned_by_scales,
    standing_sets,
    widths_of_maps,
)
from dfq_jax.training.in_float import NO_LEVELS
from dfq_jax.training.losses import symmetric_divergence
from dfq_jax.training.method import FixedImages, Training, to_zero
from dfq_jax.training.student import (
    StudentKind,
    StudentStart,
    trained_at_first,
    unfolded_student,
)

KEY = jax.random.key(9)


@pytest.fixture(scope="module")
def model(nets):
    return nets.tiny()


def test_norms_that_a_sum_joins_share_a_scale(model):
    coupled = Subject(model).coupled
    gates = gates_of(coupled, model)
    assert set(gates) == {"bn1", "bn2", "bn3", "bn4"}
    np.testing.assert_array_equal(gates["bn1"], gates["bn3"])
    assert not set(np.asarray(gates["bn4"]).tolist()) & set(np.asarray(gates["bn1"]).tolist())
    widths = widths_of_maps(coupled, model)
    assert widths[np.asarray(gates["bn1"])[0] - 1] == 8
    assert widths[np.asarray(gates["bn4"])[0] - 1] == 2
    x: Any = {"gates": {"channels": jnp.asarray([1.0, -2.0])}}
    assert float(l1_of_gates(np.array([0.5, 0.25, 1.0]), x)) == pytest.approx(1.0)


def test_what_is_silent_is_cut_without_a_trace(model, nets):
    """With some scales at 0, the network and what is left of it say the same."""
    coupled, images = Subject(model).coupled, nets.images(model, 4)
    start = StudentStart(model, {}, gates=gates_of(coupled, model))
    plan: Plan = NO_LEVELS
    x = trained_at_first(StudentKind(live=True), plan, start)
    said = evaluate(model, images)[0][0]
    found = evaluate(unfolded_student(x, start), images)[0][0]
    np.testing.assert_allclose(found, said, atol=1e-5)
    scales = np.where(np.arange(len(coupled)) % 3 == 0, 0.0, 1.3).astype(np.float32)
    x["gates"]["channels"] = jnp.asarray(scales)[: len(x["gates"]["channels"])]
    silent = unfolded_student(x, start)
    kept = standing_sets(coupled, scales, 0.1)
    small = select(silent, coupled, kept)
    assert 0 < kept.sum() < len(kept)
    whole = evaluate(silent, images)[0][0]
    np.testing.assert_allclose(evaluate(small, images)[0][0], whole, atol=1e-4)
    assert np.abs(np.asarray(whole - said)).max() > 1e-2


def test_a_layer_is_never_emptied(model):
    coupled = Subject(model).coupled
    kept = standing_sets(coupled, np.linspace(0, 0.01, len(coupled)), 0.1)
    assert kept.sum() == len(coupled.groups())


def test_a_weight_on_scales_removes_channels(model, nets):
    images = nets.images(model, 16)
    kl = Term("KL", 1.0, symmetric_divergence, True)
    how = (StudentKind(), FixedImages(), (kl,), to_zero(optax.adam, 0.05, 40))
    method = Training("scales", 40, 16, *how)
    found = pruned_by_scales(model, images, method, KEY, scales=0.05)
    assert 0 < found.kept.sum() < len(found.kept)
    assert (found.scales[~found.kept] < 0.1).all()
    assert np.isfinite(evaluate(fold_batch_norm(found.model), images)[0][0]).all()


def test_values_are_those_of_the_card():
    made = zhu_pruning()
    source: Any = made.images
    assert made == zhu_pruning()
    assert (source.lessons, made.batch, made.name) == (10, 128, "zhu_pruning")
    assert made.student == StudentKind(live=True)
    assert made.project is None
    assert made.terms[0].fn is symmetric_divergence
