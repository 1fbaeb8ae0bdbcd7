"""Biases corrected by what layers read of images, against a float network run in NumPy."""

import dataclasses

import numpy as np
import pytest

from dfq_jax.graph.rewrite import with_params
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.kernel_shifts import correct_kernel_shifts
from dfq_jax.quantization.plan import Rule, Scheme, Site, resolve
from dfq_jax.recipes.dfq_biases import rounded_kernels


@pytest.fixture(scope="module")
def quantized(tiny_net, nets):
    """Three bits, so that means shift a lot; one layer kept in float, one without a bias."""
    model = fold_batch_norm(tiny_net)
    plan = resolve(model.graph, Scheme(3, 8), rules=[Rule("project", keep_float=True)])
    params = {k: dict(v) for k, v in model.params.items()}
    del params["depthwise"]["bias"]
    model = dataclasses.replace(model, params=params, moments={})
    return calibrate(model, plan, nets.images(model, 8))


def by_image(nets, quantized, x):
    """{layer: mean shift of each image}, one rounded kernel at a time in an exact network."""
    model, kernels = quantized.model, rounded_kernels(quantized)
    exact, found = nets.forward(model, x), {}
    for name, kernel in kernels.items():
        rounded = with_params(model, {name: {"kernel": kernel}})
        gap = nets.forward(rounded, x)[name] - exact[name]
        found[name] = gap.mean(tuple(range(1, gap.ndim - 1)))
    return found


@pytest.mark.parametrize("significance", [0.0, 6.0])
def test_each_layer_loses_the_shift_of_its_own_kernel(significance, quantized, nets):
    x = nets.images(quantized.model, 11)
    corrected = correct_kernel_shifts(quantized, x, significance=significance)
    shrunk = 0
    for name, gap in by_image(nets, quantized, x).items():
        mean, error = gap.mean(0), gap.std(0, ddof=1) / 11**0.5
        factor = np.maximum(1 - (significance * error / mean) ** 2, 0)
        shrunk += int((factor < 1).sum())
        slots = quantized.model.params[name]
        change = np.asarray(corrected.model.params[name]["bias"]) - slots.get("bias", 0.0)
        np.testing.assert_allclose(change, -mean * factor, rtol=1e-3, atol=1e-5, err_msg=name)
    assert (shrunk > 0) == (significance > 0)


def test_only_biases_of_rounded_kernels_change(quantized, nets):
    corrected = correct_kernel_shifts(quantized, nets.images(quantized.model, 4))
    assert corrected.plan is quantized.plan
    assert corrected.qparams is quantized.qparams
    assert Site("project") not in quantized.plan.table
    assert corrected.model.params["project"] == quantized.model.params["project"]
    for name, slots in quantized.model.params.items():
        assert corrected.model.params[name]["kernel"] is slots["kernel"]
    assert "bias" not in quantized.model.params["depthwise"]
