"""Grids that outliers made wide: narrowed where the outputs gain, left where they lose."""

import jax.numpy as jnp
import numpy as np

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import Conv2d
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.narrowing import CONTESTED, contested, with_narrowed_ranges
from dfq_jax.quantization.plan import Scheme, Site, resolve
from dfq_jax.quantization.simulate import simulate
from dfq_jax.types import InputContract

CONTRACT = InputContract(8, 8, mean=(0.5,) * 3, std=(0.25,) * 3)
POINT = Conv2d((1, 1), ((0, 0), (0, 0)), 1)
EXPECTED = {"first": (jnp.float32(-4.0), jnp.float32(4.0))}


def network(weight_of_outliers):
    """A channel of 40 times the others, which the second layer reads with some weight."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(1, 1, 3, 4)).astype(np.float32)
    first[..., 3] *= 40
    second = rng.normal(size=(1, 1, 4, 4)).astype(np.float32)
    second[:, :, 3] *= weight_of_outliers
    nodes = (Node("first", POINT, ("images",)), Node("second", POINT, ("first",)))
    params = {"first": {"kernel": jnp.asarray(first)}, "second": {"kernel": jnp.asarray(second)}}
    return Model(Graph(nodes, ("images",), ("second",)), params, (CONTRACT,))


def calibrated(model):
    low, high = CONTRACT.value_range
    images = np.random.default_rng(1).uniform(low, high, (16, 8, 8, 3))
    images = jnp.asarray(images, jnp.float32)
    plan = resolve(model.graph, Scheme(8, 8))
    return calibrate(model, plan, images, expected=EXPECTED), images


def error(quantized, images):
    exact = np.asarray(evaluate(quantized.model, images)[0][0])
    return float(np.mean((np.asarray(simulate(quantized, images)) - exact) ** 2))


def test_outliers_that_nobody_reads_are_clipped():
    quantized, images = calibrated(network(0.0))
    site = Site("second", 0)
    ratio = contested(quantized.plan, quantized.qparams, EXPECTED)["first"][0]
    assert ratio > 5 * CONTESTED
    better = with_narrowed_ranges(quantized, EXPECTED, images)
    np.testing.assert_allclose(float(better.affines[site].scale), 8 / 255, rtol=1e-5)
    assert error(better, images) < error(quantized, images) / 4


def test_outliers_that_matter_are_kept():
    quantized, images = calibrated(network(1.0))
    same = with_narrowed_ranges(quantized, EXPECTED, images)
    assert same.affines[Site("second", 0)].scale == (quantized.affines[Site("second", 0)].scale)


def test_what_nothing_predicts_is_left():
    quantized, images = calibrated(network(0.0))
    assert with_narrowed_ranges(quantized, {}, images) is quantized
