"""FDDA with training: two batches of a generator, and real images beside those made."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import UsageError
from dfq_jax.examples import Examples
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.optim.steps import Among, Now
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.recipes.fdda_qat import centres_said, fdda_qat
from dfq_jax.recipes.trainings import training_for
from dfq_jax.synthesis.sources.augment import unchanged
from dfq_jax.synthesis.sources.pixels import from_natural, to_pixels
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.engine import TrainingSetup, fed, taught_of, trained
from dfq_jax.training.generator import begun_generator, generated_images
from dfq_jax.training.images import Course, generator_loss, normalised, shown_images
from dfq_jax.training.method import Training
from dfq_jax.training.student import student_start
from dfq_jax.training.suits import check_images

KEY = jax.random.key(6)


@pytest.fixture(scope="module")
def model(nets):
    return nets.tiny()


@pytest.fixture(scope="module")
def real(nets, model):
    images = nets.images(model, 4, seed=9)
    return Examples((images,), model.inputs, {"method": "given"}, "given")


@pytest.fixture(scope="module")
def method(model, real) -> Training:
    made = fdda_qat(centres_said(model, real), steps=3, batch=6, warmup=1)
    source: Any = made.images
    kind = source.kind._replace(channels=(4, 4))
    return made._replace(images=source._replace(kind=kind, augment=unchanged))


@pytest.fixture(scope="module")
def school(model, nets, real, method):
    folded = fold_batch_norm(model)
    plan = resolve(folded.graph, Scheme(4, 4), "zsq_all_low")
    student = calibrate(folded, plan, nets.images(folded, 8))
    start = student_start(method.student, student, model)
    return student, folded, taught_of(method, folded, model, start, real.images, KEY)


def test_values_are_those_of_the_card(model, real):
    found = centres_said(model, real)
    made = fdda_qat(found)
    source: Any = made.images
    assert made == fdda_qat(found)
    weights = {term.name: term.weight for term in source.terms}
    assert weights == {"CE": 1.0, "BNS": 0.2, "D_BNS": 0.9, "C_BNS": 0.01}
    assert {term.name: term.weight for term in made.terms} == {"CE": 1.0, "KL": 20.0}
    assert (source.real, made.batch) == (16, 16)
    with pytest.raises(UsageError, match="few real images"):
        training_for("fdda_qat", 3, 2, model=model)
    made_of_it = dataclasses.replace(real, evidence="statistics")
    with pytest.raises(UsageError, match="made from the network"):
        training_for("fdda_qat", 3, 2, model=model, images=made_of_it)
    named = training_for("fdda_qat", 3, 2, model=model, images=real)
    assert named == fdda_qat(found, steps=3, batch=2)


def test_classes_of_centres_are_those_the_network_sees(model, real):
    centres = centres_said(model, real)
    seen = np.argmax(evaluate(model, real.images)[0][0], -1)
    assert set(np.flatnonzero(centres.seen).tolist()) == set(seen.tolist())
    np.testing.assert_array_equal(centres.right, centres.seen)


def sized(observed):
    """The mean over a batch of what only the second half has."""
    natural, half = observed.natural, len(observed.natural) // 2
    first, second = natural[:half], natural[half:]
    means = [jnp.max(jnp.abs(jnp.mean(part, (0, 1, 2)))) for part in (first, second)]
    classes = jnp.argmax(observed.labels[half:], -1)
    return jnp.stack([*means, jnp.ptp(classes).astype(jnp.float32), jnp.float32(half)]).sum()


def test_the_second_batch_is_of_one_class_and_has_norms_of_its_own(method, school):
    """Each half has mean 0 in every colour, and the second holds one label."""
    student, _, taught = school
    source: Any = method.images
    x = begun_generator(source.kind, KEY, taught.teacher.contract.shape, 5)
    probe = method._replace(images=source._replace(terms=(Term("probe", 1.0, sized),)))
    fed_now: Any = type("Fed", (), {"context": taught})
    now = Now(KEY, jnp.int32(0), ())
    loss, _ = generator_loss(Course(probe, student.plan), x, Among(fed_now, {}), now)
    assert float(loss) == pytest.approx(6, abs=1e-3)


def test_students_see_real_images_with_what_the_teacher_says_of_them(method, school, real):
    student, teacher, taught = school
    source: Any = method.images
    x = begun_generator(source.kind, KEY, teacher.contract.shape, 5)
    rows = np.asarray(fed(method, 4, (0,), 0, 2))
    assert rows.shape == (2, 4)  # six are asked for, and there are four
    shown = shown_images(Course(method, student.plan), taught, jnp.asarray(rows[0]), x, KEY)
    assert shown.labels is not None
    assert len(shown.images) == len(shown.labels) == 10
    pixels = jnp.asarray(to_pixels(real.images, teacher.contract))
    given = normalised(pixels[rows[0]], teacher.contract)
    np.testing.assert_allclose(shown.images[:4], given, atol=1e-5)
    said = np.argmax(evaluate(teacher, given)[0][0], -1)
    np.testing.assert_array_equal(np.argmax(shown.labels[:4], -1), said)
    made, labels = generated_images(source.kind, x, KEY, 6, 5)
    np.testing.assert_allclose(shown.images[4:], from_natural(made, teacher.contract), atol=1e-5)
    np.testing.assert_array_equal(shown.labels[4:], labels)
    with pytest.raises(UsageError, match="6 real images in every round"):
        check_images(method, 0)


@pytest.mark.slow
def test_it_plays(method, school, model, real, nets):
    student, teacher, _ = school
    judges = nets.images(model, 8)
    _, report = trained(
        student, teacher, method, TrainingSetup(real.images, judges, KEY), unfolded=model
    )
    assert report.steps == 3
    assert np.isfinite(report.after)
