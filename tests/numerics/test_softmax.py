import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from dfq_jax.numerics.softmax import curvature_probe, divergence, divergences


def scores(seed, *shape):
    return 2 * jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4, 7)])
def test_divergence_is_the_mean_over_positions(shape):
    exact, rough = scores(0, *shape), scores(1, *shape)
    p, q = (softmax(np.asarray(v, np.float64), axis=-1) for v in (exact, rough))
    truth = rel_entr(p, q).sum(-1).mean()
    np.testing.assert_allclose(divergence(exact, rough), truth, rtol=1e-5)
    assert float(divergence(exact, exact)) == 0
    assert float(divergence(exact, exact + 3.0)) < 1e-6


def test_divergences_of_warm_scores():
    exact, rough = scores(0, 6, 5), scores(1, 6, 5)
    p, q = (softmax(np.asarray(v, np.float64) / 4, axis=-1) for v in (exact, rough))
    truth = rel_entr(p, q).sum(-1)
    np.testing.assert_allclose(divergences(exact, rough, 4.0), truth, rtol=1e-4, atol=1e-6)


def test_divergence_of_single_scores_is_that_of_a_coin():
    exact, rough = scores(0, 9, 1), scores(1, 9, 1)
    p, q = (1 / (1 + np.exp(-np.asarray(v, np.float64))) for v in (exact, rough))
    truth = (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).mean()
    np.testing.assert_allclose(divergence(exact, rough), truth, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4), (3, 1)])
def test_probe_has_the_hessian_of_the_divergence(shape):
    at = scores(3, *shape)
    flat = lambda v: divergence(at, v.reshape(shape))
    hessian = np.asarray(jax.hessian(flat)(at.ravel()))
    draws = jax.vmap(lambda k: curvature_probe(k, at))(jax.random.split(jax.random.key(0), 20000))
    found = np.asarray(draws).reshape(20000, -1)
    np.testing.assert_allclose(found.T @ found / 20000, hessian, atol=0.02 * np.trace(hessian))
    assert np.trace(found.T @ found) / 20000 == pytest.approx(np.trace(hessian), rel=0.02)


def test_probe_ignores_what_all_classes_share():
    probe = curvature_probe(jax.random.key(1), scores(4, 5, 8))
    np.testing.assert_allclose(jnp.sum(probe, axis=-1), 0, atol=1e-6)
