"""Training from start to end: it learns, it resumes, it gives up, and it keeps what was better."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfq_jax.errors import DivergedError, UnsupportedModelError, UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.ops import Flatten, GlobalAvgPool, Relu
from dfq_jax.numerics.levels import codes_of
from dfq_jax.optim.chunk_data import Fed
from dfq_jax.optim.fit import FitResult
from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.state import Place
from dfq_jax.optim.steps import Among, Now
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.recipes.ait import ait
from dfq_jax.recipes.gdfq import gdfq
from dfq_jax.recipes.synq import synq
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.training.engine import LAST_GOOD, TrainingSetup, collapsed, taught_of, trained
from dfq_jax.training.generator import begun_generator, generated_images
from dfq_jax.training.images import Course, normalised, rows_at_steps
from dfq_jax.training.level_rules import learned_steps
from dfq_jax.training.losses import distillation
from dfq_jax.training.method import FixedImages, Training, nesterov, to_zero
from dfq_jax.training.objectives import student_loss
from dfq_jax.training.student import StudentKind, kernel_codes, student_start, trained_at_first
from dfq_jax.training.suits import check_suits
from dfq_jax.types import InputContract
from dfq_jax.values import bound, described

KEY = jax.random.key(5)
KL = Term("KL", 1.0, distillation(), True)


def failing(whole: bool, factor: float) -> optax.GradientTransformation:
    """Steps that are no numbers at the full rate, or at all rates."""
    return optax.sgd(float("nan") if whole or factor == 1 else 1e-2)


def weight_codes(network):
    """Codes of all kernels of a network on its levels."""
    return [
        np.asarray(
            codes_of(network.model.params[s.node]["kernel"], spec.levels, network.qparams[s])
        )
        for s, spec in network.plan.entries
        if s.argument is None
    ]


def lesson(steps=30, optimizer=None, **how):
    rates = optimizer or to_zero(optax.adam, 1e-3, steps)
    kind = StudentKind(learned_steps(), learned_steps(images=True))
    return Training("lesson", steps, 8, kind, FixedImages(), (KL,), rates, epoch=4, **how)


def attended(school, method, **other):
    """What comes of a training whose setup differs in this."""
    student, teacher, setup = school
    return trained(student, teacher, method, setup._replace(**other))


@pytest.fixture(scope="module")
def school(nets):
    """A teacher, a student of 2 bits, images to learn from and others that judge."""
    model = nets.stem()
    folded = fold_batch_norm(model)
    images = nets.images(folded, 40)
    student = calibrate(folded, resolve(folded.graph, Scheme(2, 4), "zsq_all_low"), images[:8])
    return student, folded, TrainingSetup(images[:24], images[24:], KEY)


def test_a_student_learns(school):
    begun = school[0]
    heard = []
    watch = Watcher(progress=lambda p: heard.append((p.step, p.what, dict(p.parts))))
    found, report = attended(school, lesson(), watch=watch)
    assert report.kept
    assert report.after < 0.9 * report.before
    assert 0 < report.changed < 1
    assert heard[-1][:2] == (30, "training")
    assert heard[-1][2]["changed"] >= 0
    assert found.plan == begun.plan
    assert found.model.graph == begun.model.graph


def test_a_run_that_was_killed_ends_the_same(school, tmp_path):
    def stop(progress):
        if progress.step == 20:
            raise KeyboardInterrupt

    method = lesson(40, average=0.9)
    with pytest.raises(KeyboardInterrupt):
        attended(school, method, place=Place(tmp_path), watch=Watcher(progress=stop))
    steps = []
    watch = Watcher(progress=lambda p: steps.append(p.step))
    again, report = attended(school, method, place=Place(tmp_path), watch=watch)
    whole, wanted = attended(school, method)
    assert steps == [40]
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    assert report.after == wanted.after
    codes = [weight_codes(each) for each in (school[0], again)]  # those of the average, as given
    moved = sum(np.sum(a != b) for a, b in zip(*codes, strict=True))
    assert report.changed == pytest.approx(moved / sum(a.size for a in codes[0]))
    with pytest.raises(UsageError, match="different run"):
        attended(school, method._replace(batch=4), place=Place(tmp_path))


def test_a_result_that_is_worse_is_left(school):
    ruin = lesson(4, nesterov(30.0))
    found, report = attended(school, ruin)
    assert not report.kept
    assert found is school[0]


@pytest.mark.slow
def test_what_diverges_is_made_again_at_half_the_rate(school):
    said = []
    method = lesson(4, bound(failing, False))
    _, report = attended(school, method, watch=Watcher(stage=said.append))
    assert said == ["training diverged; again at 1/2 of the learning rate"]
    assert report.notes == (
        "training diverged at step 0 and was made again at 1/2 of the learning rate",
    )


def test_what_always_diverges_is_given_up(school, tmp_path, monkeypatch):
    monkeypatch.setattr("dfq_jax.optim.attempts.RESTARTS", 0)  # each is a program of its own
    method = lesson(4, bound(failing, True))
    with pytest.raises(DivergedError, match="1/8 of its learning rate") as caught:
        attended(school, method, place=Place(tmp_path))
    assert caught.value.exit_code == 4
    path = tmp_path / "training" / LAST_GOOD
    assert str(path) in str(caught.value)
    with np.load(path) as saved:
        assert all(np.isfinite(saved[name]).all() for name in saved.files if name != "about")


def test_a_batch_larger_than_the_images(school):
    with pytest.raises(UsageError, match=r"takes 8 images a step and there are 5.*`batch=5`"):
        attended(school, lesson(), images=school[2].images[:5])


def test_terms_of_classes_need_a_classifier(nets):
    model = fold_batch_norm(nets.unet())
    images = nets.images(model, 8)
    student = calibrate(model, resolve(model.graph, Scheme(8, 8)), images)
    with pytest.raises(UsageError, match="lesson needs a classifier for KL"):
        trained(student, model, lesson(), TrainingSetup(images, images, KEY))


def test_every_image_is_shown_once_an_epoch():
    whole = rows_at_steps((1, 2), 10, 3, 0, 9)
    assert whole.shape == (9, 3)
    for epoch in range(3):
        assert len(set(whole[3 * epoch : 3 * epoch + 3].ravel().tolist())) == 9
    assert whole[:3].tolist() != whole[3:6].tolist()
    np.testing.assert_array_equal(rows_at_steps((1, 2), 10, 3, 4, 4), whole[4:8])  # as when resumed


def test_equal_methods_are_equal():
    assert lesson() == lesson()
    assert hash(lesson()) == hash(lesson())
    assert lesson(3) != lesson(4)
    assert described(gdfq()) == described(gdfq())
    assert gdfq().classes == ("CE", "KL", "CE")


def generator_of(batch=8, warmup=2, steps=3, make=gdfq):
    method = make(steps=steps, batch=batch, warmup=warmup, learning_rate=1e-3)
    images: Any = method.images
    kind = images.kind._replace(channels=(4, 4, 4))
    return method._replace(images=images._replace(kind=kind))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "heard"), [(gdfq, {"CE", "KL", "changed"}), (ait, {"KL", "changed", "inflation"})]
)
def test_a_generator_and_a_student_alternate(nets, make, heard):
    """What both are told; `in_turn` has tests of its own."""
    b = nets.Builder(InputContract(8, 8))
    x = b.op("relu1", Relu(), b.bn("bn1", b.conv("conv1", "images", 4, stride=4)))
    model = b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), x), 3))
    folded = fold_batch_norm(model)
    images = nets.images(folded, 8)
    student = calibrate(folded, resolve(folded.graph, Scheme(4, 4), "zsq_all_low"), images)
    shown = []
    watch = Watcher(progress=lambda p: shown.append(dict(p.parts)))
    setup = TrainingSetup(images, images, KEY, watch=watch)
    _, report = trained(student, folded, generator_of(make=make), setup, unfolded=model)
    assert report.steps == 3
    own = {"generator/CE", "generator/BNS", "generator/alike"}
    assert {name for name in shown[-1] if "loss" not in name} == own | heard


def test_a_generator_that_collapsed_is_told():
    history = {"generator/alike": np.array([0.3, 0.995, 0.999])}
    result = FitResult({}, {}, history, "finished", 3, 0.0)
    assert "collapsed" in collapsed(result)[0]
    assert "step 1" in collapsed(result)[0]
    fine = result._replace(history={"generator/alike": np.array([0.999, 0.3])})
    assert collapsed(fine) == ()


def test_the_generator_of_cifar_is_as_large_as_published():
    images: Any = gdfq().images
    kind = images.kind
    x = jax.eval_shape(lambda k: begun_generator(kind, k, (32, 32, 3), 10), KEY)
    sizes = {name: sum(v.size for v in jax.tree.leaves(part)) for name, part in x.items()}
    assert sizes == {
        **{"made_of": 1000, "project": 101 * 8192, "norm0": 256, "conv1": 147_584},
        **{"norm1": 256, "conv2": 73_792, "norm2": 128, "last": 1731},
    }


def test_generated_images_are_in_natural_units():
    source: Any = generator_of().images
    kind = source.kind
    x = begun_generator(kind, KEY, (8, 8, 3), 5)
    images, labels = generated_images(kind, x, KEY, 16, 5)
    assert images.shape == (16, 8, 8, 3)
    np.testing.assert_allclose(np.mean(images, (0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(np.std(images, (0, 1, 2)), 1, atol=1e-2)
    np.testing.assert_array_equal(np.sum(labels, 1), 1)


def all_black(loss, x, images):
    return loss(x, 0 * images)


def mean_square(told):
    return jnp.mean(told.labels @ jnp.arange(5.0) ** 2)


def test_labels_are_of_images_before_they_are_moved(school):
    student, teacher, setup = school
    terms = (Term("class", 1.0, mean_square, True),)
    method = lesson()._replace(terms=terms, wrappers=(all_black,), batch=24)
    start = student_start(method.student, student, None)
    x = trained_at_first(method.student, student.plan, start)
    taught = taught_of(method, teacher, None, start, setup.images, KEY)
    memory = {"ranges": {}, "codes": kernel_codes(method.student, student.plan, x, start)}
    fed = Fed(taught, jnp.int32(0), jnp.arange(24)[None])
    now = Now(KEY, jnp.int32(0), memory)
    course = Course(method, student.plan)
    loss = jax.jit(lambda x: student_loss(course, x, Among(fed, {}), now)[0])(x)
    mean = lambda v: np.mean(np.argmax(evaluate(teacher, v)[0][0], -1) ** 2)
    shown = normalised(taught.pixels, teacher.contract)
    assert mean(shown) != mean(0 * shown)
    np.testing.assert_allclose(loss, mean(shown), rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "net", "told"),
    [
        (gdfq(), "unet", "needs a classifier"),
        (gdfq(), "stem", "divisible by 4"),
        (synq(), "headless", "pool"),
    ],
)
def test_what_a_method_cannot_train_is_refused_at_once(nets, method, net, told):
    def headless():
        b = nets.Builder(InputContract(4, 4))
        return b.done(b.linear("fc", b.op("flat", Flatten(), b.conv("conv", "images", 2)), 3))

    model = headless() if net == "headless" else getattr(nets, net)()
    with pytest.raises((UsageError, UnsupportedModelError), match=told):
        check_suits(method, model)
