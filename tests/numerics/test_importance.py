"""Scores of filters against their definitions."""

import numpy as np
import pytest

from dfq_jax.numerics import importance
from dfq_jax.numerics.regression import refitted
from dfq_jax.numerics.substitution import FilterGram, lbyl, merged, udfc

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(5, 7))


def test_norms_and_distances():
    assert np.allclose(importance.norm(ROWS, 1.0), np.abs(ROWS).sum(1))
    assert np.allclose(importance.norm(ROWS, 2.0), np.linalg.norm(ROWS, axis=1))
    apart = np.linalg.norm(ROWS[:, None] - ROWS[None], axis=2).sum(1)
    assert np.allclose(importance.distances(ROWS), apart)


def test_what_others_cannot_say_is_the_residual_of_a_regression():
    x = RNG.normal(size=(400, 4)) @ RNG.normal(size=(4, 4))
    x[:, 2] = x[:, 0] - 0.5 * x[:, 1] + 1e-3 * x[:, 2]
    found = importance.left_unexplained(x.T @ x / 400, 0.0)
    for j in range(4):
        others = np.delete(x, j, 1)
        rest = x[:, j] - others @ np.linalg.lstsq(others, x[:, j], rcond=None)[0]
        assert np.isclose(found[j], np.mean(rest**2), rtol=1e-4)
    assert found.argmin() in (0, 1, 2)


def test_every_group_has_a_mean_of_one():
    found = importance.normalised(np.array([1.0, 3.0, 10.0, 30.0, 0.0]), np.array([0, 0, 1, 1, 2]))
    assert np.allclose(found, [0.5, 1.5, 0.5, 1.5, 0.0])


# what stands in for channels


def gram_of(filters, bias, var, gain=None):
    gains = np.ones(len(bias)) if gain is None else gain
    return FilterGram(filters @ filters.T, bias, var, gains)


GONE, LEFT = np.array([4]), np.arange(4)


def test_a_filter_twice_another_becomes_it():
    rows, bias = ROWS.copy(), RNG.normal(size=5)
    rows[4], bias[4] = 2 * rows[1], 2 * bias[1]
    known = gram_of(rows, bias, np.ones(5))
    assert np.allclose(merged(known, GONE, LEFT), [[0, 2, 0, 0]])
    for method in (lbyl, udfc):
        exact = method(known, GONE, LEFT, size=1e-9)
        assert np.allclose(exact, [[0, 2, 0, 0]], atol=1e-6)


def test_what_nothing_is_like_is_not_merged():
    known = gram_of(np.eye(5), np.zeros(5), np.ones(5))
    assert not merged(known, GONE, LEFT).any()


@pytest.mark.parametrize("method", [lbyl, udfc])
def test_a_sum_of_filters_is_found(method):
    rows, bias = ROWS.copy(), RNG.normal(size=5)
    rows[4], bias[4] = 0.7 * rows[2] + 0.4 * rows[3], 0.7 * bias[2] + 0.4 * bias[3]
    known = gram_of(rows, bias, np.ones(5), RNG.uniform(0.5, 2, 5))
    assert np.allclose(method(known, GONE, LEFT, size=1e-9), [[0, 0, 0.7, 0.4]], atol=1e-5)


def test_lbyl_is_the_least_of_its_objective():
    """In the paper's terms: filters before their norms, coefficients `s`, `K` and `a`."""
    raw, gamma, sigma = RNG.normal(size=(5, 7)), RNG.uniform(0.5, 2, 5), RNG.uniform(0.5, 2, 5)
    beta, mu = RNG.normal(size=5), RNG.normal(size=5)
    gain = gamma / sigma
    known = gram_of(gain[:, None] * raw, beta - gain * mu, gamma**2, gain)
    found = lbyl(known, GONE, LEFT, bias=0.3, size=0.2)[0]
    s = found * gain[4] ** -1 * gain[:4]
    x, a = raw[:4].T, mu[:4] - sigma[:4] * beta[:4] / gamma[:4]
    size = gamma[4] / gamma[:4] * sigma[:4] / sigma[4]

    def objective(s):
        shift = gain[4] * (s @ a) + (beta[4] - gain[4] * mu[4])
        return np.sum((x @ s - raw[4]) ** 2) + 0.3 * shift**2 + 0.2 * np.sum((size * s) ** 2)

    for _ in range(20):
        assert objective(s) <= objective(s + 1e-3 * RNG.normal(size=4))


# layers fitted anew


def test_a_layer_fitted_to_the_rest_is_the_regression():
    x = RNG.normal(size=(500, 6)) @ RNG.normal(size=(6, 6))
    w, left = RNG.normal(size=(6, 3)), np.array([0, 1, 3, 5])
    kept = x[:, left]
    found = refitted(kept.T @ kept / 500, kept.T @ x / 500, w, w[left], 1e-9)
    wanted = np.linalg.lstsq(kept, x @ w, rcond=None)[0]
    assert np.allclose(found, wanted, atol=1e-5)
    strong = refitted(kept.T @ kept / 500, kept.T @ x / 500, w, w[left], 1e6)
    assert np.allclose(strong, w[left], atol=1e-4)
