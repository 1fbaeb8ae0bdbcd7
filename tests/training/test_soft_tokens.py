"""Language models that learn without text: from soft tokens (ZSAQ), and from what they wrote."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from llamas import llama_file, llama_scores

from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.io.load import load
from dfq_jax.optim.chunk_data import Fed
from dfq_jax.optim.steps import Moving, Now
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.quantization.simulate import simulate
from dfq_jax.recipes.best_training import best_training
from dfq_jax.recipes.zsaq import zsaq
from dfq_jax.training.distance import distance
from dfq_jax.training.engine import TrainingSetup, trained
from dfq_jax.training.images import GENERATOR, STUDENT, Course, StudentNow, Taught, both_answers
from dfq_jax.training.objectives import step_of
from dfq_jax.training.soft_tokens import (
    behind_table,
    generator_at_first,
    soft_tokens,
    table_of,
)
from dfq_jax.training.student import kernel_codes, student_start, trained_at_first
from dfq_jax.training.suits import check_suits
from dfq_jax.training.wrappers import Heard, at_sharpest

KEY = jax.random.key(5)
SIZES = (8, 12, 1, 2, 1, 16, 8)
ROWS = np.random.default_rng(0).integers(3, 16, (12, 8)).astype(np.int32)
METHOD = zsaq(steps=60, batch=4, learning_rate=1e-3, generator_rate=1e-4)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A language model, the file it is of, and itself on levels."""
    path = llama_file(tmp_path_factory.mktemp("tokens") / "net.bin", SIZES)
    model = load(path, size=8).model
    made = calibrate(model, resolve(model.graph, Scheme(3, 8), "zsq_all_low"), jnp.asarray(ROWS))
    return path, model, made


@pytest.fixture(scope="module")
def taught(scene):
    _, model, made = scene
    start = student_start(METHOD.student, made, None)
    x = trained_at_first(METHOD.student, made.plan, start)
    generator = generator_at_first(model, table_of(model))
    return Taught(model, None, {}, start, jnp.asarray(ROWS)), {STUDENT: x, GENERATOR: generator}


def softmax(v):
    e = np.exp(v - v.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_soft_tokens_are_chances_times_the_table(scene, taught):
    path, model, _ = scene
    table = model.params[table_of(model)]["table"]
    wanted = softmax(llama_scores(path, ROWS[:2])) @ np.asarray(table, np.float64)
    found = soft_tokens(taught[1][GENERATOR], model, jnp.asarray(ROWS[:2]))
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_rows_of_the_table_are_what_tokens_stand_for(scene):
    """Behind its table the network is what it was before."""
    path, model, _ = scene
    table = table_of(model)
    looked_up = model.params[table]["table"][ROWS[:3]]
    found = evaluate(behind_table(model, table), looked_up)[0][0]
    np.testing.assert_allclose(found, llama_scores(path, ROWS[:3]), rtol=1e-3, atol=1e-3)


def test_one_climbs_and_the_other_descends(scene, taught):
    """A round changes both; the distance grows by the generator's and falls by the student's."""
    given, x = taught
    course = Course(METHOD, scene[2].plan)
    step = step_of(course, 3.0)
    codes = kernel_codes(METHOD.student, course.plan, x[STUDENT], given.start)
    memory = {STUDENT: {"ranges": {}, "codes": codes}, GENERATOR: ()}
    fed = Fed(given, jnp.int32(0), jnp.arange(12)[None])
    after, _, _ = jax.jit(lambda s: step.take(s, fed, Now(KEY, jnp.int32(0), s.memory)))(
        Moving(x, step.begin(x), memory)
    )
    seeds = jnp.asarray(ROWS)

    @jax.jit
    def apart(generator, student):
        rows = soft_tokens(generator, given.teacher, seeds)
        both = both_answers(course, given, student, rows, StudentNow({}))
        chances = (jax.nn.log_softmax(v.logits) for v in (both.teacher, both.student))
        exact, rough = chances
        return jnp.mean(jnp.sum(jnp.exp(exact) * (exact - rough), -1))

    first = float(apart(x[GENERATOR], x[STUDENT]))
    climbed = float(apart(after.x[GENERATOR], x[STUDENT]))
    descended = float(apart(after.x[GENERATOR], after.x[STUDENT]))
    assert climbed > first
    assert descended < climbed


@pytest.mark.parametrize("reach", [0.0, 0.3])
def test_slopes_at_the_sharpest_of_a_quadratic(reach):
    """`H (x + rho H x / |H x|)`; plain descent at 0, and finite where there is no slope."""
    h = np.array([[3.0, 0.5], [0.5, 1.0]])
    loss = lambda v, _: (0.5 * v @ jnp.asarray(h, jnp.float32) @ v, Heard({}, {}))
    slope = jax.grad(lambda v: at_sharpest(reach, loss, v, jnp.zeros(1))[0])
    x = np.array([0.4, -0.7])
    g = h @ x
    wanted = h @ (x + reach * g / np.linalg.norm(g))
    np.testing.assert_allclose(slope(jnp.asarray(x, jnp.float32)), wanted, rtol=1e-5)
    assert np.isfinite(optax.tree.norm(slope(jnp.zeros(2))))


METHODS = {
    "zsaq": METHOD,
    "best": partial(best_training, rows=True, features=0.0)(
        steps=60, batch=4, learning_rate=1e-3, step_rate=1e-3
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_language_model_learns_without_text(name, scene):
    """By soft tokens, and by rows that it wrote; the distance is that of NumPy."""
    path, model, made = scene
    rows = jnp.asarray(ROWS)
    found, report = trained(made, model, METHODS[name], TrainingSetup(rows[:8], rows[8:], KEY))
    assert report.method == name
    assert report.kept
    assert report.after < 0.9 * report.before
    assert report.changed > 0
    assert found.plan == made.plan
    exact = softmax(llama_scores(path, ROWS[8:]))
    rough = softmax(np.asarray(simulate(found, rows[8:]), np.float64))
    wanted = np.mean(np.sum(exact * (np.log(exact) - np.log(rough)), -1))
    np.testing.assert_allclose(report.after, wanted, rtol=1e-3)
    np.testing.assert_allclose(distance(model, found, rows[8:]), wanted, rtol=1e-3)


def test_what_cannot_learn_so_is_refused(scene, tiny_net):
    _, model, made = scene
    few = jnp.asarray(ROWS[:2])
    with pytest.raises(UsageError, match="takes 4 rows a step and there are 2"):
        trained(made, model, METHOD, TrainingSetup(few, few, KEY))
    with pytest.raises(UnsupportedModelError, match="soft tokens are for networks"):
        table_of(tiny_net)
    with pytest.raises(UsageError, match="zsaq shows rows of ids, and this network reads an image"):
        check_suits(METHOD, tiny_net)
    with pytest.raises(UsageError, match=r'best shows images.*method "best" or "zsaq"'):
        check_suits(best_training(), model)
