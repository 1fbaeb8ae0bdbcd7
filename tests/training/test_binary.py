"""Kernels and activations of one bit: against NumPy, and what the cards of their papers say."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import ExportError, PlanError, UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.ops import Clip, Relu
from dfq_jax.io.onnx.export import quantized_onnx
from dfq_jax.numerics.levels import scales_of
from dfq_jax.numerics.signs import Alpha, Signs
from dfq_jax.optim.progress import Watcher
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, Site, resolve
from dfq_jax.quantization.simulate import simulate
from dfq_jax.recipes.dir_net import dir_net
from dfq_jax.recipes.gdfq import gdfq
from dfq_jax.recipes.ir_net import ir_net
from dfq_jax.recipes.trainings import check_kernels, scheme_for
from dfq_jax.recipes.zhu import zhu
from dfq_jax.training.binary import (
    balanced_signs,
    centred_kernel,
    error_decay,
    estimated_sign,
    held_signs,
    signed_activations,
    standardised_kernel,
    within_delta,
)
from dfq_jax.training.binary_start import on_binary_activations, with_hard_tanh
from dfq_jax.training.engine import TrainingSetup, trained
from dfq_jax.training.images import share_taken
from dfq_jax.training.level_rules import DONE
from dfq_jax.training.losses import (
    Answers,
    Lesson,
    attention_transfer,
    symmetric_divergence,
)
from dfq_jax.training.method import FixedImages
from dfq_jax.training.own_norms import begun_student
from dfq_jax.training.student import (
    binary_layers,
    finished,
    float_student,
    kernel_codes,
    student_start,
    trained_at_first,
    viewed,
)

KEY = jax.random.key(8)
KERNEL = jax.random.normal(KEY, (3, 3, 16, 4)) * jnp.asarray([0.5, 1.0, 2.0, 4.0]) + 0.3


@pytest.fixture(scope="module")
def school(nets):
    """A network, its start on signs, images to learn from and others that judge."""
    model = nets.tiny()
    folded = fold_batch_norm(model)
    images = nets.images(folded, 20)
    start = calibrate(folded, resolve(folded.graph, Scheme(1, 8)), images[:8])
    return model, start, folded, images[:12], images[12:]


def test_the_estimator_grows_steeper_as_published():
    """The card's values for 400 epochs."""
    decay = error_decay()
    for epoch, t, k in ((0, 1e-3, 1e3), (100, 1e-2, 1e2), (200, 0.1, 10), (300, 1, 1)):
        np.testing.assert_allclose(decay(epoch / 400), (t, k), rtol=1e-5)
    np.testing.assert_allclose(decay(399 / 400), (9.772, 1), rtol=1e-3)
    np.testing.assert_allclose(error_decay(rest=0.5)(0.5), (1e-3, 1e3), rtol=1e-5)
    np.testing.assert_allclose(error_decay(rest=0.5)(0.75), (0.1, 10), rtol=1e-5)


def test_slopes_of_signs_are_those_of_the_estimator():
    x = jnp.linspace(-2, 2, 41)
    t, k = error_decay()(0.8)
    slope = jax.grad(lambda v: jnp.sum(estimated_sign(v, t, k)))(x)
    wanted = float(k * t) * (1 - np.tanh(float(t) * np.asarray(x)) ** 2)
    np.testing.assert_allclose(slope, wanted, rtol=1e-4, atol=1e-6)
    assert set(np.asarray(estimated_sign(x, t, k)).tolist()) == {-1.0, 1.0}
    assert float(estimated_sign(jnp.zeros(1), t, k)[0]) == 1.0


def test_balanced_signs_against_numpy():
    w = np.asarray(KERNEL, np.float64)
    unit = (w - w.mean((0, 1, 2))) / w.std((0, 1, 2), ddof=1)
    np.testing.assert_allclose(standardised_kernel(KERNEL), unit, rtol=1e-3, atol=1e-5)
    power = 2 ** np.round(np.log2(np.abs(unit).mean((0, 1, 2))))
    np.testing.assert_array_equal(power, 1)  # of a normal 0.8, which rounds to 1
    found = balanced_signs(error_decay())(KERNEL, 3 * KERNEL, DONE)
    wanted = np.where(unit < 0, -1, 1) * power * 3 * w.std((0, 1, 2), ddof=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-3)
    positive = (np.asarray(found) > 0).mean((0, 1, 2))
    assert (np.abs(positive - 0.5) < 0.1).all()
    np.testing.assert_allclose(np.mean(centred_kernel(KERNEL), (0, 1, 2)), 0, atol=1e-5)


