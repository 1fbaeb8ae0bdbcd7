from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import GlobalAvgPool
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.synthesis.terms.centres import (
    Centre,
    Clusters,
    batch_distance,
    centre_distance,
    class_centres,
    class_means,
    classified,
    deep_layers,
    distorted,
    followed,
    masked_mean,
    of_class,
    recorded_clusters,
    sample_moments,
)
from dfq_jax.synthesis.terms.targets import Stats, batch_norm_targets
from dfq_jax.types import InputContract

KEY = jax.random.key(2)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def label(*classes):
    return jnp.array(classes, jnp.int32)


@pytest.mark.parametrize(
    ("layers", "first"), [(1, 0), (2, 0), (4, 0), (5, 1), (20, 8), (27, 12), (52, 24), (53, 25)]
)
def test_the_first_deep_layer(layers, first):
    names = [f"bn{i}" for i in range(layers)]
    assert deep_layers(names) == tuple(names[first:])


@pytest.fixture(scope="module")
def scene(scenes: Any) -> Any:
    """Four samples of three classes, layers "a" and "b" and activations they are of."""
    rng = np.random.default_rng(0)
    x = {k: rng.normal(size=(4, 3, 2, c)) * 2 + rng.normal(size=c) for k, c in [("a", 4), ("b", 6)]}
    stats = {k: scenes.stats_of(v) for k, v in x.items()}
    usable = {"a": np.ones(4), "b": [1, 1, 1, 0, 1, 1]}
    targets = {
        k: scenes.target(np.zeros(v.shape[-1]), np.ones(v.shape[-1]), usable[k])
        for k, v in x.items()
    }
    return x, scenes.observed(stats=stats, targets=targets)


@pytest.fixture(scope="module")
def centres():
    rng = np.random.default_rng(1)
    return {
        k: Centre(f32(rng.normal(size=(3, c))), f32(rng.uniform(0.5, 2, (3, c))))
        for k, c in [("a", 4), ("b", 6)]
    }


def test_distance_of_samples_against_numpy(scene, centres):
    x, observed = scene
    wanted = np.zeros(4)
    for name in ("a", "b"):
        mean, spread = (np.asarray(v, float)[[2, 0, 0, 1]] for v in centres[name])
        flat = x[name].reshape(4, 6, -1)
        gap = (flat.mean(1) - mean) ** 2 + (flat.std(1) - spread) ** 2
        wanted += (gap * np.asarray(observed.targets[name].usable)).mean(1) / 2
    found = centre_distance(observed, of_class(centres, label(2, 0, 0, 1)), sample_moments)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_distance_of_the_batch_against_numpy(scene, centres):
    x, observed = scene
    wanted = 0.0
    for name in ("a", "b"):
        flat = x[name].reshape(24, -1)
        mean, spread = (np.asarray(v[1], float) for v in centres[name])
        gap = (flat.mean(0) - mean) ** 2 + (flat.var(0) - spread) ** 2
        wanted += (gap * np.asarray(observed.targets[name].usable)).mean() / 2
    found = batch_distance(observed, of_class(centres, jnp.array(1)))
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_only_the_layers_of_the_centres_have_a_slope(scene, centres):
    _, observed = scene

    def loss(stats, noise):
        wanted = of_class({"b": centres["b"]}, jnp.array(0))
        drawn = distorted(wanted, KEY, noise)
        return batch_distance(observed._replace(stats=stats), drawn)

    for noise in [(0.0, 0.0), (0.5, 1.0)]:
        slope = jax.grad(loss)(observed.stats, noise)
        for value in (slope["a"].mean, slope["a"].var):
            np.testing.assert_array_equal(value, 0)
        usable = np.array([1, 1, 1, 0, 1, 1], bool)
        for value in (slope["b"].mean, slope["b"].var):
            assert (np.asarray(value)[:, usable] != 0).all()
            np.testing.assert_array_equal(np.asarray(value)[:, ~usable], 0)


