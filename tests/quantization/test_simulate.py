import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.affine import Affine
from dfq_jax.quantization.plan import Site
from dfq_jax.quantization.simulate import simulate, snap_bias


def numpy_simulation(quantized, x, nets):
    """The network in float64 with every site rounded by hand."""
    table, qparams = quantized.plan.table, quantized.qparams

    def snap(site, x):
        if site not in table:
            return x
        grid, scale = table[site].grid, np.asarray(qparams[site].scale, np.float64)
        z = np.asarray(qparams[site].zero_point, np.float64)
        return (np.clip(np.round(x / scale) + z, grid.qmin, grid.qmax) - z) * scale

    def slots(node, p):
        kernel, data = Site(node.name), Site(node.name, 0)
        p = {**p, **({"kernel": snap(kernel, p["kernel"])} if "kernel" in p else {})}
        if kernel in table and data in table and "bias" in p:
            step = np.float64(qparams[data].scale) * np.asarray(qparams[kernel].scale).ravel()
            p["bias"] = np.round(p["bias"] / step) * step
        return p

    edge = lambda node, i, x: snap(Site(node.name, i), x)
    return nets.forward(quantized.model, x, edge, slots)


@pytest.mark.parametrize(
    ("layers", "floats"),
    [("zsq_all_low", ""), ("qdrop_8bit_ends", "project"), ("brecq_8bit_ends_second", "")],
)
def test_equals_a_numpy_forward(layers, floats, nets, calibrated):
    quantized = calibrated("w5a6", layers, floats)
    model = quantized.model
    x = nets.images(model, 3, seed=9)
    ours = np.asarray(jax.jit(simulate)(quantized, x))
    truth = numpy_simulation(quantized, x, nets)["fc"]
    # float32 may put a value on the other side of a rounding boundary: one step of the last layer
    assert np.median(np.abs(ours - truth)) < 1e-4 * np.abs(truth).max()
    np.testing.assert_allclose(ours, truth, atol=0.05 * np.abs(truth).max())
    exact = np.asarray(nets.run(model, x))
    assert np.abs(ours - exact).max() > 1e-3 * np.abs(exact).max()


def test_operators_of_the_mixed_network(nets, calibrated):
    quantized = calibrated("w8a8", net="mixed")
    x = nets.images(quantized.model, 3, seed=9)
    truth = numpy_simulation(quantized, x, nets)["fc"]
    ours = np.asarray(jax.jit(simulate)(quantized, x))
    np.testing.assert_allclose(ours, truth, atol=0.02 * np.abs(truth).max())
    assert np.median(np.abs(ours - truth)) < 1e-4 * np.abs(truth).max()


@pytest.mark.parametrize("net", ["dense", "excite", "vit", "convnext", "unet", "two_heads"])
def test_modern_networks_equal_a_numpy_forward(net, nets, calibrated):
    quantized = calibrated("w8a8", net=net)
    x = nets.images(quantized.model, 3, seed=9)
    output = quantized.model.graph.outputs[0]
    truth = numpy_simulation(quantized, x, nets)[output]
    ours = np.asarray(jax.jit(simulate)(quantized, x))
    np.testing.assert_allclose(ours, truth, atol=0.03 * np.abs(truth).max())
    assert np.median(np.abs(ours - truth)) < 1e-3 * np.abs(truth).max()


def test_more_bits_come_closer(nets, calibrated):
    low, high = calibrated("w5a6"), calibrated("w8a8")
    x = jnp.clip(nets.images(low.model, 3, seed=9), -1.5, 1.5)  # what pixels can say
    exact = np.asarray(nets.run(low.model, x))
    error = lambda q: np.abs(np.asarray(jax.jit(simulate)(q, x)) - exact).mean()
    assert error(high) < 0.7 * error(low)


def test_biases_sit_on_the_product_grid():
    data = Affine(jnp.float32(0.5), jnp.uint8(3))
    kernel = Affine(jnp.array([[0.25, 0.5]]), jnp.zeros((1, 2), jnp.int8))
    assert snap_bias(jnp.array([0.2, 0.4]), data, kernel).tolist() == [0.25, 0.5]
    assert snap_bias(jnp.array([-0.2, -0.9]), data, kernel).tolist() == [-0.25, -1.0]


def test_biases_of_half_quantized_layers_stay_float(calibrated):
    """The last layer of `zsq_all_low` reads floats."""
    quantized = calibrated("w5a6", "zsq_all_low")
    model, plan = quantized.model, quantized.plan
    x = jnp.zeros((3, 8, 8, 3))
    shifted = with_params(model, {"fc": {"bias": model.params["fc"]["bias"] + 1e-4}})
    run = jax.jit(simulate)
    moved = run(type(quantized)(shifted, plan, quantized.qparams), x)
    np.testing.assert_allclose(moved - run(quantized, x), 1e-4, rtol=1e-2)


def test_gradients_flow_through_the_grids(nets, calibrated):
    quantized = calibrated("w8a8")
    model = quantized.model
    x = nets.images(model, 2)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(simulate(quantized, x)[:, 0])))(x)
    exact = jax.jit(jax.grad(lambda x: jnp.sum(nets.run(model, x)[:, 0])))(x)
    cosine = jnp.sum(slope * exact) / jnp.sqrt(jnp.sum(slope**2) * jnp.sum(exact**2))
    assert float(cosine) > 0.9


def test_new_scales_do_not_retrace(nets, calibrated):
    quantized = calibrated("w8a8")
    model = quantized.model
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(simulate, n=1))
    x = nets.images(model, 2)
    run(quantized, x)
    wider = {k: a._replace(scale=a.scale * 2) for k, a in quantized.qparams.items()}
    assert not np.allclose(run(type(quantized)(model, quantized.plan, wider), x), run(quantized, x))
