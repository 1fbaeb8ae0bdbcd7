import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.normalisation import IMAGENET_MEAN, IMAGENET_STD
from dfq_jax.synthesis.sources.pixels import (
    clip_to_pixels,
    from_natural,
    from_pixels,
    gaussian,
    imagenet_moments,
    natural_moments,
    nearly_black,
    pink,
    to_natural,
    to_pixels,
    uniform,
)
from dfq_jax.types import InputContract

KEY = jax.random.key(0)
OTHER = InputContract(2, 3, (0.5, 0.4, 0.3), (0.5, 0.25, 1.0))


def test_imagenet_networks_take_natural_units():
    x = jax.random.normal(KEY, (2, 4, 5, 3))
    contract = InputContract(4, 5)
    np.testing.assert_allclose(to_natural(x, contract), x, rtol=1e-6)
    np.testing.assert_allclose(from_natural(x, contract), x, rtol=1e-6)


def test_units_go_through_pixels():
    x = jax.random.normal(KEY, (2, 2, 3, 3))
    pixels = np.asarray(x) * OTHER.std + OTHER.mean
    wanted = (pixels - IMAGENET_MEAN) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(to_natural(x, OTHER), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("contract", [OTHER, InputContract(2, 3, (0.13,), (0.3,))], ids=str)
def test_units_invert(contract):
    x = jax.random.normal(KEY, (2, 2, 3, contract.channels))
    there = to_natural(x, contract)
    assert not np.allclose(there, x, atol=0.1)
    np.testing.assert_allclose(from_natural(there, contract), x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        to_natural(from_natural(x, contract), contract), x, rtol=1e-5, atol=1e-5
    )


def test_natural_moments():
    """ImageNet's where a contract says nothing; its own change units, not what a network reads."""
    assert imagenet_moments(3)[0] == pytest.approx(IMAGENET_MEAN)
    assert imagenet_moments(3)[1] == pytest.approx(IMAGENET_STD)
    grey, spread = imagenet_moments(1)
    assert grey == pytest.approx(np.mean(IMAGENET_MEAN), abs=1e-3)
    assert spread == pytest.approx(np.mean(IMAGENET_STD), abs=1e-3)
    plain = InputContract(4, 4, mean=(0.5,) * 3, std=(0.25,) * 3)
    dark = dataclasses.replace(plain, natural=((0.1, 0.2, 0.3), (0.05, 0.1, 0.1)))
    np.testing.assert_array_equal(natural_moments(plain)[0], imagenet_moments(3)[0])
    pixels = np.random.default_rng(0).random((2, 4, 4, 3)).astype(np.float32)
    read = jnp.asarray((pixels - 0.5) / 0.25)
    wanted = (pixels - np.array([0.1, 0.2, 0.3])) / np.array([0.05, 0.1, 0.1])
    np.testing.assert_allclose(to_natural(read, dark), wanted, atol=1e-4)
    np.testing.assert_allclose(from_natural(to_natural(read, dark), dark), read, atol=1e-5)
    assert plain.value_range == dark.value_range
    with pytest.raises(ValueError, match="natural needs one mean and one std for each of 3"):
        dataclasses.replace(plain, natural=((0.1,), (0.1,)))
    with pytest.raises(ValueError, match=r"natural: mean 0\.1.* positive std"):
        dataclasses.replace(plain, natural=((0.1,) * 3, (0.0,) * 3))


def test_camera_pixels_round_and_clip():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 3, 3)).astype(np.uint8)
    x = from_pixels(pixels, OTHER)
    np.testing.assert_allclose(x, (pixels / 255 - OTHER.mean) / np.array(OTHER.std), atol=1e-6)
    np.testing.assert_array_equal(to_pixels(x, OTHER), pixels)
    assert x.dtype == np.float32
    wild = jnp.full((1, 2, 3, 3), 9.0).at[0, 0].set(-9.0)
    assert np.unique(to_pixels(wild, OTHER)).tolist() == [0, 255]
    between = from_pixels(pixels, OTHER) + 0.4 / 255 / np.array(OTHER.std, np.float32)
    np.testing.assert_array_equal(to_pixels(between, OTHER), pixels)


def test_clipping_to_pixels_passes_gradients_on():
    contract = InputContract(1, 2)
    x = jnp.array([[[[-9.0, 0.0, 9.0], [0.5, -9.0, 0.5]]]])
    clipped = clip_to_pixels(x, contract)
    pixels = np.asarray(clipped) * IMAGENET_STD + IMAGENET_MEAN
    wanted = [[0, 0.456, 1], [0.485 + 0.1145, 0, 0.406 + 0.1125]]
    np.testing.assert_allclose(pixels[0, 0], wanted, atol=1e-6)
    slope = jax.grad(lambda x: jnp.sum(clip_to_pixels(x, contract) * 3))(x)
    assert np.unique(slope).tolist() == [3]


def test_pink_noise_has_the_spectrum_of_natural_images():
    x = np.asarray(jax.jit(pink, static_argnums=1)(KEY, (16, 32, 32, 3)))
    np.testing.assert_allclose(x.mean((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std((1, 2)), 1, atol=1e-4)
    power = (np.abs(np.fft.fft2(x, axes=(1, 2))) ** 2).mean((0, 3))
    along = np.arange(1, 12)
    slope = np.polyfit(np.log(along), np.log(power[0, along] + power[along, 0]), 1)[0]
    assert slope == pytest.approx(-2, abs=0.4)
    channels = np.corrcoef(x.reshape(-1, 3).T)
    assert 0.9 < channels[0, 1] < 0.99


def test_nearly_black():
    x = nearly_black(KEY, (8, 32, 32, 3))
    assert 0.0130 <= float(x.std()) <= 0.0142
    levels = np.unique(np.round(np.asarray(x, np.float64) * 5418.75 + 127.5, 3))
    np.testing.assert_array_equal(levels, np.arange(255))
    assert x.dtype == np.float32


@pytest.mark.parametrize(
    ("init", "mean", "std", "ends"),
    [(gaussian, 0, 1, (-9, 9)), (uniform, 0.5, 12**-0.5, (0, 1))],
)
def test_noise(init, mean, std, ends):
    x = init(KEY, (8, 32, 32, 3))
    assert float(x.mean()) == pytest.approx(mean, abs=0.02)
    assert float(x.std()) == pytest.approx(std, abs=0.02)
    assert ends[0] <= float(x.min())
    assert float(x.max()) < ends[1]
    np.testing.assert_array_equal(x, init(KEY, (8, 32, 32, 3)))
    assert not jnp.array_equal(x, init(jax.random.key(1), (8, 32, 32, 3)))


def test_pink_noise_is_that_of_its_formula_op_by_op():
    """Bit by bit: programs of several operators must not fuse what would round otherwise."""
    key, (b, h, w, c) = jax.random.key(5), (2, 29, 36, 3)
    frequency = jnp.hypot(jnp.fft.fftfreq(h)[:, None], jnp.fft.rfftfreq(w)[None])
    falloff = (1 / jnp.maximum(frequency, 1 / max(h, w))).astype(jnp.complex64)
    drawn = jax.random.normal(key, (b, c + 1, h, w))
    noise = jnp.fft.irfft2(jnp.fft.rfft2(drawn) * falloff, (h, w))
    mixed = jnp.moveaxis(noise[:, :c] * 0.2 + noise[:, c:], 1, 3)
    centred = mixed - jnp.mean(mixed, (1, 2), keepdims=True)
    wanted = centred / (jnp.std(centred, (1, 2), keepdims=True) + 1e-6)
    np.testing.assert_array_equal(pink(key, (b, h, w, c)), wanted)
