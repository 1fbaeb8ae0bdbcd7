"""What published methods add: codes between classes, smooth images, activation maps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.ops import GlobalAvgPool
from dfq_jax.numerics.softmax import divergence
from dfq_jax.optim.progress import Watcher
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.recipes.choi import choi
from dfq_jax.recipes.gdfq import gdfq
from dfq_jax.recipes.hard_samples import HARD_SAMPLES, hard_samples
from dfq_jax.recipes.hast import hast
from dfq_jax.recipes.intraq_qat import intraq_qat
from dfq_jax.recipes.qimera import qimera
from dfq_jax.recipes.synq import synq
from dfq_jax.recipes.zaq import zaq
from dfq_jax.synthesis.terms.base import Observed
from dfq_jax.training.activation_maps import activation_map, activation_map_loss, feature_map
from dfq_jax.training.adversary import imbalance, opposed, own_entropy, quiet
from dfq_jax.training.engine import TrainingSetup, rows_of_classes, trained
from dfq_jax.training.frequencies import low_pass
from dfq_jax.training.images import generator_refusal
from dfq_jax.training.losses import Answers, Lesson, distillation
from dfq_jax.training.superposed import standardised, superposed_classes
from dfq_jax.training.tracking import Tracking
from dfq_jax.types import InputContract

KEY = jax.random.key(2)


def any_of(images) -> Any:
    """Images of a method, whose kind the type checker does not know."""
    return images


def codes(mixed, chance, size=64):
    begin, draw = superposed_classes(mixed=mixed, chance=chance, width=6, length=4)
    return jax.jit(lambda key: draw(begin(key, 5, None), key, size, 5))(KEY)


def test_superposed_labels_are_shares_of_classes():
    drawn = codes(3, 1.0)
    np.testing.assert_allclose(drawn.labels.sum(1), 1, rtol=1e-5)
    assert (np.asarray(drawn.labels) > 0).sum(1).max() == 3
    plain = codes(3, 0.0)
    assert set(np.asarray(plain.labels).ravel().tolist()) == {0.0, 1.0}


def test_one_class_mixed_is_plain():
    mixed, plain = codes(1, 1.0), codes(1, 0.0)
    np.testing.assert_allclose(mixed.codes, plain.codes, rtol=1e-5)
    np.testing.assert_array_equal(mixed.labels, plain.labels)


def test_vectors_have_one_size_and_may_begin_as_the_classifier():
    rows = jax.random.normal(KEY, (5, 7))
    begin, _ = superposed_classes(rows=True, length=4)
    made_of = begin(KEY, 5, rows)
    np.testing.assert_array_equal(made_of["vectors"], rows)
    assert made_of["map"]["kernel"].shape == (7, 4)
    even = standardised(jax.random.normal(KEY, (3, 2, 50)) * 3 + 1)
    np.testing.assert_allclose(np.mean(even, -1), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(even, -1), 1, rtol=1e-3)


def test_low_pass():
    images = jax.random.normal(KEY, (2, 8, 8, 3))
    everything = low_pass(radius=1e4)(KEY, images)
    np.testing.assert_allclose(everything, images, atol=1e-5)
    flat = jnp.full((1, 8, 8, 3), 0.7)
    np.testing.assert_allclose(low_pass(radius=0.3)(KEY, flat), flat, rtol=1e-5)
    smooth = low_pass(radius=0.1)(KEY, images)
    assert np.sum(np.asarray(smooth) ** 2) < 0.5 * np.sum(np.asarray(images) ** 2)
    assert smooth.shape == images.shape


@pytest.fixture(scope="module")
def answers(nets):
    model = nets.stem()
    images = nets.images(model, 3)
    names = feature_map(model.graph)
    assert names == ("relu2",)
    outputs, taps = evaluate(model, images, taps=names)
    return images, Answers(outputs[0], taps, model)


def test_activation_maps_are_those_of_slopes(answers):
    """Grad-CAM by automatic differentiation of what follows the features."""
    images, found = answers
    head, features = found.model.params["fc"], found.taps["relu2"]

    def said(v):
        scores = jnp.mean(v, (1, 2)) @ head["kernel"] + head["bias"]
        return jnp.sum(jnp.max(scores, -1))

    slopes = jax.nn.relu(jnp.mean(jax.grad(said)(features), (1, 2)))
    seen = jnp.einsum("bhwc,bc->bhw", features, slopes)
    large = np.asarray(jax.image.resize(seen, (3, 6, 6), "bilinear"))
    low, high = large.min((1, 2), keepdims=True), large.max((1, 2), keepdims=True)
    wanted = (large - low) / np.maximum(high - low, 1e-8)
    np.testing.assert_allclose(activation_map(found, (6, 6)), wanted, atol=1e-4)
    labels = jnp.zeros((3, 5))
    assert float(activation_map_loss(Lesson(images, labels, found, found, KEY))) == 0.0


def test_activation_maps_need_pooled_features(nets):
    with pytest.raises(UnsupportedModelError, match="class"):
        feature_map(nets.unet().graph)


@pytest.mark.parametrize("factory", [hast, intraq_qat, synq, qimera])
def test_published_methods_are_values(factory):
    assert factory() == factory()
    assert hash(factory()) == hash(factory())
    assert factory(steps=10).steps == 10
    assert factory().student.live
    assert factory().optimizer(0.5).init({"w": jnp.zeros(2)}) is not None


def test_qimera_changes_the_codes_alone():
    plain, made = gdfq(), qimera()
    source, own = any_of(plain.images), any_of(made.images)
    assert own._replace(kind=source.kind) == source
    assert made._replace(name="gdfq", images=plain.images) == plain


def test_a_generator_may_play_against_the_student(nets):
    """Its terms find the student's answers; nothing is set against it while it warms up."""
    logits = jax.random.normal(KEY, (4, 5))
    other = logits + jax.random.normal(jax.random.key(3), (4, 5))
    nothing: Any = ()
    teacher, student = (Answers(v, {"t": 2 * v}, nothing) for v in (logits, other))
    shared = Lesson(nothing, nothing, teacher, student, KEY)
    told = (nothing, nothing, logits, {}, {}, {}, shared, (), ())
    seen = Observed(*told, jnp.int32(0), jnp.int32(2), KEY)
    gap = divergence(logits, other)
    np.testing.assert_allclose(opposed(distillation())(seen), -gap, rtol=1e-6)
    assert float(opposed(distillation(), after=3)(seen)) == 0.0
    np.testing.assert_allclose(quiet(seen), -np.abs(2 * logits).mean(), rtol=1e-6)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(own_entropy(seen), -(p * np.log(p)).sum(1).mean(), rtol=1e-5)
    q = p.mean(0)
    np.testing.assert_allclose(imbalance(seen), (q * np.log(q)).sum(), rtol=1e-5)


