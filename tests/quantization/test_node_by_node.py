"""Networks run node by node compute what they compute as a whole, from shared programs."""

import jax
import numpy as np
import pytest
from integers import integer_predict

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.quantization.node_by_node import (
    in_batches,
    in_float,
    in_integers,
    outputs_of,
    rounding_kernels,
    simulating,
)
from dfq_jax.quantization.simulate import simulate, weight_hook


def first(run, model, x):
    return outputs_of(run, model.graph.outputs[:1], x)[0]


@pytest.mark.parametrize("net", ["tiny", "mixed"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a5"])
def test_every_way_is_that_of_the_whole_network(scheme, net, nets, calibrated):
    quantized = calibrated(scheme, net=net)
    model, x = quantized.model, nets.images(quantized.model, 4, seed=2)
    size = np.abs(np.asarray(simulate(quantized, x))).max()
    plain = evaluate(model, x, hook=weight_hook(quantized.plan, quantized.qparams))[0][0]
    for run, whole in (
        (in_float(model), nets.run(model, x)),
        (rounding_kernels(quantized), plain),
        (simulating(quantized), jax.jit(simulate)(quantized, x)),
    ):
        np.testing.assert_allclose(first(run, model, x), whole, atol=1e-5 * size)
    exact = first(in_integers(quantized), model, x)
    np.testing.assert_allclose(exact, integer_predict(quantized, x), atol=1e-6 * size)


def test_one_set_of_programs_serves_all_ways_and_bits(nets, calibrated, caplog):
    schemes = [calibrated(scheme) for scheme in ("w8a8", "w4a5")]
    model, x = schemes[0].model, nets.images(schemes[0].model, 8, seed=2)
    first(in_float(model), model, x)
    with jax.log_compiles():
        for quantized in schemes:
            for way in (simulating, rounding_kernels, in_integers):
                first(way(quantized), quantized.model, x)
    told = [record.getMessage() for record in caplog.records]
    assert not [text for text in told if "compilation of jit(computed)" in text]


def test_all_images_count_once():
    images = np.arange(10, dtype=np.float32).reshape(10, 1, 1, 1)
    batches = list(in_batches(images, 4))
    assert [batch.images.shape[0] for batch in batches] == [4, 4, 4]
    counted = np.concatenate([batch.counting(batch.images) for batch in batches])
    np.testing.assert_array_equal(counted, images)
    constant = np.ones((1, 5), np.float32)
    assert batches[-1].counting(constant).shape == (1, 5)