def test_held_signs_pass_slopes_and_stay_within(school):
    held = held_signs()
    found = held(KERNEL, KERNEL, DONE)
    size = np.abs(np.asarray(KERNEL)).mean((0, 1, 2))
    np.testing.assert_allclose(found, np.where(KERNEL < 0, -1, 1) * size, rtol=1e-5)
    slope = jax.grad(lambda v: jnp.sum(held(v, KERNEL, DONE)))(KERNEL)
    np.testing.assert_array_equal(slope, jnp.ones_like(KERNEL))
    one = held_signs(delta=0.1)(KERNEL, KERNEL, DONE)
    np.testing.assert_allclose(np.abs(one), 0.1, rtol=1e-6)
    model, quantized, *_ = school
    start = student_start(zhu().student, quantized, model)
    x = trained_at_first(zhu().student, quantized.plan, start)
    far = jax.tree.map(lambda v: 100 * v, x)
    kept = within_delta()(far, start)
    assert binary_layers(start) == ("depthwise", "project", "conv2")
    for name in ("depthwise", "conv2"):
        first = np.asarray(start.model.params[name]["kernel"])
        most = np.abs(first).mean(tuple(range(first.ndim - 1)))
        assert (np.abs(kept["weights"][name]["kernel"]) <= most + 1e-6).all()
        assert (np.abs(far["weights"][name]["kernel"]) > most).any()
    np.testing.assert_array_equal(
        kept["weights"]["conv1"]["kernel"], far["weights"]["conv1"]["kernel"]
    )


@pytest.mark.parametrize("make", [zhu, ir_net, dir_net])
def test_binary_students_end_on_signs(school, make):
    """Behind norms that are live, codes are the signs of the paper's kernel and scales its size."""
    model, quantized, *_ = school
    kind = make(steps=5).student
    start = student_start(kind, quantized, model)
    x = trained_at_first(kind, quantized.plan, start)
    moved = jax.tree.map(lambda v: v * 1.05 + 0.01, x)
    result = finished(kind, quantized.plan, moved, start, {})
    found = float_student(kind, moved, start)
    for name in binary_layers(start):
        site = Site(name)
        exact = np.asarray(found.params[name]["kernel"])
        alpha = result.qparams[site]
        assert isinstance(alpha, Alpha)
        scale = np.broadcast_to(np.asarray(alpha.scale), exact.shape)
        np.testing.assert_allclose(np.abs(exact), scale, rtol=1e-4)
        codes = kernel_codes(kind, quantized.plan, moved, start)[name]
        np.testing.assert_array_equal(codes, np.sign(exact))
    assert np.isfinite(simulate(result, school[3])).all()
    assert quantized_onnx(result) is not None


def test_norms_begin_with_statistics_of_the_student(school):
    """Behind every norm a channel has the mean and variance that it has in the teacher."""
    model, quantized, _, images, _ = school
    kind = ir_net().student
    kernels = tuple(each for each in quantized.plan.entries if each[0].argument is None)
    plan = dataclasses.replace(quantized.plan, entries=kernels, groups=())
    start = begun_student(kind, dataclasses.replace(quantized, plan=plan), model, images)
    changed = viewed(kind, start.model, start)
    names = ("bn1", "bn2", "bn3", "bn4")
    taps = [evaluate(each, images, taps=names)[1] for each in (model, changed)]
    assert np.abs(changed.params["bn4"]["mean"] - model.params["bn4"]["mean"]).max() > 1e-3
    for name in names:
        exact, found = (np.asarray(t[name], np.float64) for t in taps)
        np.testing.assert_allclose(found.mean((0, 1, 2)), exact.mean((0, 1, 2)), atol=2e-3)
        np.testing.assert_allclose(found.var((0, 1, 2)), exact.var((0, 1, 2)), rtol=2e-3)
    plain = begun_student(gdfq().student, quantized, model, images)
    assert plain.model is model


def answers(seed, logits=None):
    taps = {"relu3": jax.random.normal(jax.random.key(seed), (3, 4, 4, 6))}
    nothing: Any = None
    scores = jax.random.normal(jax.random.key(seed + 10), (3, 5)) if logits is None else logits
    return Answers(scores, taps, nothing)


def test_losses_of_zhu(nets):
    model = nets.tiny()
    t, s = answers(0), answers(1)
    t, s = (a._replace(model=model) for a in (t, s))
    nothing: Any = None
    lesson, other = (Lesson(nothing, nothing, a, b, KEY) for a, b in ((t, s), (s, t)))
    log = lambda v: np.asarray(v) - np.log(np.exp(np.asarray(v)).sum(1, keepdims=True))
    p, q = log(t.logits), log(s.logits)
    both = ((np.exp(p) * (p - q)).sum(1) + (np.exp(q) * (q - p)).sum(1)).mean() / 2
    assert float(symmetric_divergence(lesson)) == pytest.approx(both, rel=1e-4)
    assert float(symmetric_divergence(other)) == pytest.approx(both, rel=1e-4)
    of = lambda graph: ("relu3",)
    energy = lambda a: (np.asarray(a.taps["relu3"]) ** 2).mean(-1).reshape(3, -1)
    unit = lambda v: v / np.sqrt((v**2).sum(1, keepdims=True))
    gap = np.sqrt(((unit(energy(t)) - unit(energy(s))) ** 2).sum(1)).mean()
    assert float(attention_transfer(of=of)(lesson)) == pytest.approx(gap, rel=1e-3)
    same = Lesson(nothing, nothing, t, t, KEY)
    assert float(attention_transfer(of=of)(same)) < 1e-3
    assert float(symmetric_divergence(same)) == 0.0


