"""Collages against discs painted one by one in NumPy, and what they have of photographs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.synthesis.sources.collages import collage, drawn, scenes
from dfq_jax.synthesis.sources.pixels import imagenet_moments, pink

KEY = jax.random.key(3)


@pytest.mark.parametrize("shape", [(3, 9, 12, 3), (2, 8, 8, 1)])
def test_by_hand(shape):
    count, height, width, channels = shape
    images = np.asarray(jax.random.normal(jax.random.key(0), shape))
    found = collage(discs=5)(KEY, jnp.asarray(images))
    other_key, *keys = jax.random.split(KEY, 8)
    order = np.asarray(jax.random.permutation(other_key, count))
    falling = [np.asarray(v) for v in drawn(keys, (5, count), height, width, channels)]
    wanted = images.copy()
    for centre, radius, colour, strength, own in zip(*falling, strict=True):
        for n, i, j in np.ndindex(count, height, width):
            source = images[n] if own[n] else images[order[n]]
            texture = source[i, j] - source.mean((0, 1))
            surface = colour[n] + strength[n] * texture
            distance = np.hypot(i + 0.5 - centre[0, n], j + 0.5 - centre[1, n])
            share = np.clip(radius[n] - distance + 0.5, 0, 1)
            wanted[n, i, j] = (1 - share) * wanted[n, i, j] + share * surface
    mean, std = imagenet_moments(channels)
    wanted = np.clip(wanted, -mean / std, (1 - mean) / std)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_surfaces_are_smoother_and_edges_stay():
    """Steps between neighbours: more of them near zero, and some as large as before."""
    images = jax.random.normal(jax.random.key(1), (8, 64, 64, 3)) * 0.5
    found = collage()(KEY, images)
    steps = lambda x: np.abs(np.diff(np.asarray(x), axis=2))
    before, after = steps(images), steps(found)
    assert np.median(after) < 0.5 * np.median(before)
    assert np.quantile(after, 0.999) > 0.9 * np.quantile(before, 0.999)
    kurtosis = lambda x: np.mean(x**4) / np.mean(x**2) ** 2
    assert kurtosis(after) > 2 * kurtosis(before)


def test_images_differ_and_a_key_repeats():
    images = jnp.zeros((2, 32, 32, 3))
    first, again = collage()(KEY, images), collage()(KEY, images)
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first[0] - first[1]).max()) > 0.5


def test_scenes_are_noise_and_collages_of_it_in_turn():
    shape = (5, 24, 16, 3)
    found = np.asarray(scenes(KEY, shape))
    smooth, falling = jax.random.split(KEY)
    noise = pink(smooth, shape)
    np.testing.assert_allclose(found[::2], noise[::2], atol=1e-5)
    covered = collage()(falling, noise)
    np.testing.assert_allclose(found[1::2], covered[1::2], atol=1e-5)
