from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.synthesis.terms.base import cross_entropy
from dfq_jax.synthesis.terms.classes import (
    ClassMemory,
    SoftLabels,
    class_distance,
    class_margin,
    competition,
    focal_cross_entropy,
    no_classes_yet,
    penultimate,
    soft_inception,
    soft_labels,
    with_images,
)

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 4)) * 3
OTHERS = RNG.normal(size=(6, 4)) * 3
OWN = np.array([0, 2, 2, 3, 1, 0])
LABELS = np.eye(4)[OWN]
FEATURES = RNG.normal(size=(6, 5))


def f32(x):
    return jnp.asarray(x, jnp.float32)


def memory_of(features, own, classes=4):
    """What would be remembered of images, by loops."""
    sums, counts = np.zeros((classes, features.shape[1])), np.zeros(classes)
    for feature, label in zip(features, own, strict=True):
        sums[label] += feature
        counts[label] += 1
    return ClassMemory(f32(sums), f32(counts))


def test_soft_labels_ask_half_of_the_images_for_less():
    wanted = soft_labels(0.6)(KEY, 400, 5)
    labels, confidence = map(np.asarray, wanted)
    np.testing.assert_array_equal(labels.sum(1), 1)
    assert labels.sum(0).min() > 50
    soft = confidence[confidence < 1]
    assert 160 < soft.size < 240
    assert 0.6 <= soft.min() < 0.63
    assert 0.97 < soft.max() < 1
    assert soft.mean() == pytest.approx(0.8, abs=0.02)
    assert (soft_labels(1.0)(KEY, 50, 5).confidence == 1).all()


