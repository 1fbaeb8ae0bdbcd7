"""Schemes other than `w8a8` and its like, from the Python API to the saved folder."""

import numpy as np
import pytest

import dfq_jax as dfq
from dfq_jax.errors import PlanError, UsageError
from dfq_jax.io.artifacts.artifact import load_artifact
from dfq_jax.numerics.affine import Grid
from dfq_jax.numerics.signs import Signs
from dfq_jax.quantization.plan import parse_scheme


@pytest.fixture(scope="module")
def images(tiny_net, nets):
    return dfq.Examples((nets.images(tiny_net, 8),), tiny_net.inputs)


@pytest.fixture(scope="module")
def probes(tiny_net, nets):
    return dfq.Examples((nets.images(tiny_net, 16, seed=3),), tiny_net.inputs)


@pytest.mark.parametrize("scheme", ["w4g4", "w8a16"])
def test_a_network_that_computes_in_float_says_so_and_is_verified(
    scheme, tiny_net, images, probes, tmp_path
):
    made = dfq.quantize(tiny_net, images, scheme=scheme, probes=probes)
    assert made.report.coverage == 0
    assert all("computes in float" in layer.reason for layer in made.report.layers)
    made.save(tmp_path / "out")
    again = load_artifact(tmp_path / "out")
    assert again.quantized.plan == made.quantized.plan
    assert again.manifest["scheme"] == scheme
    assert dfq.verify(tmp_path / "out").passed


def test_settings_and_rules_choose_who_shares_a_scale(tiny_net, images, probes):
    told = {"scheme": "w8t", "rules": [{"pattern": "conv2", "bits": "w4g2"}]}
    made = dfq.quantize(tiny_net, images, config=told, probes=probes)
    table = {site.node: spec.levels for site, spec in made.quantized.plan.entries}
    assert table["conv2"] == Grid(4, axis=-1, group=2)
    assert table["conv1"] == table["fc"] == Grid(8, symmetric=True)
    assert made.settings["rules"] == "conv2=w4g2"


def test_weights_alone_lose_less_than_with_activations(tiny_net, images, probes):
    quality = [
        dfq.quantize(tiny_net, images, scheme=scheme, layers="zsq_all_low", probes=probes).report
        for scheme in ("w4", "w4a4")
    ]
    assert quality[0].sqnr > quality[1].sqnr
    assert np.isfinite(quality[0].sqnr)


def test_groups_are_not_learned_by_gradients(tiny_net, images):
    with pytest.raises((PlanError, UsageError), match="which no method learns by gradients"):
        dfq.quantize(tiny_net, images, scheme="w4g4", reconstruction="adaround")


@pytest.mark.onnx
def test_kernels_of_signs(tiny_net, images, probes):
    """Two values a channel but in the ends, in the file as in the simulator; presets learn none."""
    assert str(parse_scheme("w1a8")) == "w1a8"
    result = dfq.quantize(tiny_net, images, scheme="w1a8", preset="balanced", probes=probes)
    assert result.settings["reconstruction"] == "nearest"
    kernel = result.quantized.kernel("conv2")
    assert isinstance(kernel.levels, Signs)
    found, wanted = np.asarray(kernel.dequantize()), tiny_net.params["conv2"]["kernel"]
    for channel in range(found.shape[-1]):
        assert len(np.unique(np.abs(found[..., channel]))) == 1
    assert found.shape == wanted.shape
    assert isinstance(result.quantized.kernel("conv1").levels, Grid)
    assert result.verify().passed
    with pytest.raises(PlanError, match="signs have a scale for each output channel"):
        dfq.quantize(tiny_net, images, scheme="w1g4")
    with pytest.raises(PlanError, match="no uniform grid, which this method needs"):
        dfq.quantize(tiny_net, images, scheme="w1a8", reconstruction="qdrop")
