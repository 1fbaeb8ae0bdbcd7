import dataclasses
import math
from functools import partial

import numpy as np
import pytest

from dfq_jax.graph.heads import Kind, Part
from dfq_jax.graph.tasks import Classifier, Detector, Embedding, ImageToImage, LanguageModel, Task
from dfq_jax.report import outputs
from dfq_jax.report.outputs import (
    OutputReport,
    by_chance,
    decibels,
    leading,
    positive_ones,
)

RNG = np.random.default_rng(0)
tally = partial(outputs.tally, task=Classifier())
output_report = partial(outputs.output_report, task=Classifier())


def part(*shape, curve=None, kind: Kind = "classes", axis=None, certain=True):
    where = np.arange(math.prod(shape)).reshape(shape)
    return Part("out", "out", "before", curve, kind, axis, certain, where, where)


def judged(how, exact, rough, behind=lambda x: x):
    tensors = {"before": (exact, rough), "out": (behind(exact), behind(rough))}
    return output_report(how, tally(how, tensors))


def test_decibels():
    assert decibels(np.array([100.0, 1.0])) == pytest.approx(20)
    assert decibels(np.array([0.0, 0.0])) == math.inf
    assert decibels(np.array([0.0, 1.0])) == pytest.approx(-300)
    assert math.isnan(decibels(np.array([np.nan, 1.0])))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_classes_along_an_axis(axis):
    exact = RNG.normal(size=(5, 4, 3, 6))
    rough = exact + RNG.normal(size=exact.shape) * 0.3
    found = judged(part(4, 3, 6, axis=axis), exact, rough)
    assert found.agreement == np.mean(exact.argmax(axis + 1) == rough.argmax(axis + 1))
    assert found.sqnr == pytest.approx(
        10 * np.log10(np.sum(exact**2) / np.sum((exact - rough) ** 2))
    )
    assert (found.classes, found.dense) == ((4, 3, 6)[axis], True)


def test_batches_add_up():
    exact = RNG.normal(size=(6, 4))
    rough = exact + RNG.normal(size=exact.shape) * 0.3
    how = part(4, axis=0)
    of = lambda a, b: tally(how, dict.fromkeys(("before", "out"), (exact[a:b], rough[a:b])))
    whole, parts = output_report(how, of(0, 6)), output_report(how, of(0, 2).plus(of(2, 6)))
    assert parts.agreement == whole.agreement
    assert parts.sqnr == pytest.approx(whole.sqnr)


def test_a_sure_network_is_judged_before_its_softmax():
    logits = np.array([[200.0, 0.0, 5.0], [0.0, 90.0, 5.0]])
    soft = lambda z: (
        np.exp(z - z.max(-1, keepdims=True))
        / np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)
    )
    found = judged(part(3, curve="softmax", axis=0), logits, logits * 0.9, soft)
    assert found.sqnr == pytest.approx(20)
    assert found.shown > 100
    assert found.agreement == 1


def test_what_is_lost_behind_a_sigmoid_shows():
    """Every score became 0, on a grid made for boxes."""
    logits = RNG.normal(size=(4, 8, 5))
    how = part(8, 5, curve="sigmoid", kind="signs")
    behind = (1 / (1 + np.exp(-logits)), np.zeros_like(logits))
    found = output_report(how, tally(how, {"before": (logits, logits + 1e-3), "out": behind}))
    assert found.sqnr > 40
    assert found.shown == pytest.approx(0)
    assert found.fault == "output 'out' has an SQNR of only 0.0 dB"


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_masks_are_compared_where_something_is(share):
    """Nearly empty masks have equal signs nearly everywhere, whatever they find."""
    exact = np.where(RNG.random((3, 20, 20)) < share, 1.0, -1.0)
    rough = np.where(RNG.random(exact.shape) < share, 1.0, -1.0)
    how = part(20, 20, kind="signs")
    some = lambda which: {"before": (pair := (exact[which], rough[which])), "out": pair}
    found = output_report(how, tally(how, some([0])).plus(tally(how, some([1, 2]))))
    a, b = exact > 0, rough > 0
    assert found.agreement == np.mean(a == b)
    assert found.positive == np.mean(a)
    assert found.overlap == ((a & b).sum() / (a | b).sum() if share else None)
    told = positive_ones([found])
    assert ("none positive" in told) == (share == 0)
    assert share == 0 or f"{100 * (a & b).sum() / (a | b).sum():.1f} % in both" in told
    single, one = part(1, kind="signs"), (exact[:, 0, :1], rough[:, 0, :1])
    alone = output_report(single, tally(single, {"before": one, "out": one}))
    assert (alone.positive, alone.overlap) == (None, None)


