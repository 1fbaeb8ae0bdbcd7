import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.synthesis.terms.base import (
    Term,
    correlation,
    cross_entropy,
    image_moments,
    image_norm,
    image_statistics,
    total_variation,
    weighted,
)

KEY = jax.random.key(0)
correlated = jax.jit(correlation)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def test_correlation_of_known_batches():
    one = jax.random.normal(KEY, (1, 4, 4, 3))
    assert float(correlated(jnp.tile(one, (5, 1, 1, 1)))) == pytest.approx(4, rel=1e-4)
    basis = jnp.eye(6).reshape(6, 1, 2, 3) * 3
    assert float(correlated(basis)) == pytest.approx(0, abs=1e-6)
    assert float(correlated(jnp.concatenate([one, -2 * one]))) == pytest.approx(1, rel=1e-4)


def test_correlation_is_the_spread_of_eigenvalues():
    x = np.random.default_rng(4).normal(size=(6, 3, 2, 2)) + 0.5
    flat = x.reshape(6, -1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    wanted = np.mean((np.linalg.eigvalsh(unit @ unit.T) - 1) ** 2)
    assert float(correlated(f32(x))) == pytest.approx(wanted, rel=1e-4)


def test_image_statistics_against_numpy(scenes):
    x = np.random.default_rng(5).normal(size=(3, 4, 5, 3)) * 2 + 1
    mean, std = x.mean((1, 2)), np.sqrt(x.var((1, 2), ddof=1) + 1e-6)
    wanted = (mean**2 + (std - 1) ** 2).sum(1).mean()
    assert float(image_statistics(scenes.observed(images=x))) == pytest.approx(wanted, rel=1e-5)
    for found, value in zip(image_moments(f32(x)), (mean, std), strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5)


@pytest.mark.torch
def test_priors_match_torch():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(6).normal(size=(3, 5, 6, 3)).astype(np.float32)
    t = torch.tensor(x).permute(0, 3, 1, 2)
    pairs = [
        (t[:, :, :, :-1], t[:, :, :, 1:]),
        (t[:, :, :-1], t[:, :, 1:]),
        (t[:, :, :-1, :-1], t[:, :, 1:, 1:]),
        (t[:, :, :-1, 1:], t[:, :, 1:, :-1]),
    ]
    wanted = sum(torch.norm(a - b) for a, b in pairs)
    assert float(total_variation(f32(x))) == pytest.approx(float(wanted), rel=1e-5)
    wanted = torch.norm(t.reshape(3, -1), dim=1).mean()
    assert float(image_norm(f32(x))) == pytest.approx(float(wanted), rel=1e-5)
    logits = np.random.default_rng(7).normal(size=(4, 5)).astype(np.float32) * 9
    soft = torch.softmax(torch.tensor(logits[::-1].copy()), 1)
    wanted = torch.nn.functional.cross_entropy(torch.tensor(logits), soft)
    ours = cross_entropy(f32(logits), f32(soft.numpy()))
    assert float(ours) == pytest.approx(float(wanted), rel=1e-5)


def test_priors_are_differentiable_on_flat_images():
    flat = jnp.zeros((2, 3, 3, 3))
    for term in (total_variation, image_norm, correlation):
        assert np.all(np.isfinite(jax.jit(jax.grad(term))(flat)))


def test_weighted_sum_reports_its_parts(scenes):
    terms = [
        Term("size", 2.0, lambda o: jnp.sum(o.images)),
        Term("count", 0.5, lambda o: f32(o.images.shape[0])),
    ]
    total, parts = weighted(terms, scenes.observed(images=np.ones((2, 1, 1, 3))))
    assert float(total) == 2 * 6 + 0.5 * 2
    assert {k: float(v) for k, v in parts.items()} == {"size": 6, "count": 2}
    assert weighted([], scenes.observed())[0] == 0
