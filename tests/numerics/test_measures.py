"""Measures of tasks, against formulas written out."""

import math

import numpy as np

from dfq_jax.numerics.measures import cosines, log_softmax, next_token_divergences, psnr

RNG = np.random.default_rng(0)


def test_psnr_of_one_grey_level():
    a = RNG.integers(1, 254, (2, 6, 7, 3)) / 255
    found = psnr(a, a + 1 / 255)
    np.testing.assert_allclose(found, 20 * math.log10(255))
    assert psnr(a, a).tolist() == [math.inf] * 2
    wide = psnr(4 * a - 2, 4 * (a + 1 / 255) - 2, low=-2.0, high=2.0)
    np.testing.assert_allclose(wide, found)


def test_luma_weighs_the_colours():
    a, red = np.full((1, 4, 4, 3), 0.5), np.zeros((1, 4, 4, 3))
    red[..., 0] = 0.1
    np.testing.assert_allclose(psnr(a, a + red, luma=True), 20 * math.log10(255 / 6.5481))


def test_borders_and_fractions_do_not_count():
    a = np.full((1, 6, 6, 1), 100.0) / 255
    b = a.copy()
    b[:, :2] = b[:, -2:] = b[:, :, :2] = b[:, :, -2:] = 1
    b[:, 2, 2] += 0.4 / 255
    assert psnr(a, b, border=2, rounded=True).tolist() == [math.inf]
    assert np.isfinite(psnr(a, b, border=1, rounded=True)).all()
    assert np.isfinite(psnr(a, b, border=2)).all()
    assert psnr(a * 0 + 1, a * 0 + 1.5, rounded=True).tolist() == [math.inf]


def test_cosines():
    a, b = RNG.normal(size=(2, 3, 5, 8))
    wanted = np.einsum("nij,nij->ni", a, b)
    wanted = wanted / np.sqrt(np.einsum("nij,nij->ni", a, a) * np.einsum("nij,nij->ni", b, b))
    np.testing.assert_allclose(cosines(a, b), wanted)
    np.testing.assert_allclose(cosines(a, 3 * a), 1)
    nothing = np.zeros((1, 4))
    assert cosines(nothing, nothing).tolist() == [1.0]
    assert cosines(nothing, nothing + 1).tolist() == [0.0]


def test_divergences_of_next_tokens():
    a, b = RNG.normal(size=(2, 4, 6))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    np.testing.assert_allclose(next_token_divergences(a, b), np.sum(p * np.log(p / q), -1))
    assert np.isfinite(log_softmax(np.array([1e4, -1e4]))).all()