def test_soft_inception_against_numpy():
    confidence = RNG.uniform(0.5, 1, 6)
    found = soft_inception(f32(LOGITS), SoftLabels(f32(LABELS), f32(confidence)))
    wanted = np.mean((softmax(LOGITS, axis=1)[np.arange(6), OWN] - confidence) ** 2)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_soft_inception_sees_the_label_only():
    """Zero where its probability is as wanted; how the others share the rest does not count."""
    spread = [[0.7, 0.1, 0.1, 0.1], [0.7, 0.3 - 2e-6, 1e-6, 1e-6], [0.7, 1e-6, 0.1, 0.2 - 1e-6]]
    loss = lambda p: soft_inception(
        f32(np.log([p])), SoftLabels(jnp.eye(4)[:1], jnp.full(1, 0.7, jnp.float32))
    )
    assert max(float(loss(p)) for p in spread) < 1e-12
    assert float(loss([0.9, 0.05, 0.03, 0.02])) == pytest.approx(0.04, rel=1e-4)
    wanted = SoftLabels(jnp.eye(4)[:1], jnp.full(1, 0.2, jnp.float32))
    values = [float(soft_inception(f32(np.log([p])), wanted)) for p in spread]
    np.testing.assert_allclose(values, 0.25, rtol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_cross_entropy_and_its_slope(gamma):
    torch = pytest.importorskip("torch")
    t = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    each = torch.nn.functional.cross_entropy(t, torch.tensor(OWN), reduction="none")
    factor = (1 - torch.softmax(t, 1)[torch.arange(6), torch.tensor(OWN)]) ** gamma
    loss = partial(focal_cross_entropy, labels=f32(LABELS), gamma=gamma)
    for stop in (False, True):
        wanted = torch.mean((factor.detach() if stop else factor) * each)
        (slope,) = torch.autograd.grad(wanted, t, retain_graph=True)
        ours = jax.value_and_grad(partial(loss, stop_grad_weight=stop))(f32(LOGITS))
        assert float(ours[0]) == pytest.approx(wanted.item(), rel=1e-4)
        np.testing.assert_allclose(ours[1], slope.numpy(), atol=1e-5)


def test_focal_cross_entropy_at_its_ends():
    plain = cross_entropy(f32(LOGITS), f32(LABELS))
    assert float(focal_cross_entropy(f32(LOGITS), f32(LABELS), 0.0)) == pytest.approx(float(plain))
    sure = f32(LABELS * 200)  # probability 1 in float32
    for gamma in (0.0, 0.3, 0.5, 2.0):
        slope = jax.grad(lambda x, g=gamma: focal_cross_entropy(x, f32(LABELS), g))(sure)
        assert np.isfinite(slope).all()
    assert float(focal_cross_entropy(sure, f32(LABELS), 0.5)) < 1e-6


def divergence(a, b):
    """Kullback-Leibler, mean over rows."""
    return np.mean(np.sum(a * (np.log(a) - np.log(b)), axis=1))


def test_competition_against_numpy():
    p, q = softmax(LOGITS / 3, axis=1), softmax(OTHERS / 3, axis=1)
    mean = (p + q) / 2
    wanted = 1 - (divergence(p, mean) + divergence(q, mean)) / 2
    assert float(competition(f32(LOGITS), f32(OTHERS))) == pytest.approx(wanted, rel=1e-5)
    p, q = softmax(LOGITS, axis=1), softmax(OTHERS, axis=1)
    mean = np.clip((p + q) / 2, 0.01, 0.99)
    p, q = np.clip(p, 0.01, 0.99), np.clip(q, 0.01, 0.99)
    wanted = 1 - np.clip((divergence(mean, p) + divergence(mean, q)) / 2, 0, 1)
    found = competition(f32(LOGITS), f32(OTHERS), temperature=1.0, exchanged=True)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("exchanged", [False, True])
def test_competition_is_one_where_networks_agree_and_never_leaves_its_range(exchanged):
    loss = partial(competition, exchanged=exchanged)
    for scale in (0.0, 1.0, 300.0):
        assert float(loss(f32(LOGITS * scale), f32(LOGITS * scale))) == pytest.approx(1, abs=1e-6)
        assert 0 <= float(loss(f32(LOGITS * scale), f32(OTHERS * scale))) <= 1 + 1e-6
    assert float(loss(f32(LOGITS), f32(OTHERS))) < 0.999
    opposite = np.eye(4)[:, ::-1] * 900
    least = float(loss(f32(np.eye(4) * 900), f32(opposite)))
    assert least == pytest.approx(0 if exchanged else 1 - np.log(2), abs=1e-5)
    slope = jax.grad(loss)(f32(np.eye(4) * 900), f32(opposite))
    assert np.isfinite(slope).all()


def test_memory_adds_features_class_by_class():
    start = no_classes_yet({}, 1, 4, {"features": 5})
    assert [v.shape for v in start] == [(4, 5), (4,)]
    assert not any(np.asarray(v).any() for v in start)
    once = with_images(start, f32(FEATURES), f32(LABELS))
    twice = with_images(once, f32(FEATURES[:2] * 3), f32(LABELS[:2]))
    both = np.concatenate([FEATURES, FEATURES[:2] * 3])
    wanted = memory_of(both, np.concatenate([OWN, OWN[:2]]))
    np.testing.assert_allclose(twice.sums, wanted.sums, rtol=1e-5)
    np.testing.assert_array_equal(twice.counts, [3, 1, 3, 1])


EARLIER = RNG.normal(size=(5, 5)), np.array([0, 0, 2, 3, 3])  # none of class 1


def test_distances_to_classes_against_numpy():
    found, known = class_distance(f32(FEATURES), f32(LABELS), memory_of(*EARLIER))
    np.testing.assert_array_equal(known, OWN != 1)
    for i, label in enumerate(OWN):
        if label != 1:
            centre = EARLIER[0][EARLIER[1] == label].mean(0)
            cosine = FEATURES[i] @ centre / np.linalg.norm(FEATURES[i]) / np.linalg.norm(centre)
            assert float(found[i]) == pytest.approx(1 - cosine, abs=1e-5)


@pytest.mark.parametrize(("lower", "upper"), [(0.7, 0.9), (0.9, 1.1), (0.0, 0.4)])
def test_margin_against_numpy(lower, upper):
    memory = memory_of(*EARLIER)
    distance, known = map(np.asarray, class_distance(f32(FEATURES), f32(LABELS), memory))
    outside = np.maximum(lower - distance, 0) + np.maximum(distance - upper, 0)
    wanted = (outside * known).sum() / (known.sum() + 1e-6)
    found = class_margin(f32(FEATURES), f32(LABELS), memory, lower, upper)
    assert wanted > 0.01
    assert float(found) == pytest.approx(wanted, rel=1e-4)


def test_margin_is_zero_exactly_inside():
    memory = memory_of(*EARLIER)
    distance, known = class_distance(f32(FEATURES), f32(LABELS), memory)
    inside = np.asarray(distance)[np.asarray(known) > 0]
    low, high = float(inside.min()), float(inside.max())
    cost = lambda *ends: float(class_margin(f32(FEATURES), f32(LABELS), memory, *ends))
    assert cost(0.0, 2.0) == 0
    assert cost(low - 1e-4, high + 1e-4) == 0
    assert cost(low + 1e-2, high + 1e-4) > 0
    assert cost(low - 1e-4, high - 1e-2) > 0
    nobody = ClassMemory(jnp.zeros((4, 5)), jnp.zeros(4))
    assert float(class_margin(f32(FEATURES), f32(LABELS), nobody, 0.9, 0.91)) == 0


def test_margin_has_a_finite_slope_for_dead_features():
    for features, memory in [
        (f32(0 * FEATURES), memory_of(*EARLIER)),
        (f32(FEATURES), ClassMemory(jnp.zeros((4, 5)), jnp.ones(4))),
    ]:
        slope = jax.grad(class_margin)(features, f32(LABELS), memory, 1.5, 1.8)
        assert np.isfinite(slope).all()


def test_the_layer_that_reads_the_features(nets):
    assert penultimate(nets.stem().graph) == "fc"
    assert penultimate(nets.vit().graph) == "head"
    message = r"lacks a final linear layer .*last layer with weights is scores = Conv2d"
    with pytest.raises(UnsupportedModelError, match=message):
        penultimate(nets.unet().graph)
