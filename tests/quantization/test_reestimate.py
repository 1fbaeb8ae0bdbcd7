import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Graph
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Rule, Scheme, Site, resolve
from dfq_jax.quantization.reestimate import matching_gain, reestimate_norms
from dfq_jax.quantization.simulate import simulate

LAYERS = ("conv1", "depthwise", "project", "conv2")


@pytest.fixture(scope="module")
def model(tiny_net):
    return fold_batch_norm(tiny_net)


@pytest.fixture(scope="module")
def quantized(model, nets):
    """Three bits in most layers, one in float; grids of biases, x_scale * w_scale, stay fine."""
    plan = resolve(model.graph, Scheme(3, 8), rules=[Rule("project", keep_float=True)])
    return calibrate(model, plan, nets.images(model, 8))


def statistics(quantized, model, x, layer):
    """Mean and deviation of each channel of one layer, in the quantized and the float network."""
    cut = lambda m: dataclasses.replace(
        m, graph=Graph(m.graph.nodes, m.graph.inputs, (layer,)), inputs=m.inputs
    )
    rough = simulate(dataclasses.replace(quantized, model=cut(quantized.model)), x)
    exact = np.asarray(
        simulate(dataclasses.replace(quantized, model=cut(model), plan=unquantized(quantized)), x)
    )
    return [(y.mean((0, 1, 2)), y.std((0, 1, 2))) for y in (np.asarray(rough), exact)]


def unquantized(quantized):
    return dataclasses.replace(quantized.plan, entries=(), groups=())


@pytest.mark.parametrize("layer", LAYERS)
def test_means_and_deviations_return(layer, quantized, model, nets):
    """On other images than those it was done with, the mean shift falls more than fivefold."""
    seen, fresh = nets.images(model, 256, seed=1), nets.images(model, 256, seed=2)
    found = reestimate_norms(quantized, model, seen, significance=0.0)
    for x, least in ((seen, 10), (fresh, 5)):
        (m0, s0), (mean, std) = statistics(quantized, model, x, layer)
        (m1, s1), _ = statistics(found, model, x, layer)
        assert np.abs(m1 - mean).max() < np.abs(m0 - mean).max() / least
        assert np.abs(np.log(s1 / std)).max() < np.abs(np.log(s0 / std)).max() / least


def test_codes_stay_and_the_last_layer_is_left_alone(quantized, model, nets):
    found = reestimate_norms(quantized, model, nets.images(model, 16))
    for layer in ("conv1", "depthwise", "conv2"):
        site = Site(layer)
        ratio = found.affines[site].scale / quantized.affines[site].scale
        assert np.ptp(ratio) > 1e-4
        before, after = (
            q.model.params[layer]["kernel"] / q.affines[site].scale for q in (quantized, found)
        )
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
        assert found.affines[site].zero_point is quantized.affines[site].zero_point
    assert found.model.params["fc"] == quantized.model.params["fc"]
    assert found.plan is quantized.plan
    assert Site("project") not in found.qparams
    assert (found.model.params["project"]["kernel"] != model.params["project"]["kernel"]).any()


def test_a_network_in_float_stays_what_it_is(model, nets):
    rules = [Rule(name, keep_float=True) for name in LAYERS]
    plan = dataclasses.replace(resolve(model.graph, Scheme(8, 8), rules=rules), groups=())
    kernels = tuple((s, spec) for s, spec in plan.entries if s.argument is None)
    floats = calibrate(model, dataclasses.replace(plan, entries=kernels), nets.images(model, 4))
    found = reestimate_norms(floats, model, nets.images(model, 16), significance=0.0)
    for layer in LAYERS:
        for slot, value in model.params[layer].items():
            np.testing.assert_allclose(found.model.params[layer][slot], value, rtol=1e-5, atol=1e-6)


def test_recorded_statistics_as_the_target(quantized, model, nets):
    """Images unlike those of training: now their statistics are taken for what they are not."""
    x = nets.images(model, 64) * 0.5
    found = reestimate_norms(quantized, model, x, target="recorded")
    (mean, std), _ = statistics(found, model, x, "conv1")
    wanted = model.moments["conv1"]
    np.testing.assert_allclose(mean, wanted.mean, atol=0.02)
    np.testing.assert_allclose(std, np.sqrt(wanted.var), rtol=0.02)
    fair = reestimate_norms(quantized, model, x)
    (_, right), (_, truth) = statistics(fair, model, x, "conv1")
    assert np.abs(np.log(right / truth)).max() < 0.02 < np.abs(np.log(std / truth)).min()


def test_a_single_scale_cannot_take_gains(nets):
    b = nets.Builder(nets.InputContract(6, 6), seed=2)
    x = b.unit("stem", "images", 4)
    x = b.bn("up.bn", b.upscale("up", x, 4, groups=2))
    model = fold_batch_norm(b.done(b.conv("last", x, 3)))
    plan = resolve(model.graph, Scheme(2, 8))
    quantized = calibrate(model, plan, nets.images(model, 8))
    x = nets.images(model, 64)
    found = reestimate_norms(quantized, model, x, significance=0.0)
    assert found.affines[Site("up")].scale == quantized.affines[Site("up")].scale
    assert (found.model.params["up"]["kernel"] == model.params["up"]["kernel"]).all()
    (before, _), (mean, _) = statistics(quantized, model, x, "up")
    (after, _), _ = statistics(found, model, x, "up")
    # biases lie on a grid before and after: half a step each
    step = found.affines[Site("up")].scale * found.affines[Site("up", 0)].scale
    assert np.abs(after - mean).max() < 1.02 * float(step.max()) < np.abs(before - mean).max() / 3


def test_gains_are_bounded_and_dead_channels_left_alone():
    found = matching_gain(
        jnp.array([4.0, 0.0, 1.0, 1.0, 1e-9]), jnp.array([1.0, 1.0, 0.0, 1e-9, 1.0])
    )
    np.testing.assert_allclose(found, [2, 1, 1, 4, 0.25])


def test_what_cannot_be_done(quantized, model, nets):
    x = nets.images(model, 2)
    bare = dataclasses.replace(model, moments={})
    with pytest.raises(
        UsageError, match=r"no batch-norm statistics .* correct its biases by images"
    ):
        reestimate_norms(quantized, bare, x)
