"""Generators that are told more than GDFQ's: their terms against NumPy, and that they play."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.api.request import resolved
from dfq_jax.api.training_job import making_for
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.recipes.aac_abn import aac_abn
from dfq_jax.recipes.adadfq import adadfq
from dfq_jax.recipes.clusterq_qat import clusterq_qat
from dfq_jax.recipes.dsg_qat import dsg_qat, slack_batch_match
from dfq_jax.recipes.gdfq import gdfq
from dfq_jax.recipes.intraq_qat import intraq_qat
from dfq_jax.recipes.trainings import TRAININGS, pipeline_of_start
from dfq_jax.synthesis.terms.base import Observed
from dfq_jax.synthesis.terms.slack import slack_margins
from dfq_jax.synthesis.terms.targets import batch_norm_targets, observe
from dfq_jax.training.adaptability import (
    agreed_labels,
    disagreed_labels,
    even_gap,
    kept_between,
)
from dfq_jax.training.engine import TrainingSetup, trained
from dfq_jax.training.losses import Answers, Lesson
from dfq_jax.training.method import generating

KEY = jax.random.key(4)
FACTORIES = {f.__name__: f for f in (dsg_qat, clusterq_qat, adadfq, aac_abn)}
WEIGHTS = {
    "dsg_qat": {"CE": 1.0, "BNS": 0.1, "SCI": 1.0},
    "clusterq_qat": {"CE": 1.0, "BNS": 0.1, "SFDA": 0.9, "ICV": 0.6},
    "adadfq": {"disagreement": 0.2, "agreement": 0.1, "between": 1.0, "balance": 1.0, "BNS": 1.0},
    "aac_abn": {"CE": 1.0, "BNS": 0.1},
}
STUDENTS = {
    "dsg_qat": {"CE": 1.0, "KL": 1.0},
    "clusterq_qat": {"CE": 1.0, "KL": 1.0},
    "adadfq": {"gap": 400.0},
    "aac_abn": {"CE": 1.0, "KL": 1.0},
}


@pytest.mark.parametrize("name", FACTORIES)
def test_weights_are_those_of_the_cards(name):
    made, plain = FACTORIES[name](), gdfq()
    source: Any = made.images
    assert made == FACTORIES[name]()
    assert made.name == name
    assert {term.name: term.weight for term in source.terms} == WEIGHTS[name]
    assert {term.name: term.weight for term in made.terms} == STUDENTS[name]
    assert source.against is (name == "adadfq")
    assert made.epoch == plain.epoch == 200
    assert made.steps + source.warmup == 400 * 200
    assert made.batch == {"clusterq_qat": 512, "adadfq": 16}.get(name, 200)
    assert TRAININGS[name].make is FACTORIES[name]


def test_only_generators_can_be_told_otherwise():
    with pytest.raises(ValueError, match="intraq_qat has no generator"):
        generating(intraq_qat(), "other", against=True)


def test_ranges_of_aac_begin_at_peaks_and_norms_anew(nets):
    model = nets.tiny()
    made = aac_abn()
    assert made.student.tracking is None
    making = making_for(model, made, resolved(model, {}))
    assert (making.method, making.n, making.steps) == ("aac", 64, 500)
    assert pipeline_of_start(made, model, scheme="w4a4").reestimate
    assert not pipeline_of_start(gdfq(), model, scheme="w4a4").reestimate
    assert making_for(model, gdfq(), resolved(model, {})).method == "best"


@pytest.fixture(scope="module")
def model(nets):
    return nets.stem(seed=1)


def seen_by(model, images, shared):
    """What terms of a generator look at."""
    targets, _ = batch_norm_targets(model)
    found = observe(model, targets, images)
    zero = jnp.zeros((), jnp.int32)
    labels = jax.nn.one_hot(jnp.arange(len(images)) % 5, 5)
    told = (images, images, found.logits, found.stats, found.taps, targets, shared, labels, ())
    return Observed(*told, zero, zero, KEY)


def test_batches_are_free_within_tolerances(model, nets):
    """Of the batch, on variances, summed over channels and averaged over layers."""
    x = nets.images(model, 6)
    targets, _ = batch_norm_targets(model)
    margins = slack_margins(model, targets, KEY, count=16, variances=True)
    given = {k: (0.1, 0.2) for k in targets}
    observed = seen_by(model, x, {k: tuple(map(jnp.float32, v)) for k, v in given.items()})
    each = []
    for name, target in targets.items():
        means, vars_ = (
            np.asarray(v) for v in (observed.stats[name].mean, observed.stats[name].var)
        )
        mean = means.mean(0)
        var = (vars_ + (means - mean) ** 2).mean(0)
        gap = np.maximum(np.abs(mean - np.asarray(target.mean)) - 0.1, 0) ** 2
        gap += np.maximum(np.abs(var - np.asarray(target.var)) - 0.2, 0) ** 2
        each.append(gap.sum())
    assert float(slack_batch_match(observed)) == pytest.approx(np.mean(each), rel=1e-4)
    wide = {k: (jnp.float32(1e3), jnp.float32(1e3)) for k in targets}
    assert float(slack_batch_match(observed._replace(shared=wide))) == 0.0
    plain = slack_margins(model, targets, KEY, count=16)
    for name in targets:
        assert float(margins[name][0]) == float(plain[name][0])
        assert float(margins[name][1]) != float(plain[name][1])


def test_terms_of_adaptability():
    rng = np.random.default_rng(0)
    t, s = rng.normal(size=(2, 6, 5)).astype(np.float32) * 2
    nothing: Any = ()
    teacher, student = (Answers(jnp.asarray(v), {}, nothing) for v in (t, s))
    labels = np.eye(5, dtype=np.float32)[[0, 1, 2, 3, 4, 0]]
    lesson = Lesson(nothing, jnp.asarray(labels), teacher, student, KEY)
    zero = jnp.zeros((), jnp.int32)
    told = (nothing, nothing, jnp.asarray(t), {}, {}, {}, lesson, jnp.asarray(labels), ())
    observed = Observed(*told, zero, zero, KEY)
    log = lambda v: v - np.log(np.exp(v).sum(1, keepdims=True))
    entropy = lambda v: -(np.exp(log(v)) * log(v)).sum(1).mean()
    ce = lambda v: -(labels * log(v)).sum(1).mean()
    assert float(disagreed_labels(observed)) == pytest.approx(ce(t - s), rel=1e-5)
    assert float(agreed_labels(observed)) == pytest.approx(ce(t + s), rel=1e-5)
    share = entropy(t - s) / np.log(5)
    for low, high in ((0.0, 1.0), (share + 0.1, 1.0), (0.0, share - 0.1)):
        wanted = max(low - share, 0) + max(share - high, 0)
        assert float(kept_between(low, high)(observed)) == pytest.approx(wanted, abs=1e-5)
    wanted = -entropy((t - s) / 20)
    assert float(even_gap(temperature=20.0)(lesson)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FACTORIES)
def test_they_play(name, nets):
    """A few rounds; centres that images move are remembered from round to round."""
    model = nets.tiny()
    folded = fold_batch_norm(model)
    images = nets.images(folded, 8)
    student = calibrate(folded, resolve(folded.graph, Scheme(4, 4), "zsq_all_low"), images)
    how: dict[str, Any] = {"noise_images": 8} if name == "dsg_qat" else {}
    method = FACTORIES[name](steps=3, batch=4, warmup=2, **how)
    _, report = trained(student, folded, method, TrainingSetup(images, images, KEY), unfolded=model)
    assert report.steps == 3
    assert np.isfinite(report.after)