def test_activations_on_signs(school):
    model, _, folded, images, _ = school
    signed = fold_batch_norm(with_hard_tanh(model))
    kinds = {type(n.op) for n in signed.graph.nodes}
    assert Clip in kinds
    assert Relu not in kinds
    plan = resolve(signed.graph, Scheme(1, 2), "qdrop_8bit_ends_shortcuts")
    begun = calibrate(signed, plan, images)
    made = on_binary_activations(begun, images)
    low = [s for s, spec in made.plan.entries if s.argument is not None and spec.levels.bits == 1]
    assert low
    table = made.plan.table
    tensor, sites = next((t, s) for t, s in made.plan.groups if table[s[0]].levels == Signs(None))
    _, taps = evaluate(signed, images, taps=(tensor,))
    size = np.abs(np.asarray(taps[tensor])).mean()
    np.testing.assert_allclose(scales_of(made.qparams[sites[0]]), size, rtol=1e-4)
    with pytest.raises(ExportError, match="signs"):
        quantized_onnx(made)
    with pytest.raises(PlanError, match="w1a2"):
        on_binary_activations(
            calibrate(folded, resolve(folded.graph, Scheme(1, 8)), images), images
        )


@pytest.mark.parametrize("own", [False, True])
def test_the_slope_of_signed_activations(own):
    decay, two = error_decay(), Alpha(jnp.float32(2))
    x = jnp.linspace(-3, 3, 31)
    rule, unit = signed_activations(decay, in_deviations=own), float(jnp.std(x)) if own else 1.0
    slope = jax.grad(lambda v: jnp.sum(rule.snap(v, Signs(None), two, 0.9)))(x)
    t, k = (float(v) for v in decay(0.9))
    wanted = 2 * k * t * (1 - np.tanh(t * np.asarray(x) / unit) ** 2) / unit
    np.testing.assert_allclose(slope, wanted, rtol=1e-3, atol=1e-5)
    assert set(np.asarray(rule.snap(x, Signs(None), two, 0.9)).tolist()) == {-2.0, 2.0}


def test_shares_count_the_steps_of_the_student():
    made = gdfq(steps=100, warmup=20)
    share = lambda step, times=1: float(share_taken(made, jnp.int32(step), times))
    np.testing.assert_allclose([share(0), share(20), share(70), share(120)], [0, 0, 0.5, 1])
    np.testing.assert_allclose(float(share_taken(zhu(steps=100), jnp.int32(50), 10)), 0.5)


def test_methods_of_signs_need_some():
    assert {scheme_for(name) for name in ("zhu", "ir_net", "dir_net")} == {"w1a8"}
    assert scheme_for("gdfq") == scheme_for(gdfq()) == "w4a4"
    check_kernels(zhu(), {1, 8})
    check_kernels(gdfq(), {4})
    with pytest.raises(UsageError, match='scheme="w1a8"'):
        check_kernels(zhu(), {4})


@pytest.mark.slow
@pytest.mark.parametrize("make", [ir_net, partial(dir_net, attention=1.0)])
def test_they_learn(school, make):
    """With binary activations too, from a network with other activations than its teacher."""
    model, quantized, folded, images, judges = school
    signed = with_hard_tanh(model)
    plan = resolve(fold_batch_norm(signed).graph, Scheme(1, 2), "qdrop_8bit_ends_shortcuts")
    begun = on_binary_activations(calibrate(fold_batch_norm(signed), plan, images), images)
    for start, unfolded, both in ((quantized, model, False), (begun, signed, True)):
        made = make(steps=60, batch=12, learning_rate=1e-3, activations=both)
        method, told = made._replace(images=FixedImages()), []
        watch = Watcher(progress=lambda p, told=told: told.append(p.parts["loss"]))
        setup = TrainingSetup(images, judges, KEY, watch=watch)
        made, report = trained(start, folded, method, setup, unfolded=unfolded)
        assert told[-1] < told[0]
        assert report.changed > 0
        assert made.plan == start.plan


@pytest.mark.slow
def test_zhu_plays(school):
    model, quantized, folded, images, judges = school
    made = zhu(steps=4, batch=4)
    source: Any = made.images
    kind = source.kind._replace(channels=(4, 4))
    method = made._replace(images=source._replace(kind=kind, lessons=2))
    _, report = trained(
        quantized, folded, method, TrainingSetup(images, judges, KEY), unfolded=model
    )
    assert report.steps == 4
    assert np.isfinite(report.after)
