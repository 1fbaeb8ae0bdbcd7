import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.synthesis.terms.match import (
    EPS,
    batch_norm_match,
    batch_z_gap,
    enhanced,
    gauss_kl,
    layer_losses,
    matched_kl,
    relative_batch_match,
    tamed,
    unbiased_std,
    z_match,
    z_score,
)
from dfq_jax.synthesis.terms.targets import Stats


def f32(x):
    return jnp.asarray(x, jnp.float32)


def numpy_losses(stats, targets, slack=None):
    """Sum over channels of squared, thresholded gaps: (samples, layers)."""
    columns = []
    for name, t in targets.items():
        mean, var = np.asarray(stats[name].mean, float), np.asarray(stats[name].var, float)
        n = stats[name].positions
        std = np.sqrt(var * n / (n - 1) + 1e-6)
        wanted = np.sqrt(np.asarray(t.var, float) + 1e-6)
        delta, gamma = (0, 0) if slack is None else slack[name]
        m = np.maximum(np.abs(mean - np.asarray(t.mean)) - float(delta), 0) ** 2
        s = np.maximum(np.abs(std - wanted) - float(gamma), 0) ** 2
        columns.append(((m + s) * np.asarray(t.usable)).sum(1))
    return np.stack(columns, axis=1)


@pytest.fixture(scope="module")
def scene(scenes: Any) -> Any:
    """Three samples, two layers of 4 and 5 channels, one channel masked."""
    rng = np.random.default_rng(0)
    stats = {
        name: Stats(f32(rng.normal(size=(3, c))), f32(rng.uniform(0, 2, (3, c))), n)
        for name, c, n in [("a", 4, 16), ("b", 5, 9)]
    }
    targets = {
        "a": scenes.target(rng.normal(size=4), rng.uniform(0.1, 2, 4)),
        "b": scenes.target(rng.normal(size=5), rng.uniform(0.1, 2, 5), [1, 1, 0, 1, 1]),
    }
    return scenes.observed(stats=stats, targets=targets)


def test_layer_losses_against_numpy(scene):
    wanted = numpy_losses(scene.stats, scene.targets)
    np.testing.assert_allclose(layer_losses(scene), wanted, rtol=1e-5)
    assert float(batch_norm_match(scene)) == pytest.approx(wanted.sum(1).mean(), rel=1e-5)


def test_masked_channels_do_not_count(scene):
    moved = dict(scene.stats)
    moved["b"] = Stats(moved["b"].mean.at[:, 2].add(9.0), moved["b"].var.at[:, 2].add(9.0), 9)
    np.testing.assert_array_equal(layer_losses(scene._replace(stats=moved)), layer_losses(scene))


def test_deviations_are_unbiased():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 4, 5))
    stats = Stats(f32(x.mean((1, 2))), f32(x.var((1, 2))), 12)
    wanted = np.sqrt(x.var((1, 2), ddof=1) + EPS)
    np.testing.assert_allclose(unbiased_std(stats), wanted, rtol=1e-6)
    one = Stats(jnp.zeros((1, 1)), jnp.zeros((1, 1)), 1)
    assert float(unbiased_std(one)[0, 0]) == pytest.approx(EPS**0.5)


def test_statistics_are_matched_by_each_sample_not_by_the_batch(scenes):
    """Two samples with means +1 and -1 average to the target 0, and still cost 1 a channel."""
    stats = {"bn": Stats(f32([[1.0] * 3, [-1.0] * 3]), jnp.full((2, 3), 1.5), 4)}
    o = scenes.observed(stats=stats, targets={"bn": scenes.target(np.zeros(3), np.full(3, 2.0))})
    assert float(batch_norm_match(o)) == pytest.approx(3, rel=1e-5)


def test_relative_match_of_the_whole_batch(scenes):
    rng = np.random.default_rng(8)
    x = rng.normal(size=(3, 4, 5, 6)) * rng.uniform(0.5, 2, 6) + rng.normal(size=(3, 1, 1, 6))
    stats = {"bn": Stats(f32(x.mean((1, 2))), f32(x.var((1, 2))), 20)}
    mean, var = rng.normal(size=6), rng.uniform(0.5, 2, 6)
    usable = np.array([True] * 5 + [False])
    gaps = (x.mean((0, 1, 2)) - mean) ** 2 + (x.std((0, 1, 2)) - np.sqrt(var)) ** 2
    wanted = (gaps / var * usable).mean()
    one = scenes.target(mean, var, usable)
    alone = scenes.observed(stats=stats, targets={"bn": one})
    assert float(relative_batch_match(alone)) == pytest.approx(wanted, rel=1e-4)
    both = scenes.observed(stats=stats | {"again": stats["bn"]}, targets={"bn": one, "again": one})
    assert float(relative_batch_match(both)) == pytest.approx(2 * wanted, rel=1e-4)


