"""A generator and a quantized student in turn: the engine carries training without data.

Xu et al. 2020, "Generative Low-bitwidth Data Free Quantization": the generator makes images that
the network knows by their labels and that match its batch norms; the student learns to say of them
what the network says.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.numerics.rounding import straight_through
from dfq_jax.numerics.softmax import divergence
from dfq_jax.optim.fit import fit
from dfq_jax.optim.state import StateStore
from dfq_jax.optim.steps import Player, descent, in_turn
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.reconstruction.method import Phase, Rates
from dfq_jax.reconstruction.objective import DrawnShare, UnitContext, optimizer_of, training_hook
from dfq_jax.reconstruction.phases import begun, biases_of, coarse_edges
from dfq_jax.synthesis.recipe import random_labels
from dfq_jax.synthesis.sources.generator import codes_and_generator, generated
from dfq_jax.synthesis.sources.pixels import from_natural
from dfq_jax.synthesis.terms.base import cross_entropy
from dfq_jax.synthesis.terms.match import batch_var_gap, squared_mean
from dfq_jax.synthesis.terms.targets import batch_norm_targets, observe
from dfq_jax.values import bound

KEY = jax.random.key(11)
CLASSES, CODE, BATCH = 5, 8, 16
PHASE = Phase(1, biases=True, quantized=1.0)
ROUNDS = 120


class Told(NamedTuple):
    """What both players are given: the teacher, what it recorded, and the student untrained."""

    teacher: Any
    targets: Any
    given: UnitContext


def drawn(key):
    """Codes that end in labels, and the labels."""
    code_key, label_key = jax.random.split(key)
    labels = random_labels(label_key, BATCH, CLASSES)
    return jnp.concatenate([jax.random.normal(code_key, (BATCH, CODE)), labels], 1), labels


def images_of(teacher, generator, codes):
    return from_natural(generated({"latent": codes, "generator": generator}), teacher.contract)


def scores(plan, student, given, images):
    hook = training_hook(plan, straight_through(), PHASE, student, given, DrawnShare(KEY))
    return evaluate(given.model, images, hook=hook)[0][0]


def generator_loss(x, among, now):
    """Labels that the teacher tells, and its batch norms' statistics (Eq. 2 to 5)."""
    codes, labels = drawn(now.key)
    told: Told = among.context
    seen = observe(told.teacher, told.targets, images_of(told.teacher, x, codes))
    gaps = [squared_mean(batch_var_gap(seen.stats[k], t)) for k, t in told.targets.items()]
    parts = {"labels": cross_entropy(seen.logits, labels), "statistics": sum(gaps)}
    return parts["labels"] + 0.1 * parts["statistics"], (parts, ())


def student_loss(plan, x, among, now):
    """What the teacher says of the generator's images; of a random teacher, no labels (Eq. 8)."""
    codes, _ = drawn(now.key)
    told: Told = among.context
    images = images_of(told.teacher, among.others["generator"], codes)
    wanted, found = evaluate(told.teacher, images)[0][0], scores(plan, x, told.given, images)
    return divergence(wanted, found), ({}, ())


@pytest.fixture(scope="module")
def game(nets):
    teacher = nets.tiny()
    folded = fold_batch_norm(teacher)
    plan = resolve(folded.graph, Scheme(2, 4))
    quantized = calibrate(folded, plan, nets.images(folded, 16))
    kernels, fixed = begun(folded, quantized.affines, plan, straight_through())
    edges, biases = coarse_edges(plan, quantized.affines), biases_of(folded)
    student = {"kernels": kernels, "edges": edges, "biases": biases, "borders": {}}
    given = UnitContext(folded, quantized.affines, fixed, jnp.float32(1.0))
    shape = (BATCH, *teacher.contract.shape)
    generator = codes_and_generator(CODE + CLASSES, (8, 8), KEY, shape)["generator"]
    told = Told(teacher, batch_norm_targets(teacher)[0], given)
    rates = Rates(bits=2e-2, scale=2e-3, edges=2e-3, biases=2e-3, relative=True)
    student_rates = bound(optimizer_of, rates, 2 * ROUNDS)
    step = in_turn(
        Player("generator", descent(generator_loss, bound(optax.adam, 3e-3))),
        Player("student", descent(bound(student_loss, plan), student_rates), 2),
    )
    return step, {"generator": generator, "student": student}, told, plan


def play(game, steps=ROUNDS, **how):
    step, x, told, _ = game
    memory = dict.fromkeys(x, ())
    return fit(step, x, told, steps=steps, key=KEY, memory=memory, chunk=20, **how)


@pytest.mark.slow
def test_the_student_learns_what_the_teacher_says(game):
    """Of images that neither has seen: those of the last generator, and noise."""
    _, begun_at, told, plan = game
    found = play(game)
    assert found.status == "finished"
    codes, _ = drawn(jax.random.key(99))
    images = images_of(told.teacher, found.x["generator"], codes)
    gap = lambda student: float(
        divergence(evaluate(told.teacher, images)[0][0], scores(plan, student, told.given, images))
    )
    before, after = gap(begun_at["student"]), gap(found.x["student"])
    assert after < 0.5 * before
    history = found.history["generator/labels"]
    assert np.mean(history[-20:]) < np.mean(history[:20])  # the generator gets better, too


@pytest.mark.slow
def test_a_game_that_was_killed_ends_the_same(game, tmp_path):
    def stop(step, metrics):
        if step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(game, 40, store=StateStore(tmp_path, {}), on_chunk=stop)
    again, whole = play(game, 40, store=StateStore(tmp_path, {})), play(game, 40)
    assert again.history["loss"].shape == (20,)
    jax.tree.map(np.testing.assert_array_equal, again.x, whole.x)
