"""Noise against images and against variables."""

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.training.wrappers import Heard, perturbed_images, sharpness_aware, wrapped

X, IMAGES = jnp.array([1.0, -2.0]), jnp.array([[0.5, 0.25]])


def loss(x, images):
    value = jnp.sum((images * x) ** 2) + jnp.sum(x**3)
    return value, Heard({"own": value}, {})


def test_perturbed_images_raise_the_loss():
    total, heard = wrapped((perturbed_images(reach=0.01),), loss)(X, IMAGES)
    moved = IMAGES + 0.01 * jnp.sign(IMAGES)
    np.testing.assert_allclose(heard.parts["perturbed"], loss(X, moved)[0], rtol=1e-6)
    np.testing.assert_allclose(total, loss(X, IMAGES)[0] + loss(X, moved)[0], rtol=1e-6)
    assert heard.parts["perturbed"] > heard.parts["own"]


def test_perturbed_images_have_the_slope_of_both_losses_by_variables():
    moved = IMAGES + 0.01 * jnp.sign(IMAGES)
    both = lambda x: loss(x, IMAGES)[0] + loss(x, moved)[0]
    found = jax.grad(lambda x: wrapped((perturbed_images(reach=0.01),), loss)(x, IMAGES)[0])(X)
    np.testing.assert_allclose(found, jax.grad(both)(X), rtol=1e-6)


def test_perturbed_images_ask_for_the_loss_twice():
    asked = []

    def heard_loss(x, images):
        asked.append(images)
        return loss(x, images)

    jax.grad(lambda x: wrapped((perturbed_images(reach=0.01),), heard_loss)(x, IMAGES)[0])(X)
    assert len(asked) == 2


def test_the_slope_of_sharpness_aware_steps_is_that_of_the_sharpest_point():
    sharp = wrapped((sharpness_aware(reach=0.1),), loss)
    plain = lambda x: loss(x, IMAGES)[0]
    slope = jax.grad(plain)(X)
    wanted = jax.grad(plain)(X + 0.1 * slope / jnp.linalg.norm(slope))
    found = jax.grad(lambda x: sharp(x, IMAGES)[0])(X)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_wrappers_compose():
    inner = wrapped((perturbed_images(reach=0.01),), loss)
    both = wrapped((perturbed_images(reach=0.01), sharpness_aware(reach=0.1)), loss)
    assert float(both(X, IMAGES)[0]) > float(inner(X, IMAGES)[0])
