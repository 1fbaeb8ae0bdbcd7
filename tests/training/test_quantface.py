"""QuantFace: its schedule, its optimizer beside PyTorch's, a student that turns to its teacher."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.tasks import Embedding
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.quantization.simulate import simulate
from dfq_jax.recipes.quantface import quantface
from dfq_jax.recipes.trainings import retraining_for, scheme_for, training_for
from dfq_jax.training.engine import TrainingSetup, trained
from dfq_jax.training.tracking import Tracking

KEY = jax.random.key(4)


def test_goes_as_released():
    made = quantface()
    assert (made.steps, made.batch, made.steps // made.epoch) == (11 * (528_227 // 512), 512, 11)
    assert made.student.tracking == Tracking(300, None)
    assert made.student.live
    assert [(term.name, term.weight, term.classes) for term in made.terms] == [("MSE", 1.0, False)]
    assert made == quantface()
    assert hash(made) == hash(quantface())
    assert scheme_for("quantface") == "w6a6"


@pytest.mark.torch
@pytest.mark.parametrize("size", [0.5, 40.0])
def test_steps_are_those_of_pytorch(size):
    """Clipped to a length of 5, decay added behind that, Nesterov's momentum; slower at last."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start, slopes = rng.normal(size=6), rng.normal(size=(11, 6)) * size
    theirs = torch.nn.Parameter(torch.tensor(start))
    sgd = torch.optim.SGD(
        [theirs], lr=0.1 * 64 / 512, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    rule = quantface(steps=11, batch=64).optimizer(1.0)
    ours: Any = jnp.asarray(start, jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        state, update = rule.init(ours), jax.jit(rule.update)
    for step, slope in enumerate(slopes):
        theirs.grad = torch.tensor(slope)
        torch.nn.utils.clip_grad_norm_([theirs], 5.0)
        sgd.param_groups[0]["lr"] = 0.1 * 64 / 512 * (0.1 if step == 10 else 1.0)
        sgd.step()
        with jax.numpy_dtype_promotion("standard"):
            moved, state = update(jnp.asarray(slope, jnp.float32), state, ours)
        ours = optax.apply_updates(ours, moved)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_student_turns_to_the_float_network(nets):
    """It is judged as it learns, by directions: scores of classes got further apart here."""
    model = nets.tiny()
    folded = fold_batch_norm(model)
    images = nets.images(folded, 8)
    student = calibrate(folded, resolve(folded.graph, Scheme(4, 4), "zsq_all_low"), images)
    method = quantface(steps=40, batch=8, learning_rate=6.4)
    made, report = trained(
        student, folded, method, TrainingSetup(images, images, KEY), unfolded=model
    )
    assert report.kept
    assert report.after < 0.7 * report.before
    unit = lambda v: np.asarray(v) / np.linalg.norm(v, axis=-1, keepdims=True)
    cosines = (unit(evaluate(folded, images)[0][0]) * unit(simulate(made, images))).sum(-1)
    np.testing.assert_allclose(report.after, 2 - 2 * cosines.mean(), rtol=1e-2)


def test_outputs_that_are_said_to_be_embeddings_are_no_scores(tiny_net):
    """Ours needs no classes there, though a vector looks like scores."""
    assert training_for("best", 3, 2, model=tiny_net).classes == ("KL",)
    said = training_for("best", 3, 2, model=tiny_net, task=Embedding())
    assert (said.classes, said.directions) == ((), True)
    left = retraining_for(tiny_net, 3, Embedding())
    assert (left.classes, left.directions) == ((), True)
    assert retraining_for(tiny_net, 3).classes == ("KL",)
