import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.synthesis.sources.noise import dead_leaves, disc_radii, noise
from dfq_jax.synthesis.sources.pixels import imagenet_moments, pink

KEY = jax.random.key(5)


def test_leaves_by_hand():
    """The same discs, painted one by one in NumPy."""
    b, h, w, c = shape = (2, 7, 9, 3)
    ours = np.asarray(dead_leaves(KEY, shape, discs=12))
    ground, place, size, colour = jax.random.split(KEY, 4)
    centres = np.asarray(jax.random.uniform(place, (12, 2, b))) * [[h], [w]]
    radii = np.asarray(disc_radii(size, (12, b), 9))
    colours = np.asarray(jax.random.uniform(colour, (12, b, c)))
    wanted = np.broadcast_to(jax.random.uniform(ground, (b, 1, 1, c)), shape).copy()
    for disc in range(12):
        for n, i, j in np.ndindex(b, h, w):
            y, x = centres[disc, :, n]
            if (i + 0.5 - y) ** 2 + (j + 0.5 - x) ** 2 < radii[disc, n] ** 2:
                wanted[n, i, j] = colours[disc, n]
    mean, std = imagenet_moments(c)
    np.testing.assert_allclose(ours * std + mean, wanted, atol=1e-5)


def test_radii_follow_the_inverse_cube():
    radii = np.asarray(disc_radii(KEY, (200_000,), 256))
    assert radii.min() == pytest.approx(4, rel=1e-3)
    assert radii.max() <= 128 + 1e-3
    for r in (5.0, 8.0, 20.0, 60.0):  # P(R > r) for a density 1 / r^3 on [4, 128]
        wanted = (r**-2 - 128.0**-2) / (4.0**-2 - 128.0**-2)
        assert np.mean(radii > r) == pytest.approx(wanted, abs=4e-3)
    assert float(disc_radii(KEY, (10,), 1).max()) == 1  # an image of one pixel


def test_leaves_are_pixels_with_edges():
    image = np.asarray(dead_leaves(KEY, (4, 48, 32, 1)))
    mean, std = imagenet_moments(1)
    pixels = image * std + mean
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5
    steps = np.abs(np.diff(pixels, axis=2))
    assert np.mean(steps < 1e-6) > 0.5  # flat inside of leaves
    assert steps.max() > 0.5
    smooth = np.asarray(pink(KEY, (4, 48, 32, 1)))
    assert np.mean(np.abs(np.diff(smooth, axis=2)) < 1e-6) < 0.01


@pytest.mark.parametrize("count", [1, 2, 5])
def test_half_of_each(count):
    shape = (count, 12, 10, 3)
    images = noise(KEY, shape)
    assert images.shape == shape
    smooth, sharp = jax.random.split(KEY)
    half = (-(-count // 2), 12, 10, 3)
    np.testing.assert_allclose(images[::2], pink(smooth, half), atol=1e-5)
    leaves = dead_leaves(sharp, half)[: count // 2]
    np.testing.assert_allclose(images[1::2], leaves, atol=1e-5)
    np.testing.assert_array_equal(images, noise(KEY, shape))
    assert not jnp.array_equal(images, noise(jax.random.key(6), shape))