def test_scores_of_nothing_are_judged_before_the_sigmoid():
    """A detector without an object to see: of 0.0003 no share matters, of 0.8 one does."""
    how = part(8, 5, curve="sigmoid", kind="signs")
    noise = RNG.normal(size=(4, 8, 5))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))

    def found(logits, size):
        rough = logits + size * noise
        behind = (sigmoid(logits), sigmoid(rough))
        return output_report(how, tally(how, {"before": (logits, rough), "out": behind}))

    nothing, one = np.full((4, 8, 5), -8.0), 9.0 * (np.arange(40).reshape(8, 5) == 7)
    assert found(nothing, 0.8).shown < 3
    assert not found(nothing, 0.8).felt
    assert found(nothing, 0.8).fault == ""
    assert found(nothing + one, 4.0).felt
    halves = [
        tally(how, {"before": (x, x), "out": (x, x + e)}) for x, e in ((noise, 0.0), (noise, 0.2))
    ]
    assert halves[0].plus(halves[1]).largest == pytest.approx(0.2)


def entry(**how):
    made = OutputReport("depth", "values", 20.0, 20.0, None, 0, True, False)
    return dataclasses.replace(made, **how)


@pytest.mark.parametrize("classes", [2, 5])
def test_chance_is_that_of_independent_decisions(classes):
    """Beside all pairs of decisions, counted one by one."""
    shares = np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()
    exact, rough = (RNG.choice(classes, (30,), p=shares) for _ in range(2))
    pairs = sum(int(a == b) for a in exact for b in rough) / len(rough)
    assert by_chance(exact, rough) == pytest.approx(pairs)
    assert by_chance(exact[:0], rough[:0]) == 0
    assert by_chance(exact > 0, rough > 0) == pytest.approx(
        sum(int((a > 0) == (b > 0)) for a in exact for b in rough) / len(rough)
    )


def test_on_noise_decisions_have_to_be_related():
    """Cohen's kappa: no better than chance is ruined, however often that is."""
    seen = entry(kind="classes", classes=80, agreement=0.43, chance=0.1, certain=True)
    assert "has the float class in only 43.0 %" in seen.fault
    on_noise = dataclasses.replace(seen, noise=True)
    assert on_noise.kappa == pytest.approx(0.33 / 0.9)
    assert on_noise.fault == ""
    nearly_all = dataclasses.replace(on_noise, kind="signs", agreement=0.974, chance=0.972)
    assert nearly_all.fault == (
        "output 'depth' has the float sign in only 97.4 %, and 97.2 % would be by chance"
    )
    empty = dataclasses.replace(on_noise, kind="signs", agreement=1.0, chance=1.0)
    assert (empty.kappa, empty.fault) == (1.0, "")
    values = entry(sqnr=0.6, noise=True)
    assert (values.kappa, values.fault) == (1.0, "")
    assert "SQNR of only -0.4 dB" in dataclasses.replace(values, sqnr=-0.4).fault


def test_when_an_output_is_ruined():
    assert entry().fault == ""
    assert entry(sqnr=2.9).fault == "output 'depth' has an SQNR of only 2.9 dB"
    assert entry(sqnr=math.nan).fault == "output 'depth' is not finite"
    scores = entry(kind="classes", classes=5, agreement=0.4, certain=True)
    assert scores.fault == "output 'depth' has the float class in only 40.0 %"
    assert dataclasses.replace(scores, agreement=0.6, sqnr=1.0).fault == ""
    guessed = dataclasses.replace(scores, certain=False)
    assert guessed.fault == ""  # nothing says that these are classes
    assert dataclasses.replace(guessed, sqnr=1.0).fault
    sign = entry(kind="signs", classes=1, agreement=0.9, certain=True)
    assert sign.fault == ""
    assert dataclasses.replace(sign, sqnr=2.0).fault
    assert "the float sign in only 30.0 %" in dataclasses.replace(sign, agreement=0.3).fault


