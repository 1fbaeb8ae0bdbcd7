import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.query import weighted_nodes
from dfq_jax.graph.rewrite import with_params
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Rule, Scheme, Site, resolve
from dfq_jax.quantization.side_by_side import correct_biases, mean_gap, mean_shifts
from dfq_jax.quantization.simulate import simulation_hook


@pytest.fixture(scope="module")
def quantized(tiny_net, nets):
    """Three bits, so that means shift a lot; one layer kept in float, one without a bias."""
    model = fold_batch_norm(tiny_net)
    plan = resolve(model.graph, Scheme(3, 3), rules=[Rule("project", keep_float=True)])
    params = {k: dict(v) for k, v in model.params.items()}
    del params["depthwise"]["bias"]
    model = dataclasses.replace(model, params=params)
    return calibrate(model, plan, nets.images(model, 8))


def outputs(model, x, hook=None):
    """{layer: its output} of one forward pass."""
    return evaluate(model, x, taps=[n.name for n in weighted_nodes(model.graph)], hook=hook)[1]


@jax.jit
def shifts(reference, quantized, x):
    """{layer: mean output error per channel}."""
    hook = simulation_hook(quantized.plan, quantized.qparams)
    exact, rough = outputs(reference, x), outputs(quantized.model, x, hook)
    return {k: (rough[k] - v).mean(tuple(range(v.ndim - 1))) for k, v in exact.items()}


def test_every_layer_keeps_its_mean(quantized, nets):
    x = nets.images(quantized.model, 8)
    before = shifts(quantized.model, quantized, x)
    corrected = correct_biases(quantized, quantized.model, x, significance=0.0)
    after = shifts(quantized.model, corrected, x)
    for name in before:
        if name == "project":
            step = 1e-5  # a float layer has a float bias
        else:
            data, kernel = (quantized.qparams[Site(name, i)] for i in (0, None))
            step = float(data.scale) * float(kernel.scale.max())
        assert np.abs(np.asarray(after[name])).max() <= 0.51 * step + 1e-5, name
    assert max(np.abs(np.asarray(v)).max() for v in before.values()) > 0.05


def test_only_biases_change(quantized, nets):
    corrected = correct_biases(quantized, quantized.model, nets.images(quantized.model, 8))
    assert corrected.plan is quantized.plan
    assert corrected.qparams is quantized.qparams
    for name, slots in quantized.model.params.items():
        assert corrected.model.params[name]["kernel"] is slots["kernel"]
        assert "bias" in corrected.model.params[name]
    assert "bias" not in quantized.model.params["depthwise"]


def test_the_first_shift_by_hand(quantized, nets):
    """Upstream of the first layer there is nothing, so its shift needs no propagation."""
    x = nets.images(quantized.model, 8)
    found = mean_shifts(quantized, quantized.model, x, significance=0.0)
    assert set(found) == {"conv1", "depthwise", "project", "conv2", "fc"}
    wanted = shifts(quantized.model, quantized, x)["conv1"]
    np.testing.assert_allclose(found["conv1"], wanted, atol=1e-6)


def test_finer_grids_shift_less(quantized, nets):
    x = nets.images(quantized.model, 8)
    fine = calibrate(quantized.model, resolve(quantized.model.graph, Scheme(8, 8)), x)
    small, large = (mean_shifts(q, q.model, x, significance=0.0) for q in (fine, quantized))
    worst = lambda shifts: max(np.abs(np.asarray(v)).max() for v in shifts.values())
    assert worst(small) < worst(large) / 5


def test_the_reference_says_what_is_right(quantized, nets):
    """Biases that were corrected before are judged by the float network, not by themselves."""
    x = nets.images(quantized.model, 8)
    bias = quantized.model.params["fc"]["bias"]
    off = with_params(quantized.model, {"fc": {"bias": bias + 3.0}})
    moved = type(quantized)(off, quantized.plan, quantized.qparams)
    fixed = [
        correct_biases(q, quantized.model, x, significance=0.0).model.params["fc"]["bias"]
        for q in (moved, quantized)
    ]
    np.testing.assert_allclose(fixed[0], fixed[1], atol=0.1)


@pytest.mark.parametrize("shape", [(6, 3, 2, 4), (6, 4)])
def test_shrinkage_by_the_standard_error(shape):
    rng = np.random.default_rng(0)
    gap = rng.normal(size=shape) + np.array([0.0, 0.1, 1.0, 10.0])
    by_image = gap.reshape(6, -1, 4).mean(1)
    mean, error = by_image.mean(0), by_image.std(0, ddof=1) / 6**0.5
    gap = jnp.asarray(gap, jnp.float32)
    np.testing.assert_allclose(mean_gap(gap, 0.0), mean, rtol=1e-4)
    for significance in (1.0, 3.0):
        factor = np.maximum(1 - (significance * error / mean) ** 2, 0)
        shrunk = mean_gap(gap, significance)
        np.testing.assert_allclose(shrunk, mean * factor, rtol=1e-3, atol=1e-6)
    assert factor[0] == 0 < 0.9 < factor[3]


def test_nothing_to_estimate_an_error_from():
    assert mean_gap(jnp.ones((1, 2, 2, 3)), 3.0).tolist() == [1, 1, 1]
    assert mean_gap(jnp.zeros((4, 3)), 3.0).tolist() == [0, 0, 0]
