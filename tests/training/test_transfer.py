"""Knowledge that moves: to another architecture without data, to other images without labels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import BatchNorm, Conv2d, GlobalAvgPool, Linear
from dfq_jax.optim.fit import run_chunk
from dfq_jax.recipes.dfkd import agreed_gap, dfkd, own_label_entropy
from dfq_jax.recipes.hast import hast
from dfq_jax.recipes.shot import shot
from dfq_jax.synthesis.terms.base import Observed, Term
from dfq_jax.training.adaptation import adapted
from dfq_jax.training.batch_norms import by_batch, with_recorded_norms
from dfq_jax.training.engine import TrainingSetup
from dfq_jax.training.losses import Answers, Lesson, distillation
from dfq_jax.training.method import FixedImages, Training, cosine_sgd
from dfq_jax.training.pseudo_labels import information_loss, pseudo_labels
from dfq_jax.training.student import StudentKind
from dfq_jax.training.transfer import distilled, initialised
from dfq_jax.types import InputContract

KEY = jax.random.key(7)
nothing: Any = None


@pytest.fixture(scope="module")
def teacher(nets):
    return nets.stem()


def small(nets, classes=5, size=6):
    """Another architecture with the same inputs."""
    b = nets.Builder(InputContract(size, size), 4)
    x = b.unit("first", "images", 8, stride=2)
    return b.done(b.linear("head", b.op("pool", GlobalAvgPool(), x), classes))


def test_norms_follow_the_batch_and_are_recorded(nets, teacher):
    images = nets.images(teacher, 32)
    names = tuple(n.name for n in teacher.graph.nodes if isinstance(n.op, BatchNorm))
    _, taps = evaluate(teacher, images, taps=names, hook=by_batch)
    for name in names:
        made, own = np.asarray(taps[name], np.float64), teacher.params[name]
        np.testing.assert_allclose(made.mean((0, 1, 2)), own["bias"], atol=1e-4)
        np.testing.assert_allclose(made.std((0, 1, 2)), np.abs(own["scale"]), rtol=1e-3)
    recorded = with_recorded_norms(teacher, images)
    np.testing.assert_allclose(
        evaluate(recorded, images)[0][0], evaluate(teacher, images, hook=by_batch)[0][0], atol=1e-4
    )


def test_a_network_begins_anew(nets, teacher):
    made = initialised(teacher, KEY)
    kernel = np.asarray(made.params["conv1"]["kernel"])
    assert kernel.std() == pytest.approx((2 / 27) ** 0.5, rel=0.3)
    norm = made.params["bn1"]
    assert (norm["var"] == 1).all()
    assert (norm["mean"] == 0).all()
    assert not made.moments
    assert np.abs(kernel - np.asarray(teacher.params["conv1"]["kernel"])).max() > 0.1


def test_another_architecture_learns(nets, teacher):
    """From images at hand, by the words of the teacher alone."""
    images = nets.images(teacher, 48)
    kl = Term("KL", 1.0, distillation(temperature=2.0), True)
    how = (StudentKind(), FixedImages(), (kl,), cosine_sgd(0.05, 60))
    method = Training("words", 60, 24, *how)
    student = initialised(small(nets), KEY)
    made, report = distilled(student, teacher, method, TrainingSetup(images[:24], images[24:], KEY))
    assert made.graph == student.graph
    assert report.after < 0.5 * report.before


@pytest.mark.slow
def test_dfkd_plays(nets, teacher):
    made = dfkd(steps=6, batch=8, warmup=1, lessons=2)
    source: Any = made.images
    kind = source.kind._replace(channels=(4, 4))
    method = made._replace(images=source._replace(kind=kind))
    judges = nets.images(teacher, 8)
    student = initialised(small(nets), KEY)
    _, report = distilled(student, teacher, method, TrainingSetup(judges[:0], judges, KEY))
    assert report.steps == 6
    assert np.isfinite(report.after)


def test_students_that_do_not_fit_are_refused(nets, teacher):
    images = nets.images(teacher, 8)
    setup = TrainingSetup(images, images, KEY)
    with pytest.raises(UsageError, match=r"puts out \(4,\), its teacher"):
        distilled(small(nets, classes=4), teacher, dfkd(), setup)
    with pytest.raises(UsageError, match=r"reads \(8, 8, 3\)"):
        distilled(small(nets, size=8), teacher, dfkd(), setup)
    with pytest.raises(UsageError, match="compares relu1"):
        distilled(small(nets), teacher, hast(batch=4), setup)


def test_terms_of_dfkd():
    rng = np.random.default_rng(0)
    t, s = rng.normal(size=(2, 6, 5)).astype(np.float32) * 2
    log = lambda v: v - np.log(np.exp(v).sum(1, keepdims=True))
    both = [Answers(jnp.asarray(v), {}, nothing) for v in (t, s)]
    lesson = Lesson(nothing, nothing, both[0], both[1], KEY)
    zero = jnp.zeros((), jnp.int32)
    told = (nothing, nothing, jnp.asarray(t), {}, {}, {}, lesson, nothing, ())
    seen = Observed(*told, zero, zero, KEY)
    assert float(own_label_entropy(seen)) == pytest.approx(-log(t).max(1).mean(), rel=1e-5)
    gaps = (np.exp(log(t)) * (log(t) - log(s))).sum(1)
    same = t.argmax(1) == s.argmax(1)
    assert 0 < same.sum() < 6
    assert float(agreed_gap(seen)) == pytest.approx(-(gaps * same).mean(), rel=1e-4)
    made: Any = dfkd().images
    assert [(x.name, x.weight) for x in made.terms] == [
        ("sure", 0.4),
        ("BN", 10.0),
        ("disagreement", 1.1),
    ]


# other images


def shifted(count=256, by=0.6):
    """Two classes of images of one colour, moved; and their labels."""
    rng = np.random.default_rng(1)
    labels = np.arange(count) % 2
    centres = np.where(labels == 1, 0.6, -0.6)[:, None, None, None]
    images = centres * [1, 0, 0] + rng.normal(size=(count, 2, 2, 3)) * 0.1 + [by, 0, 0]
    images += rng.normal(size=(count, 1, 1, 3)) * [0.25, 0, 0]
    return jnp.asarray(images, jnp.float32), labels


@pytest.fixture(scope="module")
def toy():
    """A classifier by the sign of one colour; a layer makes features, another classes."""
    nodes = (
        Node("features", Conv2d(), ("images",)),
        Node("pool", GlobalAvgPool(), ("features",)),
        Node("fc", Linear(), ("pool",)),
    )
    rows = jnp.asarray([[-4.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    params = {
        "features": {"kernel": jnp.eye(3)[None, None], "bias": jnp.zeros(3)},
        "fc": {"kernel": rows, "bias": jnp.zeros(2)},
    }
    contract = InputContract(2, 2, mean=(0.5,) * 3, std=(0.25,) * 3)
    return Model(Graph(nodes, ("images",), ("fc",)), params, (contract,))


def right(model, images, labels):
    return float(np.mean(np.argmax(evaluate(model, images)[0][0], -1) == labels))


def test_centres_label_better_than_scores(toy):
    """Two turns in NumPy: centres by probabilities, then by labels."""
    images, labels = shifted()
    found = np.asarray(pseudo_labels(toy, images))
    scores, taps = evaluate(toy, images, taps=("pool",))
    p = np.asarray(jax.nn.softmax(scores[0]), np.float64)
    f = np.concatenate([np.asarray(taps["pool"], np.float64), np.ones((len(p), 1))], 1)
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)
    f = unit(f)
    wanted = labels
    for _ in range(2):
        wanted = (f @ unit(p.T @ f / p.sum(0)[:, None]).T).argmax(1)
        p = np.eye(2)[wanted]
    np.testing.assert_array_equal(found, wanted)
    assert np.mean(found == labels) > right(toy, images, labels)


def test_information_is_most_where_images_are_sure_and_classes_even():
    lesson = lambda scores: Lesson(
        nothing, nothing, nothing, Answers(jnp.asarray(scores), {}, nothing), KEY
    )
    even = 50 * np.eye(4, dtype=np.float32)
    assert float(information_loss(lesson(even))) == pytest.approx(-np.log(4), abs=1e-3)
    alike = np.tile(even[:1], (4, 1))
    assert float(information_loss(lesson(alike))) == pytest.approx(0, abs=1e-3)
    unsure = np.zeros((4, 4), np.float32)
    assert float(information_loss(lesson(unsure))) == pytest.approx(0, abs=1e-3)


def test_a_network_adapts_and_its_classifier_stays(toy):
    images, labels = shifted()
    assert right(toy, images, labels) < 0.8
    how = shot(count=len(images), epochs=4, batch=32, learning_rate=0.05)
    chunk: Any = run_chunk
    programs = chunk._cache_size()
    made, report = adapted(toy, images, how, 4, KEY)
    assert chunk._cache_size() == programs + 1  # for all epochs
    assert right(made, images, labels) > 0.95
    likely = [np.argmax(evaluate(m, images)[0][0], -1) for m in (toy, made)]
    assert report.moved == pytest.approx(np.mean(likely[0] != likely[1]))
    assert report.moved > 0
    for slot in ("kernel", "bias"):
        np.testing.assert_array_equal(made.params["fc"][slot], toy.params["fc"][slot])
    assert np.abs(np.asarray(made.params["features"]["bias"])).max() > 0.1
    assert shot(count=64) == shot(count=64)
    assert shot(count=64).method.steps == 1
    assert [shot(count=64).pace(n) for n in (0, 6)] == pytest.approx([1.0, 5**-0.75])


def test_adaptation_needs_one_classifier(nets):
    model = nets.two_heads()
    with pytest.raises(UnsupportedModelError, match="one classifier"):
        adapted(model, nets.images(model, 4), shot(count=4, batch=4), 1, KEY)
