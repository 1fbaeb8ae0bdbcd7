"""DAQ against NumPy: steps of each image's and channel's deviation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph
from dfq_jax.graph.ops import Relu
from dfq_jax.numerics.channel_steps import (
    GAUSSIAN_STEPS,
    UNTOUCHED,
    channelwise,
    deviation_weights,
    mid_rise,
    rounded_deviations,
    step_multiplier,
)
from dfq_jax.recipes.daq import body_of, daq
from dfq_jax.types import InputContract

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, 6, 4)) * np.array([0.1, 1.0, 3.0, 0.5]) + np.array([0.0, 1, -2, 3])


def rise(u, step, bits):
    top = (2**bits / 2 - 0.5) * step
    return np.clip((np.round(u / step + 0.5) - 0.5) * step, -top, top)


def coarse(sigma, bits):
    mean, spread = sigma.mean(-1, keepdims=True), sigma.std(-1, keepdims=True, ddof=1)
    return rise(sigma - mean, GAUSSIAN_STEPS[bits] * spread, bits) + mean


@pytest.mark.parametrize(("bits", "sigma_bits"), [(2, 32), (4, 4), (8, 8)])
def test_values_of_both_signs(bits, sigma_bits):
    mean, sigma = X.mean((1, 2), keepdims=True), X.std((1, 2), keepdims=True, ddof=1)
    sigma = sigma if sigma_bits == 32 else coarse(sigma, sigma_bits)
    wanted = rise(X - mean, GAUSSIAN_STEPS[bits] * sigma, bits) + mean
    x = jnp.asarray(X, jnp.float32)
    found = channelwise(x, bits, behind_relu=False, sigma_bits=sigma_bits)
    step = GAUSSIAN_STEPS[bits] * sigma
    assert np.mean(np.abs(found - wanted) > 1e-3 * step) < 0.01  # ties may fall to either side


@pytest.mark.parametrize("bounded", [True, False])
def test_values_behind_a_relu(bounded):
    x = np.maximum(X, 0)
    count = (x > 0).sum((1, 2), keepdims=True) + 1
    mean = x.sum((1, 2), keepdims=True) / count
    sigma = np.sqrt((x**2).sum((1, 2), keepdims=True) / count - mean**2)
    step = GAUSSIAN_STEPS[3] * sigma
    top = 3.5 * step
    wanted = (np.round((x - top) / step + 0.5) - 0.5) * step + top
    wanted = np.minimum(wanted, 7 * step) if bounded else wanted
    how = {"behind_relu": True, "sigma_bits": 32, "bounded": bounded}
    found = np.asarray(channelwise(jnp.asarray(x, jnp.float32), 3, **how))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert (found[x == 0] == 0).all()
    scaled = channelwise(jnp.asarray(10 * x, jnp.float32), 3, **how)
    np.testing.assert_allclose(scaled, 10 * found, rtol=1e-5)


def test_channels_without_deviation_are_their_mean():
    flat = jnp.full((1, 3, 3, 2), 2.0)
    np.testing.assert_array_equal(channelwise(flat, 4, behind_relu=False), flat)
    np.testing.assert_array_equal(channelwise(0 * flat, 4, behind_relu=True), 0 * flat)


def test_steps_are_the_best_of_gaussian_values():
    """Squared errors as by numerical integration; those of released steps are larger."""
    draws = jax.random.normal(jax.random.key(0), (400_000,))
    error = lambda step, bits: float(
        jnp.mean((mid_rise(draws, jnp.float32(step), bits) - draws) ** 2)
    )
    for bits, best, released in ((2, 0.119, 0.213), (3, 0.0376, 0.083), (4, 0.0116, 0.0286)):
        assert error(step_multiplier(bits), bits) == pytest.approx(best, rel=0.02)
        assert error(step_multiplier(bits, "released"), bits) == pytest.approx(released, rel=0.02)
    with pytest.raises(UsageError, match="bits"):
        step_multiplier(9)
    with pytest.raises(UsageError, match="bits"):  # before any network runs
        daq(Graph((), (), ()), weight_bits=UNTOUCHED)
    with pytest.raises(UsageError, match="bits"):
        step_multiplier(1, "released")


def test_weights_and_deviations():
    kernel = RNG.normal(size=(3, 3, 4, 5))
    wanted = rise(kernel, GAUSSIAN_STEPS[3] * kernel.std(ddof=1), 3)
    found = deviation_weights(jnp.asarray(kernel, jnp.float32), 3)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert len(np.unique(np.round(found, 4))) == 8
    sigma = RNG.uniform(0.5, 2, (2, 1, 1, 16))
    np.testing.assert_allclose(
        rounded_deviations(jnp.asarray(sigma, jnp.float32), 2), coarse(sigma, 2), rtol=1e-4
    )


def test_the_body_of_a_network_is_quantized_and_its_ends_are_not(nets):
    b = nets.Builder(InputContract(8, 8))
    x = b.op("relu", Relu(), b.conv("head", "images", 4))
    model = b.done(b.conv("tail", b.conv("second", b.conv("first", x, 4), 4), 3))
    assert body_of(model.graph) == {"first", "second"}
    images = nets.images(model, 2)
    run = jax.jit(
        lambda x, bits: evaluate(model, x, hook=daq(model.graph, bits=bits)), static_argnums=1
    )
    found = run(images, 8)[0][0]
    tensors = nets.forward(model, images)
    read = jnp.asarray(tensors["relu"], jnp.float32)
    read = {"relu": channelwise(read, 8, behind_relu=True)}
    for name, below in (("first", "relu"), ("second", "first")):
        kernel = deviation_weights(model.params[name]["kernel"], 4)
        x = read[below] if below == "relu" else channelwise(read[below], 8, behind_relu=False)
        read[name] = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    last = jax.lax.conv_general_dilated(
        read["second"],
        model.params["tail"]["kernel"],
        *((1, 1), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    scale = float(np.abs(last).max())
    assert np.abs(found - last).max() < 0.05 * scale  # roundings at a tie differ, no more
    assert np.mean(np.abs(found - last)) < 1e-3 * scale
    exact = tensors["tail"]
    assert np.abs(found - exact).mean() < np.abs(run(images, 2)[0][0] - exact).mean()