def test_zaq_goes_as_released():
    made = zaq()
    assert (made.steps, made.rounds) == (300 * 60 * 5, 300 * 60)
    source = any_of(made.images)
    assert [(t.name, t.weight) for t in source.terms] == [("L1", 1), ("CRM", 1), ("activity", 0.1)]
    assert source.kind.channels == (128, 128, 64)
    plain = np.multiply(rates(made, 0, 30_000, 60_000), 1.9)  # no Nesterov's momentum
    np.testing.assert_allclose(plain, [0.1, 0.01, 0.001], rtol=1e-5)


def test_rounds_of_ten_lessons():
    made = choi(steps=95, warmup=7)
    assert made.rounds == 7 + 10
    kind = any_of(made.images).kind
    assert kind.scale == 8
    assert generator_refusal(kind, (32, 32, 3)) == ""
    assert "divisible by 8" in generator_refusal(kind, (28, 28, 1))


def test_hard_samples_of_large_images_are_made_with_values_of_their_own(nets):
    small = nets.stem()
    read = small.inputs[0]
    assert isinstance(read, InputContract)
    large = dataclasses.replace(small, inputs=(dataclasses.replace(read, height=224, width=224),))
    assert HARD_SAMPLES.recipe(small, 7, None) == hard_samples(steps=7)
    wanted = hard_samples(steps=7, hardness=0.1, exponent=0.5, crops=0.5)
    assert HARD_SAMPLES.recipe(large, 7, None) == wanted