NOISE = (0.5, 1.0)


def draws(centre, count, **how):
    keys = jax.random.split(KEY, count)
    return jax.jit(jax.vmap(lambda key: distorted({"a": centre}, key, NOISE, **how)["a"]))(keys)


def test_noise_has_the_size_it_is_given():
    centre = Centre(f32([[1.0, -2.0], [0.0, 3.0]]), f32([[4.0, 1.0], [2.0, 0.5]]))
    for drawn, middle, size in zip(draws(centre, 20000), centre, NOISE, strict=True):
        np.testing.assert_allclose(drawn.mean(0), middle, atol=0.04)
        np.testing.assert_allclose(drawn.std(0), size, rtol=0.03)
    parts = np.stack([np.asarray(v).reshape(20000, 4) for v in draws(centre, 20000)], 1)
    correlations = np.corrcoef(parts.reshape(20000, 8).T) - np.eye(8)
    assert np.abs(correlations).max() < 0.04  # of channels, samples, means and spreads


def test_noise_in_units_of_each_channel():
    centre = Centre(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    units = {"a": f32([0.1, 4.0])}
    for drawn, size in zip(draws(centre, 20000, units=units), NOISE, strict=True):
        np.testing.assert_allclose(drawn.std(0)[0], size * np.array([0.1, 4.0]), rtol=0.03)


def test_layers_have_noise_of_their_own():
    centre = Centre(jnp.zeros(3), jnp.zeros(3))
    drawn = distorted({"a": centre, "b": centre}, KEY, NOISE)
    assert np.abs(drawn["a"].mean - drawn["b"].mean).min() > 0
    alone = distorted({"b": centre}, KEY, NOISE)
    np.testing.assert_array_equal(alone["b"].mean, drawn["b"].mean)


def test_noise_adds_its_variance_to_the_distance_and_nothing_to_its_slope(scene, centres):
    """E[distorted] = plain + 0.5^2 + 1.0^2 (over usable channels), the same for slopes."""
    _, observed = scene
    observed = observed._replace(targets={"a": observed.targets["a"]})
    wanted = of_class({"a": centres["a"]}, label(0, 1, 2, 0))

    def loss(mean, target):
        stats = {"a": Stats(mean, observed.stats["a"].var, 6)}
        seen = observed._replace(stats=stats)
        return centre_distance(seen, target, sample_moments).mean()

    both = jax.value_and_grad(loss)
    mean = observed.stats["a"].mean
    plain, slope = both(mean, wanted)
    keys = jax.random.split(KEY, 20000)
    noisy = jax.jit(jax.vmap(lambda key: both(mean, distorted(wanted, key, NOISE))))
    values, slopes = noisy(keys)
    assert float(values.mean()) == pytest.approx(float(plain) + 1.25, rel=0.02)
    np.testing.assert_allclose(slopes.mean(0), slope, atol=0.002)
    assert np.abs(slope).max() > 0.02
    assert slopes.std(0).min() > 0.02  # a fresh draw each time


def test_samples_out_of_the_mask_neither_count_nor_have_a_slope():
    values, mask = f32([1.0, 5.0, 3.0]), jnp.array([True, False, True])
    value, slope = jax.value_and_grad(masked_mean)(values, mask)
    assert float(value) == 2
    np.testing.assert_array_equal(slope, [0.5, 0, 0.5])
    assert float(masked_mean(values, jnp.zeros(3, bool))) == 0


def test_classified():
    logits = f32([[0.1, 0.9], [0.9, 0.1], [0.2, 0.1]])
    found = classified(logits, f32([[0, 1], [0, 1], [1, 0]]))
    assert found.tolist() == [True, False, True]


def test_class_means_against_numpy():
    rng = np.random.default_rng(3)
    values, classes = rng.normal(size=(20, 4)), rng.integers(0, 5, 20)
    mask = (rng.uniform(size=20) < 0.7) & (classes != 3)
    found = class_means(f32(values), label(*classes), jnp.asarray(mask), 6)
    for c in range(6):
        mine = mask & (classes == c)
        wanted = values[mine].mean(0) if mine.any() else np.zeros(4)
        np.testing.assert_allclose(found[c], wanted, atol=1e-6)
        assert mine.any() == (c not in (3, 5))


def stats_at(value, spread=1.0):
    """Samples of two channels with these means and deviations."""
    mean = jnp.stack([f32(value), -f32(value)], 1)
    return {"a": Stats(mean, jnp.full(mean.shape, spread**2), 9)}


def clusters(known=(True, True, True)):
    zeros = jnp.zeros((3, 2))
    return Clusters({"a": Centre(zeros, zeros)}, jnp.array(known))


def test_centres_approach_constant_statistics_geometrically():
    """What is left shrinks by 0.8 at every step; a class without samples stays."""
    state, every = clusters(), jnp.ones(3, bool)
    update = jax.jit(
        lambda s: followed(s, stats_at([1.0, 3.0, 5.0], 4.0), label(0, 0, 2), every, 0.2)
    )
    for step in range(1, 8):
        state = update(state)
        left = 1 - 0.8**step
        wanted = np.array([[2, -2], [0, 0], [5, -5]]) * left
        np.testing.assert_allclose(state.centres["a"].mean, wanted, rtol=1e-5)
        np.testing.assert_allclose(state.centres["a"].spread[::2], 4 * left, rtol=1e-5)
        np.testing.assert_array_equal(state.centres["a"].spread[1], 0)


def test_the_first_measurement_replaces_the_start():
    state = followed(
        clusters((False, False, True)), stats_at([7.0, 1.0]), label(0, 2), jnp.ones(2, bool), 0.2
    )
    np.testing.assert_allclose(state.centres["a"].mean[:, 0], [7, 0, 0.2], rtol=1e-6)
    assert state.known.tolist() == [True, False, True]


def test_samples_out_of_the_mask_move_no_centre():
    mask = jnp.array([True, False, False])
    state = followed(clusters((False,) * 3), stats_at([1.0, 99.0, 50.0]), label(0, 0, 1), mask, 0.2)
    np.testing.assert_allclose(state.centres["a"].mean, [[1, -1], [0, 0], [0, 0]])
    assert state.known.tolist() == [True, False, False]


def test_clusters_start_at_the_recorded_moments_of_deep_layers(scenes):
    """In execution order, which is not that of the alphabet."""
    rng = np.random.default_rng(4)
    names = ["bn9", "bn10", "bn11", "bn1", "bn2", "bn3"]
    targets = {n: scenes.target(rng.normal(size=2), rng.uniform(0.5, 2, 2)) for n in names}
    state = recorded_clusters(targets, 3)
    assert set(state.centres) == {"bn10", "bn11", "bn1", "bn2", "bn3"}
    assert state.known.tolist() == [False] * 3
    for name, centre in state.centres.items():
        np.testing.assert_array_equal(centre.mean, np.tile(targets[name].mean, (3, 1)))
        deviation = np.sqrt(np.tile(targets[name].var, (3, 1)))
        np.testing.assert_allclose(centre.spread, deviation, rtol=1e-5)


@pytest.fixture(scope="module")
def photos(tiny_net, nets):
    """Seven images, their labels and what they are in every layer."""
    images = nets.images(tiny_net, 7)
    seen = nets.forward(tiny_net, images)
    return images, label(3, 0, 3, 1, 3, 4, 4), seen


@pytest.fixture(scope="module")
def measured(tiny_net, photos):
    """Centres of their classes, and of one class more."""
    images, labels, _ = photos
    return class_centres(tiny_net, images, labels, 6, batch=4)


def test_centres_of_classes_are_those_of_their_images(tiny_net, photos, measured):
    _, labels, seen = photos
    found = measured
    assert found.seen.tolist() == [True, True, False, True, True, False]
    assert set(found.centres) == {"bn1", "bn2", "bn3", "bn4"}
    readers = {n.name: n.inputs[0] for n in tiny_net.graph.nodes}
    for name, centre in found.centres.items():
        for c in range(6):
            x = seen[readers[name]][np.asarray(labels) == c]
            flat = x.reshape(-1, x.shape[-1])
            wanted = (flat.mean(0), flat.var(0)) if len(flat) else (0, 0)
            np.testing.assert_allclose(centre.mean[c], wanted[0], atol=1e-4)
            np.testing.assert_allclose(centre.spread[c], wanted[1], atol=1e-4)


def test_the_centre_of_one_image_does_not_depend_on_the_others(tiny_net, photos, measured):
    images, labels, _ = photos
    alone = class_centres(tiny_net, images[1:2], labels[1:2], 6)
    for name, centre in alone.centres.items():
        for one, among in zip(centre, measured.centres[name], strict=True):
            np.testing.assert_allclose(one[0], among[0], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(np.delete(np.asarray(one), 0, axis=0), 0)


def test_classes_count_as_right_by_the_majority_of_their_images(tiny_net, photos):
    images, _, seen = photos
    said = seen["fc"].argmax(1)
    other = (said + 1) % 5
    given = np.array([said[0], said[1], *other[2:]])
    found = class_centres(tiny_net, images, label(*given), 5, batch=4)
    for c in range(5):
        mine = given == c
        wanted = mine.any() and (said[mine] == c).mean() > 0.5
        assert bool(found.right[c]) is bool(wanted)
        assert bool(found.seen[c]) is bool(mine.any())
    assert found.right.any()
    assert (found.seen & ~found.right).any()
    mistaken = int(np.flatnonzero(said != said[0])[0])
    pairs = images[np.array([0, mistaken, 0, mistaken])]
    tied = class_centres(tiny_net, pairs, jnp.full(4, said[0], jnp.int32), 5, batch=4)
    assert tied.seen[said[0]]
    assert not tied.right[said[0]]


def test_two_classes_with_planted_features_have_centres_of_their_own(nets):
    """A bright and a dark class: centres differ from each other and from what was recorded."""
    model = nets.stem()
    images = nets.images(model, 4) * 0.1 + jnp.array([2.0, 2.0, -2.0, -2.0])[:, None, None, None]
    found = class_centres(model, images, label(0, 0, 1, 1), 2)
    targets, _ = batch_norm_targets(model)
    for name, centre in found.centres.items():
        std = np.sqrt(targets[name].var)
        assert np.abs((centre.mean[0] - centre.mean[1]) / std).max() > 0.5
        for c in range(2):
            assert np.abs((centre.mean[c] - targets[name].mean) / std).max() > 0.25


def test_centres_are_those_of_the_deep_layers_in_execution_order(nets):
    b = nets.Builder(InputContract(4, 4))
    x = "images"
    for name in "fedcba":
        x = b.bn(name, b.conv(f"{name}.conv", x, 3, kernel=1))
    model = b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), x), 2))
    found = class_centres(model, nets.images(model, 2), label(0, 1), 2)
    assert set(found.centres) == set("edcba")


def test_centres_need_images_labels_and_batch_norms(tiny_net, photos):
    images, labels, _ = photos
    for wrong in [labels - 1, labels + 1]:
        with pytest.raises(ValueError, match=r"class_centres\(\) needs images with labels in 0..4"):
            class_centres(tiny_net, images, wrong, 5)
    with pytest.raises(ValueError, match="needs images"):
        class_centres(tiny_net, images[:0], labels[:0], 5)
    with pytest.raises(UnsupportedModelError, match="0 batch norms"):
        class_centres(fold_batch_norm(tiny_net), images, labels, 5)
