"""Decisions under noise, against closed forms and a Monte-Carlo that shares no code."""

import math

import numpy as np
import pytest

from dfq_jax.numerics import decisions
from dfq_jax.numerics.decisions import (
    SCALE,
    STRONGER,
    THIRD,
    confidences,
    expected_loss,
    half_normal,
    noise_of,
    spaced,
    temperature,
)


def scores(n=256, classes=10, seed=0, scale=3.0):
    random = np.random.default_rng(seed)
    exact = random.normal(size=(n, classes)) * scale
    return exact, random.normal(size=(n, classes))


def test_half_normal_quantiles_have_its_moments():
    x = half_normal(2000)
    assert x.mean() == pytest.approx(math.sqrt(2 / math.pi), rel=2e-3)
    assert (x**2).mean() == pytest.approx(1, rel=5e-3)
    assert (np.diff(x) > 0).all()


def test_confidences_are_a_softmax():
    random = np.random.default_rng(1)
    rest = -np.sort(np.abs(random.normal(size=(5, 7))), axis=1)
    rest[:, 0] = 0
    margins = np.array([0.2, 1.5])
    found = confidences(rest, margins, 1.7)
    for i in range(5):
        for j, margin in enumerate(margins):
            logits = np.concatenate([[margin], rest[i]]) / 1.7
            assert found[i, j] == pytest.approx(np.exp(logits[0]) / np.exp(logits).sum())


@pytest.mark.parametrize("accuracy", [0.3, 0.65, 0.92, 0.999])
def test_at_the_temperature_confidence_is_the_accuracy(accuracy):
    rest = np.zeros((4, 9)) - np.arange(9) * 0.5
    margins = 3 * half_normal(24)
    heat = temperature(rest, margins, accuracy)
    assert confidences(rest, margins, heat).mean() == pytest.approx(accuracy, abs=1e-4)


def test_noise_is_told_in_the_order_of_the_float_network():
    exact = np.array([[0.0, 5.0, 3.0], [9.0, 1.0, 2.0]])
    error = np.array([[0.1, 0.2, -0.3], [0.3, -0.1, -0.2]])
    found = noise_of(exact, exact + error)
    assert found.margin == pytest.approx([2, 7])
    assert found.rest == pytest.approx(np.array([[0, -3], [0, -1]]))
    centred = exact - exact.mean(1, keepdims=True)
    gain = (centred * (exact + error)).sum() / (centred**2).sum()
    left = STRONGER * ((centred + error) / gain - centred)
    assert found.error == pytest.approx(np.stack([left[0][[1, 2, 0]], left[1][[0, 2, 1]]]))


def test_other_classes_are_spaced_as_on_real_images():
    rest = np.array([[0.0, -0.5, -3.0], [0.0, -1.5, -2.0]])
    assert spaced(rest, 4.0) == pytest.approx(rest * THIRD * 4)
    for alone in (rest[:, :1], 0 * rest):
        assert (spaced(alone, 4.0) == alone).all()


@pytest.mark.parametrize("change", [lambda x: x, lambda x: 0.4 * x, lambda x: x + 7])
def test_what_changes_no_decision_costs_nothing(change):
    exact, _ = scores()
    assert expected_loss(noise_of(exact, change(exact)), 0.8) == (0, 0)


def test_two_classes_against_a_monte_carlo():
    """Drawn margins, Gaussian noise and a logistic posterior: nothing here is shared with it."""
    random = np.random.default_rng(5)
    margin = np.abs(random.normal(size=4096)) * 2
    exact = np.stack([margin, -margin], 1) / 2 * random.choice([-1, 1], (4096, 1))
    rough = exact + random.normal(size=exact.shape) * 0.5
    noise = noise_of(exact, rough)
    found = expected_loss(noise, 0.85)
    deviation = (noise.error[:, 0] - noise.error[:, 1]).std()
    scale = SCALE * np.sort(margin)[-128:].mean()
    real = np.abs(random.normal(size=400_000)) * scale
    confidence = lambda heat: 1 / (1 + np.exp(-real / heat))
    heats = np.geomspace(0.1, 10, 100)
    heat = heats[np.argmin([abs(confidence(h).mean() - 0.85) for h in heats])]
    flipped = real + random.normal(size=real.size) * deviation < 0
    lost = np.mean(flipped * (2 * confidence(heat) - 1))
    assert found.changed == pytest.approx(flipped.mean(), rel=0.1)
    assert found.top1 == pytest.approx(lost, rel=0.15)


def test_noise_without_bounds_leaves_one_guess_among_the_classes():
    exact, error = scores(n=512)
    found = expected_loss(noise_of(exact, 1e3 * error), 0.8)
    assert found.changed == pytest.approx(0.9, abs=0.03)
    assert found.top1 == pytest.approx(0.8 - 0.1, abs=0.03)


def test_more_noise_costs_more():
    exact, error = scores()
    costs = [
        expected_loss(noise_of(exact, exact + s * error), 0.8) for s in 0.1 * 2.0 ** np.arange(7)
    ]
    assert (np.diff([cost.top1 for cost in costs]) > 0).all()
    assert (np.diff([cost.changed for cost in costs]) > 0).all()


def test_the_unit_of_scores_does_not_matter():
    exact, error = scores()
    one, other = (
        expected_loss(noise_of(s * exact, s * (exact + error)), 0.8) for s in (1.0, 1 / 64)
    )
    assert other == pytest.approx(one, rel=1e-6)


def test_only_noise_of_margins_alike_counts(monkeypatch):
    """Strong features are clipped: noise of large margins must not leak into close decisions."""
    monkeypatch.setattr(decisions, "ALIKE", 1 / 16)
    random = np.random.default_rng(2)
    margin = np.linspace(0.01, 10, 256)
    exact = np.stack([margin, -margin], 1) / 2
    error = random.normal(size=exact.shape)
    weak, strong = (margin < 3)[:, None], (margin > 7)[:, None]
    near = expected_loss(noise_of(exact, exact + error * weak), 0.8)
    far = expected_loss(noise_of(exact, exact + error * strong), 0.8)
    assert near.changed > 0.02
    assert far.changed < 0.1 * near.changed
