import dataclasses

import numpy as np
import pytest
from scipy.stats import norm

from dfq_jax.graph.ops import LeakyRelu, Relu
from dfq_jax.graph.rewrite import with_params
from dfq_jax.passes.absorb import absorb_high_biases
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.moments import expected_moments
from dfq_jax.types import InputContract


def raised(model, layer, channels, by):
    """The folded network with some channels of a layer, and their moments, raised."""
    bias, (mean, var) = model.params[layer]["bias"], model.moments[layer]
    up = np.zeros(bias.shape, np.float32)
    up[list(channels)] = by
    model = with_params(model, {layer: {"bias": bias + up}})
    moments = {**model.moments, layer: type(model.moments[layer])(mean + up, var)}
    return dataclasses.replace(model, moments=moments)


def network(nets, kernel, act=None, groups=1):
    """Layer `a`, batch norm, an activation, layer `b`, pooling, scores."""
    b = nets.Builder(InputContract(8, 8), seed=1)
    x = b.unit("a", "images", 6, act or Relu())
    x = b.conv("b", x, 6, kernel=kernel, groups=groups, bias=True)
    return raised(fold_batch_norm(b.done(x)), "a", (1, 4), 9.0)


@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, 1), (3, 6), (3, 2)])
def test_what_moves_is_never_negative_so_nothing_changes(kernel, groups, nets):
    model = network(nets, kernel, groups=groups)
    x = nets.images(model, 8)
    assert nets.forward(model, x)["a"][..., [1, 4]].min() > 0  # at least here
    before, after = (nets.forward(m, x) for m in (model, absorb_high_biases(model, sigmas=6.0)))
    c = np.maximum(model.moments["a"].mean - 6 * np.sqrt(model.moments["a"].var), 0)
    assert (c > 0).tolist() == [False, True, False, False, True, False]
    np.testing.assert_allclose(before["a"] - after["a"], c + 0 * before["a"], atol=1e-5)
    inner = slice(None) if kernel == 1 else slice(1, -1)
    found, wanted = (v["b"][:, inner, inner] for v in (after, before))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    if kernel > 1:  # taps in the padding read no constant
        assert np.abs(after["b"] - before["b"]).max() > 0.1


def test_three_deviations_and_the_share_they_miss(nets):
    model = network(nets, 1)
    mean, var = (np.asarray(v, np.float64) for v in model.moments["a"])
    found = absorb_high_biases(model)
    c = np.maximum(mean - 3 * np.sqrt(var), 0)
    np.testing.assert_allclose(found.moments["a"].mean, mean - c, rtol=1e-5)
    np.testing.assert_array_equal(found.moments["a"].var, model.moments["a"].var)
    kernel = np.asarray(model.params["b"]["kernel"], np.float64)[0, 0]
    np.testing.assert_allclose(
        found.params["b"]["bias"], model.params["b"]["bias"] + c @ kernel, rtol=1e-4
    )
    below = norm.cdf((c - mean) / np.sqrt(var))[c > 0]
    np.testing.assert_allclose(below, 1 - 0.9987, atol=1e-4)
    expected = [expected_moments(m)["a.act"].mean for m in (model, found)]
    np.testing.assert_allclose(expected[0] - expected[1], c, atol=1e-2)


def test_only_relus_and_layers_with_moments(nets):
    leaky = network(nets, 1, LeakyRelu(0.1))
    bare = dataclasses.replace(network(nets, 1), moments={})
    capped = network(nets, 1, Relu(6.0))
    for model in (leaky, bare, capped):
        assert absorb_high_biases(model) is model


def test_layers_that_pad_are_left_alone_on_request(nets):
    padded, plain = network(nets, 3), network(nets, 1)
    assert absorb_high_biases(padded, padded=False) is padded
    assert absorb_high_biases(plain, padded=False).params["a"] is not plain.params["a"]
