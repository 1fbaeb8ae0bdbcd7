"""Rows of a batch over devices, and layers in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfq_jax.base.parallel import HERE, Machine
from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Node
from dfq_jax.graph.ops import Linear, Relu
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.recipes.gdfq import gdfq
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.engine import TrainingSetup, generators, learned_by, taught_of, trained
from dfq_jax.training.images import GENERATOR, Course
from dfq_jax.training.level_rules import learned_steps
from dfq_jax.training.losses import distillation
from dfq_jax.training.method import FixedImages, Training, on_gradient_grid
from dfq_jax.training.on_machine import apply_mixed, check_machine
from dfq_jax.training.own_norms import begun_student
from dfq_jax.training.student import StudentKind
from dfq_jax.values import bound

KEY = jax.random.key(3)
STEPS, BATCH = 4, 8


def descent(factor, rate):
    return optax.sgd(factor * rate)


LESSON = Training(
    "lesson",
    STEPS,
    BATCH,
    StudentKind(learned_steps(), learned_steps(images=True)),
    FixedImages(),
    (Term("KL", 1.0, distillation(temperature=2.0), True),),
    bound(descent, rate=0.02),
)


GDFQ = gdfq(steps=1, warmup=1, batch=8)
PLAIN = bound(descent, rate=0.01)  # Adam's first steps are signs, which rounding may turn
METHOD = GDFQ._replace(images=GDFQ.images._replace(optimizer=PLAIN), optimizer=PLAIN)


@pytest.fixture(scope="module")
def school(nets):
    """A teacher, a student of 4 bits, images to learn from and others that judge."""
    folded = fold_batch_norm(nets.stem())
    images = nets.images(folded, 24)
    plan = resolve(folded.graph, Scheme(4, 4), "zsq_all_low")
    setup = TrainingSetup(images[:16], images[16:], KEY)
    return calibrate(folded, plan, images[:8]), folded, setup


def trained_on(machine, school):
    student, teacher, setup = school
    return trained(student, teacher, LESSON, setup._replace(machine=machine))


def kernels(network):
    return [slots["kernel"] for slots in network.model.params.values() if "kernel" in slots]


def furthest(a, b, begun):
    """How far two students are apart, in units of how far the first went; and that."""
    squared = lambda x, y: sum(
        float(jnp.sum((p - q) ** 2)) for p, q in zip(kernels(x), kernels(y), strict=True)
    )
    apart, went = squared(a, b), squared(a, begun)
    return np.sqrt(apart / went), went


@pytest.fixture(scope="module")
def alone(school):
    """What is learned on one device, in float32."""
    return trained(school[0], school[1], LESSON, school[2])


def test_devices_share_a_batch_as_one_takes_it(school, alone):
    together, report = trained_on(Machine(devices=4), school)
    apart, went = furthest(alone[0], together, school[0])
    assert went > 0
    assert apart < 1e-4
    assert report.after == pytest.approx(alone[1].after, rel=1e-3)
    leaves = jax.tree.leaves(together)
    assert all(len(v.sharding.device_set) == 1 for v in leaves if isinstance(v, jax.Array))


def test_bfloat16_layers_learn_nearly_the_same(school, alone):
    rough, report = trained_on(Machine(dtype="bfloat16"), school)
    apart, _ = furthest(alone[0], rough, school[0])
    assert 1e-5 < apart < 0.2
    assert report.after == pytest.approx(alone[1].after, rel=0.05)
    assert all(v.dtype == jnp.float32 for v in kernels(rough))


@pytest.mark.slow
def test_gradients_of_8_bits_teach_nearly_the_same(school, alone):
    method = on_gradient_grid(LESSON, 8)
    found, report = trained(school[0], school[1], method, school[2])
    apart, _ = furthest(alone[0], found, school[0])
    assert 1e-4 < apart < 0.3
    assert report.after == pytest.approx(alone[1].after, rel=0.05)


@pytest.mark.slow
def test_a_generator_over_devices_is_that_of_one(nets):
    model = nets.tiny()
    folded = fold_batch_norm(model)
    plan = resolve(folded.graph, Scheme(4, 4), "zsq_all_low")
    images = nets.images(folded, 8)
    start = begun_student(METHOD.student, calibrate(folded, plan, images), model, images)
    taught = taught_of(METHOD, folded, model, start, images, KEY)
    setup = TrainingSetup(images, images, KEY)
    learned = lambda machine: learned_by(Course(METHOD, plan, machine), taught, setup).players
    one, four = learned(HERE), learned(Machine(devices=4))
    begun = generators(METHOD, taught, jax.random.fold_in(KEY, 0))[GENERATOR]
    squared = lambda x, y: sum(
        jax.tree.leaves(jax.tree.map(lambda p, q: np.sum((p - q) ** 2), x, y))
    )
    apart, went = squared(one[GENERATOR], four[GENERATOR]), squared(one[GENERATOR], begun)
    assert went > 0
    assert np.sqrt(apart / went) < 0.01


def test_only_what_multiplies_is_bfloat16():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 16), (16, 8)))
    layer = Node("fc", Linear(), ("x",))
    found = apply_mixed("bfloat16", layer, {"kernel": kernel}, (x,))
    short = lambda v: np.asarray(v.astype(jnp.bfloat16), np.float64)
    wanted = short(x) @ short(kernel)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=2**-7, atol=2**-6)
    assert np.all(np.asarray(found) == short(found))
    relu = Node("relu", Relu(), ("x",))
    np.testing.assert_array_equal(apply_mixed("bfloat16", relu, {}, (x,)), np.maximum(x, 0))


@pytest.mark.parametrize(
    ("machine", "told"),
    [
        (Machine(devices=3), "8 images does not divide evenly among 3 devices.*`batch=9`"),
        (Machine(devices=99), "asked for 99 devices"),
        (Machine(remat=True), "training takes devices and dtype of a machine"),
        (Machine(processes=2), "training takes devices and dtype of a machine"),
    ],
)
def test_what_training_cannot_do_with_a_machine_is_refused(machine, told):
    with pytest.raises(UsageError, match=told):
        check_machine(machine, BATCH)
    check_machine(HERE, BATCH)