def test_the_output_that_speaks_for_the_network():
    values, classes = entry(), entry(kind="classes", agreement=0.9)
    assert leading([values, classes]) is classes
    assert leading([values]) is values
    worse = dataclasses.replace(classes, agreement=0.8)
    assert leading([values, classes, worse]) is worse
    strange = entry(sqnr=math.nan)
    assert leading([values, strange]) is strange
    assert leading([]) is None


def by_task(task: Task, how, exact, rough):
    """The report of two halves of a batch."""
    of = lambda part: {"before": (exact[part], rough[part]), "out": (exact[part], rough[part])}
    halves = [outputs.tally(how, of(half), task) for half in (slice(0, 1), slice(1, 3))]
    return outputs.output_report(how, halves[0].plus(halves[1]), task)


def test_images_directions_and_next_tokens_have_measures_of_their_own():
    exact = RNG.uniform(size=(3, 6, 5, 3))
    rough = exact + RNG.normal(size=exact.shape) * [[[[0.01]]], [[[0.02]]], [[[0.05]]]]
    image = by_task(ImageToImage(), part(6, 5, 3, kind="values"), exact, rough)
    wanted = -10 * np.log10(np.mean((exact - rough) ** 2, axis=(1, 2, 3)))
    assert image.to_dict()["psnr_db"] == pytest.approx(wanted.mean())
    vectors = by_task(Embedding(), part(6, 5, 3, kind="values"), exact, rough)
    cosines = np.sum(exact * rough, -1) / np.linalg.norm(exact, axis=-1)
    cosines = cosines / np.linalg.norm(rough, axis=-1)
    assert vectors.to_dict()["cosine"] == pytest.approx(cosines.mean())
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (exact, rough))
    words = by_task(LanguageModel(), part(6, 5, 3, axis=2), exact, rough)
    divergence = np.sum(p * np.log(p / q), axis=-1).mean()
    assert words.to_dict()["divergence_nats"] == pytest.approx(divergence)
    assert "psnr_db" not in by_task(Classifier(), part(6, 5, 3, axis=2), exact, rough).to_dict()


def test_classes_of_a_detector_count_where_one_leads():
    """Three cells of two classes: one is sure and kept, one is sure and lost, one is a tie."""
    exact = np.array([[[0.9, 0.1], [0.2, 0.8], [0.55, 0.45]]])
    rough = np.array([[[0.7, 0.3], [0.6, 0.4], [0.4, 0.6]]])
    how = part(3, 2, curve="softmax", axis=1)
    tensors = {"before": (np.log(exact), np.log(rough)), "out": (exact, rough)}
    of = lambda task: outputs.output_report(how, outputs.tally(how, tensors, task), task).agreement
    assert of(Classifier()) == pytest.approx(1 / 3)
    assert of(Detector()) == pytest.approx(1 / 2)
    nothing = {**tensors, "out": (np.full_like(exact, 0.5), rough)}
    found = outputs.output_report(how, outputs.tally(how, nothing, Detector()), Detector())
    assert (found.agreement, found.fault) == (None, "")


def test_the_lead_of_a_class():
    probabilities = RNG.dirichlet(np.ones(5), size=(2, 3))
    ranked = np.sort(probabilities, axis=-1)
    np.testing.assert_allclose(outputs.ahead(1, probabilities), ranked[..., -1] - ranked[..., -2])
    moved = np.moveaxis(probabilities, 2, 1)
    np.testing.assert_allclose(outputs.ahead(0, moved), ranked[..., -1] - ranked[..., -2])
    assert (outputs.ahead(1, probabilities[..., :1]) == 1).all()