SHORT = {
    choi: {"steps": 4, "batch": 4, "warmup": 1, "lessons": 2, "length": 4, "channels": (4, 4)},
    zaq: {"steps": 5, "batch": 4, "length": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "told"), [(choi, "KL"), (zaq, "CRM")])
def test_adversaries_play(nets, make, told):
    model = nets.tiny()
    folded = fold_batch_norm(model)
    images = nets.images(folded, 8)
    student = calibrate(folded, resolve(folded.graph, Scheme(4, 4), "zsq_all_low"), images)
    method = make(**SHORT[make])
    heard = []
    watch = Watcher(progress=lambda p: heard.append(dict(p.parts)))
    _, report = trained(
        student, folded, method, TrainingSetup(images, images, KEY, watch=watch), unfolded=model
    )
    assert report.steps == SHORT[make]["steps"]
    assert {f"generator/{told}", told, "changed"} <= set(heard[-1])


def test_ranges_follow_four_epochs_however_long_the_generator_is_alone():
    assert gdfq().student.tracking == Tracking(800)
    assert gdfq(warmup=10_000).student.tracking == Tracking(800)
    assert gdfq(warmup=30).student.tracking == Tracking(30)


def rates(method, *steps):
    """The size of the first step of a student's optimizer, at some of its counts."""
    optimizer = method.optimizer(1.0)
    x, slope = jnp.zeros(()), jnp.ones(())
    begun = optimizer.init(x)

    def at(step):
        count = lambda v: jnp.int32(step) if v.dtype == jnp.int32 else v
        with jax.numpy_dtype_promotion("standard"):
            update, _ = optimizer.update(slope, jax.tree.map(count, begun), x)
        return float(update) / -1.9  # with Nesterov's momentum

    return [at(step) for step in steps]


@pytest.mark.parametrize(
    ("method", "at", "wanted"),
    [
        (gdfq(), (19_199, 19_200, 39_200, 59_200), (1, 0.1, 0.01, 0.001)),
        (gdfq(steps=100), (24, 25, 50, 75), (1, 0.1, 0.01, 0.001)),  # 800 alone are most of it
        (intraq_qat(), (3199, 3200, 7200, 11_200), (1, 0.1, 0.01, 0.001)),
        (intraq_qat(drops=(100, 200, 350)), (19_199, 19_200, 29_399), (1, 0.1, 0.1)),
        (intraq_qat(steps=3), (0, 1), (1, 0.001)),
    ],
)
def test_rates_fall_where_papers_have_it(method, at, wanted):
    np.testing.assert_allclose(rates(method, *at), np.multiply(wanted, 1e-4), rtol=1e-4)


@pytest.mark.parametrize("last", ["linear", "conv"])
def test_vectors_begin_as_the_rows_of_either_kind_of_classifier(nets, last):
    b = nets.Builder(InputContract(4, 4))
    x = b.op("pool", GlobalAvgPool(), b.conv("conv", "images", 6))
    model = b.done(b.linear("fc", x, 5))
    kernel = model.params["fc"]["kernel"]
    if last == "conv":  # as MobileNetV2's, whose features keep their axes of one pixel
        params = {**model.params, "fc": {"kernel": kernel[None, None]}}
        model = dataclasses.replace(model, params=params)
    np.testing.assert_array_equal(rows_of_classes(model, 5), kernel.T)
    assert rows_of_classes(model, 4) is None
    begin = any_of(qimera().images).kind.begin
    np.testing.assert_array_equal(begin(KEY, 5, kernel.T)["vectors"], kernel.T)
