"""What is left of a pruned network learns from the whole one, in float."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfq_jax.errors import UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.ops import BatchNorm
from dfq_jax.graph.rewrite import with_params
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.select import select, standing
from dfq_jax.pruning.groups import Subject
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.engine import TrainingSetup
from dfq_jax.training.in_float import norms_following, trained_in_float
from dfq_jax.training.losses import block_outputs, distillation, feature_gap
from dfq_jax.training.method import FixedImages, Training, to_zero
from dfq_jax.training.student import StudentKind

KEY = jax.random.key(2)


def lesson(steps=30, rate=3e-3, batch=8):
    terms = (Term("KL", 1.0, distillation(), True), Term("FitNets", 1.0, feature_gap()))
    rates = to_zero(optax.adam, rate, steps)
    return Training(
        "lesson", steps, batch, StudentKind(), FixedImages(), terms, rates, watch=block_outputs
    )


@pytest.fixture(scope="module")
def school(nets):
    """A network, half of whose channels are gone, images to learn from and others that judge."""
    whole = nets.tiny()
    subject = Subject(whole)
    kept = np.arange(len(subject.coupled)) % 2 == 0
    left = standing(subject.coupled, kept)
    stays = {
        name: np.flatnonzero(left[axes[-1]])
        for name, axes in subject.coupled.tensors.items()
        if axes and not left[axes[-1]].all()
    }
    images = nets.images(whole, 40)
    setup = TrainingSetup(images[:28], images[28:], KEY)
    return select(whole, subject.coupled, kept), whole, setup, stays


def test_it_learns_of_a_wider_teacher_and_keeps_its_shapes(school):
    small, whole, setup, stays = school
    assert stays
    found, report = trained_in_float(small, whole, lesson(), setup, stays=stays)
    assert report.kept
    assert report.after < 0.8 * report.before
    assert found.graph == small.graph
    shapes = lambda model: {k: {s: v.shape for s, v in x.items()} for k, x in model.params.items()}
    assert shapes(found) == shapes(small)


def test_zeros_stay_zero(school):
    small, whole, setup, stays = school
    kernel = np.array(small.params["conv2"]["kernel"])
    kernel[..., ::2, :] = 0
    holed = with_params(small, {"conv2": {"kernel": jnp.asarray(kernel)}})
    masks = {"conv2": kernel != 0}
    made, report = trained_in_float(holed, whole, lesson(4), setup, stays=stays, masks=masks)
    assert report.kept
    found = np.asarray(made.params["conv2"]["kernel"])
    assert not found[~masks["conv2"]].any()
    assert (found != kernel)[masks["conv2"]].any()


def test_what_is_worse_is_left(school):
    small, whole, setup, stays = school
    ruin = lesson(4, 30.0)
    found, report = trained_in_float(small, whole, ruin, setup, stays=stays)
    assert found is small
    assert not report.kept


def test_fewer_images_than_a_step_takes(school):
    small, whole, setup, stays = school
    with pytest.raises(UsageError, match="takes 64 images a step and there are 28"):
        trained_in_float(small, whole, lesson(batch=64), setup, stays=stays)


def test_norms_follow_and_the_function_stays(nets):
    """Statistics of a network that doubled what a norm reads: four times the variance."""
    model = nets.tiny()
    images = nets.images(model, 16)
    norm = next(n for n in model.graph.nodes if isinstance(n.op, BatchNorm))
    made = model.params[norm.inputs[0]]
    louder = with_params(
        model,
        {
            norm.inputs[0]: {"kernel": 2 * made["kernel"]}
            | ({"bias": 2 * made["bias"]} if "bias" in made else {})
        },
    )
    found = norms_following(model, louder, images)
    np.testing.assert_allclose(
        evaluate(found, images)[0][0], evaluate(louder, images)[0][0], rtol=1e-4, atol=1e-5
    )
    old, new = model.params[norm.name], found.params[norm.name]
    np.testing.assert_allclose(new["var"], 4 * np.asarray(old["var"]), rtol=1e-3)
    _, taps = evaluate(model, images, taps=(norm.inputs[0],))
    mean = np.mean(np.asarray(taps[norm.inputs[0]]), (0, 1, 2))
    np.testing.assert_allclose(new["mean"], np.asarray(old["mean"]) + mean, rtol=1e-3, atol=1e-5)
    assert fold_batch_norm(found).graph == fold_batch_norm(model).graph