def test_gradients_point_away_from_recorded_moments(scenes):
    stats = lambda mean: {"bn": Stats(mean, jnp.ones((1, 2)), 4)}
    loss = lambda mean: batch_norm_match(
        scenes.observed(stats=stats(mean), targets={"bn": scenes.target([0.0, 0.0], [1.0, 1.0])})
    )
    np.testing.assert_allclose(jax.grad(loss)(f32([[0.5, -0.25]])), [[1.0, -0.5]], rtol=1e-6)


SLACK = {"a": (0.3, 0.1), "b": (0.05, 0.6)}


def slack(factor):
    return {k: (f32(d * factor), f32(g * factor)) for k, (d, g) in SLACK.items()}


def test_tolerances_against_numpy(scene):
    wanted = numpy_losses(scene.stats, scene.targets, slack(1.0))
    np.testing.assert_allclose(layer_losses(scene, slack(1.0)), wanted, rtol=1e-5)
    np.testing.assert_array_equal(layer_losses(scene, slack(0.0)), layer_losses(scene))


def test_more_tolerance_never_costs_more(scene):
    losses = [np.asarray(layer_losses(scene, slack(f))) for f in (0.0, 0.5, 1.0, 2.0, 50.0)]
    for tight, loose in itertools.pairwise(losses):
        assert np.all(loose <= tight)
        assert np.any(loose < tight)
    assert np.all(losses[-1] == 0)


def test_inside_the_tolerance_loss_and_gradient_vanish(scenes):
    t = scenes.target([1.0, -1.0], [1.0, 4.0])

    def loss(mean, std):
        stats = Stats(mean, (std**2 - EPS) * 15 / 16, 16)
        seen = scenes.observed(stats={"bn": stats}, targets={"bn": t})
        return layer_losses(seen, {"bn": (f32(0.2), f32(0.3))}).sum()

    inside = (f32([[1.1, -1.1]]), f32([[1.15, 1.85]]))
    value, slopes = jax.value_and_grad(loss, argnums=(0, 1))(*inside)
    assert float(value) == 0
    assert all(np.all(np.asarray(s) == 0) for s in slopes)
    outside = jax.grad(loss)(f32([[1.3, -1.1]]), inside[1])
    np.testing.assert_allclose(outside, [[0.2, 0]], rtol=1e-4)


def test_enhancement_weighs_each_samples_own_layer():
    losses = f32(np.random.default_rng(2).uniform(size=(5, 3)))
    weights = np.ones((5, 3))
    for sample, layer in enumerate([0, 1, 2, 0, 1]):
        weights[sample, layer] = 4.0
    wanted = (weights * np.asarray(losses)).sum() / 5
    assert float(enhanced(losses, 4.0)) == pytest.approx(wanted, rel=1e-5)
    assert float(enhanced(losses, 1.0)) == pytest.approx(float(losses.sum() / 5), rel=1e-5)


def test_enhancement_of_equal_samples_is_a_factor():
    layers = 7
    losses = jnp.tile(f32(np.random.default_rng(3).uniform(size=(1, layers))), (layers, 1))
    ratio = float(enhanced(losses, 2.0) / enhanced(losses, 1.0))
    assert ratio == pytest.approx((layers + 1) / layers, rel=1e-5)
    slope = jax.grad(lambda x: enhanced(x, 2.0))(losses)
    np.testing.assert_allclose(slope, (1 + np.eye(layers)) / layers, rtol=1e-6)


def numpy_kl(mean, var, mean_q, var_q):
    """Divergence of one Gaussian from another."""
    return np.log(np.sqrt(var_q / var)) + (var + (mean - mean_q) ** 2) / (2 * var_q) - 0.5


def test_divergence_of_gaussians():
    """The worked example, that it is the expected difference of log densities, and its least."""
    one = lambda *v: float(gauss_kl(*(f32([x]) for x in v))[0])
    assert one(0.0, 1.0, 1.0, 4.0) == pytest.approx(0.4431, abs=1e-4)
    assert one(1.0, 4.0, 0.0, 1.0) == pytest.approx(numpy_kl(1, 4, 0, 1), rel=1e-5)
    rng = np.random.default_rng(9)
    x = rng.normal(size=10**6) * 0.7 + 0.3
    density = lambda mean, std: -0.5 * ((x - mean) / std) ** 2 - np.log(std)
    sampled = np.mean(density(0.3, 0.7) - density(-0.2, 1.1))
    assert one(0.3, 0.49, -0.2, 1.21) == pytest.approx(sampled, abs=1e-2)
    mean, var, mean_q, var_q = f32(rng.uniform(0.1, 3, (4, 500)))
    assert float(gauss_kl(mean, var, mean_q, var_q).min()) > -1e-6
    assert float(jnp.abs(gauss_kl(mean, var, mean, var)).max()) < 1e-6
    assert one(0.5, 0.25, 0.5, 0.26) > 1e-4
    assert np.isfinite(one(0.0, 1.0, 0.0, 0.0))  # a collapsed channel


def test_divergence_is_level_and_curved_at_the_recorded_mean():
    mean, var = f32([0.4]), f32([0.25])
    loss = lambda mean_q: gauss_kl(mean, var, mean_q, var)[0]
    assert float(jax.grad(loss)(mean)[0]) == 0
    assert float(jax.hessian(loss)(mean)[0, 0]) == pytest.approx(1 / 0.25, rel=1e-5)


@pytest.fixture(scope="module")
def divergences(scene):
    """KL of every usable channel against the batch's moments, by NumPy, both directions."""
    ahead, back = [], []
    for name, t in scene.targets.items():
        measured = scene.stats[name]
        means, variances = np.asarray(measured.mean, float), np.asarray(measured.var, float)
        mean = means.mean(0)
        var = (variances + means**2).mean(0) - mean**2
        recorded, keep = (np.asarray(t.mean, float), np.asarray(t.var, float)), np.asarray(t.usable)
        ahead.append(numpy_kl(*recorded, mean, var)[keep])
        back.append(numpy_kl(mean, var, *recorded)[keep])
    return np.concatenate(ahead), np.concatenate(back)


def test_matched_divergence_against_numpy(scene, divergences):
    ahead, back = divergences
    assert ahead.shape == (8,)
    assert float(matched_kl()(scene)) == pytest.approx(ahead.sum(), rel=1e-4)
    assert float(matched_kl(reverse=True)(scene)) == pytest.approx(back.sum(), rel=1e-4)
    assert float(matched_kl(mean=True)(scene)) == pytest.approx(ahead.mean(), rel=1e-4)
    limit = float(np.median(ahead))
    beyond = np.where(ahead > limit, limit * (1 + np.log(ahead / limit)), ahead)
    assert float(matched_kl(limit=limit)(scene)) == pytest.approx(beyond.sum(), rel=1e-4)


def test_tamed_values_keep_order_and_slope():
    values = f32([0.0, 1.0, 9.9, 10.1, 1e3, 1e6])
    np.testing.assert_array_equal(tamed(values, None), values)
    found, slope = tamed(values, 10.0), jax.vmap(jax.grad(lambda v: tamed(v, 10.0)))(values)
    np.testing.assert_array_equal(found[:3], values[:3])
    assert np.all(np.diff(found) > 0)
    assert float(found[-1]) == pytest.approx(10 * (1 + np.log(1e5)), rel=1e-5)
    np.testing.assert_allclose(slope, 10 / np.maximum(values, 10), rtol=1e-5)


def test_z_scores():
    """Zero where means agree, the same both ways, and in any unit."""
    rng = np.random.default_rng(11)
    mean, mean_q = rng.normal(size=(2, 9))
    std, std_q = rng.uniform(0.3, 2, (2, 9))
    wanted = np.abs(mean - mean_q) / np.hypot(std + 1e-6, std_q + 1e-6)
    given = tuple(f32(v) for v in (mean, std, mean_q, std_q))
    np.testing.assert_allclose(z_score(*given), wanted, rtol=1e-5)
    np.testing.assert_array_equal(z_score(*given[2:], *given[:2]), z_score(*given))
    np.testing.assert_allclose(z_score(*(v * 30 for v in given)), wanted, rtol=1e-4)
    assert np.all(np.asarray(z_score(given[0], given[1], given[0], given[3])) == 0)
    assert np.all(np.asarray(z_score(*given)) > 0)
    wider = z_score(given[0], given[1] * 2, *given[2:])
    assert np.all(np.asarray(wider) < np.asarray(z_score(*given)))


def test_z_match_against_numpy(scene):
    """Statistics of the batch, a norm over usable channels, layers summed."""
    total = 0.0
    for name, t in scene.targets.items():
        seen = scene.stats[name]
        means, variances = np.asarray(seen.mean, float), np.asarray(seen.var, float)
        std = np.sqrt((variances + means**2).mean(0) - means.mean(0) ** 2 + EPS)
        spread = np.hypot(std, np.sqrt(np.asarray(t.var, float) + EPS))
        z = (means.mean(0) - np.asarray(t.mean, float)) / spread
        total += np.linalg.norm(z * np.asarray(t.usable))
    assert float(z_match(scene)) == pytest.approx(total, rel=1e-4)


def test_z_match_is_blind_to_deviations_of_agreeing_means(scenes):
    stats = {"bn": Stats(f32([[0.5, 1.0], [-0.5, 3.0]]), f32([[4.0, 1.0], [2.0, 0.1]]), 9)}
    seen = scenes.observed(stats=stats, targets={"bn": scenes.target([0.0, 2.0], [1.0, 0.01])})
    assert float(z_match(seen)) == pytest.approx(0, abs=1e-5)
    gap = batch_z_gap(stats["bn"], scenes.target([0.1, 2.0], [1.0, 0.01]))
    assert float(gap.mean[0]) > 0.03
    assert np.all(np.asarray(gap.spread) == 0)
    slopes = jax.grad(lambda mean: z_match(seen._replace(stats={"bn": Stats(mean, *rest)})))
    rest = (stats["bn"].var, 9)
    assert np.all(np.isfinite(slopes(stats["bn"].mean)))
