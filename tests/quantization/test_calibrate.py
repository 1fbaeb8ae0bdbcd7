import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import PlanError
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.affine import DEAD_SCALE, covers, quantize_bias
from dfq_jax.numerics.ranges import EmaMinMax, ImageMinMax
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import batches, calibrate, capture, guard_biases
from dfq_jax.quantization.observers import Observers
from dfq_jax.quantization.plan import Rule, Scheme, Site, resolve


@pytest.fixture(scope="module")
def model(tiny_net):
    return fold_batch_norm(tiny_net)


@pytest.fixture(scope="module")
def images(model, nets):
    return nets.images(model, 7, seed=2)


@pytest.fixture(scope="module")
def plan(model):
    return resolve(model.graph, Scheme(4, 4))


@pytest.fixture(scope="module")
def quantized(model, plan, images):
    return calibrate(model, plan, images, batch=3)


def numpy_search(x, bits):
    """Scale and zero point of the best of 100 shrunken ranges, over raw values, p = 2.4."""
    lo, hi, top = min(x.min(), 0), max(x.max(), 0), 2**bits - 1
    found = {}
    for percent in range(100, 0, -1):
        scale = (hi - lo) * percent / 100 / top
        z = np.clip(np.round(-lo * percent / 100 / scale), 0, top)
        values = (np.clip(np.round(x / scale) + z, 0, top) - z) * scale
        found[percent] = (np.mean(np.abs(x - values) ** 2.4), scale, int(z))
    return min(found.values())


@pytest.mark.parametrize(("count", "size"), [(7, 3), (6, 3), (3, 3), (9, 4), (5, 1)])
def test_batches_cover_all_images_with_one_shape(count, size):
    images = jnp.arange(count, dtype=jnp.float32).reshape(count, 1, 1, 1)
    parts = list(batches(images, size))
    assert {p.shape for p in parts} == {(size, 1, 1, 1)}
    assert {float(v) for p in parts for v in p.ravel()} == set(range(count))
    assert len(parts) == -(-count // size)


def test_all_batches_go_through_one_program_a_pass(model, plan, images, monkeypatch):
    traced = []
    module = sys.modules[calibrate.__module__]
    monkeypatch.setattr(module, "capture", lambda *given: traced.append(1) or capture(*given))
    calibrate(model, plan, images, batch=5)
    assert len(traced) == 2


def test_capture_takes_what_each_group_reads(model, plan, images, nets):
    found = capture(model, plan, images[:2])
    truth = nets.forward(model, images[:2])
    assert set(found) == {t for t, _ in plan.groups}
    for tensor, value in found.items():
        np.testing.assert_allclose(value, truth[tensor], atol=2e-5)


def test_edges_get_the_scales_a_search_over_all_values_finds(quantized, plan, images, nets):
    truth = nets.forward(quantized.model, np.concatenate(list(batches(images, 3))))
    for tensor, sites in plan.groups:
        if tensor == "images":
            continue
        bits = plan.table[sites[0]].grid.bits
        error, scale, _ = numpy_search(truth[tensor].ravel(), bits)
        ours = [quantized.qparams[s] for s in sites]
        assert all(q is ours[0] for q in ours)
        assert ours[0].scale.shape == ours[0].zero_point.shape == ()
        s, z = float(ours[0].scale), int(ours[0].zero_point)
        x = truth[tensor].ravel()
        top = 2**bits - 1
        values = (np.clip(np.round(x / s) + z, 0, top) - z) * s
        assert np.mean(np.abs(x - values) ** 2.4) <= error * 1.05, tensor
        if bits == 4:
            assert s == pytest.approx(scale, rel=0.03), tensor


def test_images_have_the_range_of_their_pixels(quantized, model):
    contract = model.contract
    ends = [(p - m) / s for m, s in zip(contract.mean, contract.std, strict=True) for p in (0, 1)]
    grid = quantized.plan.table[Site("conv1", 0)].grid
    affine = quantized.qparams[Site("conv1", 0)]
    assert float(affine.scale) == pytest.approx((max(ends) - min(ends)) / 255, rel=1e-5)
    lo, hi = covers(affine, grid)
    assert float(lo) == pytest.approx(min(ends), abs=float(affine.scale))
    assert float(hi) == pytest.approx(max(ends), abs=float(affine.scale))


def test_kernels_get_the_scales_a_search_per_channel_finds(quantized, model):
    kernel = np.asarray(model.params["conv2"]["kernel"], np.float64)
    affine = quantized.qparams[Site("conv2")]
    assert affine.scale.shape == (1, 1, 1, 8)
    for c in range(8):
        _, scale, z = numpy_search(kernel[..., c].ravel(), 4)
        assert float(affine.scale[0, 0, 0, c]) == pytest.approx(scale, rel=1e-4)
        assert int(affine.zero_point[0, 0, 0, c]) == z


def test_the_model_itself_is_untouched(quantized, model, plan):
    assert quantized.model is model
    assert quantized.plan is plan
    assert set(quantized.qparams) == set(plan.table)


def test_expected_ranges_widen_8_bit_grids_only(model, plan, images, quantized):
    far = {t: (jnp.float32(-100.0), jnp.float32(50.0)) for t, _ in plan.groups}
    wide = calibrate(model, plan, images, expected=far, batch=3)
    for tensor, sites in plan.groups:
        ours, before = wide.affines[sites[0]], quantized.affines[sites[0]]
        if tensor == "images" or plan.table[sites[0]].grid.bits < 8:
            assert float(ours.scale) == float(before.scale)
        else:
            assert float(ours.scale) == pytest.approx(150 / 255, rel=1e-5)
    near = {t: (jnp.float32(0.0), jnp.float32(1e-3)) for t, _ in plan.groups}
    same = calibrate(model, plan, images, expected=near, batch=3)
    for site, affine in quantized.qparams.items():
        np.testing.assert_allclose(same.affines[site].scale, affine.scale, rtol=1e-5)


def test_ranges_without_images(model, plan):
    known = {t: (jnp.float32(-1.0), jnp.float32(2.0)) for t, _ in plan.groups}
    blind = calibrate(model, plan, None, expected=known)
    assert float(blind.affines[Site("conv2", 0)].scale) == pytest.approx(3 / 15)
    assert float(blind.affines[Site("fc", 0)].scale) == pytest.approx(3 / 255)
    del known["relu2"]
    message = "no batch-norm statistics predict the range of 'relu2'; calibrate it with images"
    with pytest.raises(PlanError, match=message):
        calibrate(model, plan, None, expected=known)


def test_no_image_at_all(model, plan):
    with pytest.raises(PlanError, match=r"calibrate\(\) needs at least one image"):
        calibrate(model, plan, jnp.zeros((0, 8, 8, 3)))


def test_dead_channels_and_huge_biases(model, images):
    """A channel without weights, and one whose bias would overflow int32."""
    kernel, bias = model.params["conv2"]["kernel"], model.params["conv2"]["bias"]
    hard = {"kernel": kernel.at[..., 1].set(0.0).at[..., 2].multiply(1e-10)}
    hard["bias"] = bias.at[1].set(0.0).at[2].set(50.0)
    model = with_params(model, {"conv2": hard})
    plan = resolve(model.graph, Scheme(8, 8))
    quantized = calibrate(model, plan, images)
    scale = quantized.affines[Site("conv2")].scale
    step = quantized.affines[Site("conv2", 0)].scale
    assert float(scale[0, 0, 0, 1]) == np.float32(DEAD_SCALE)
    codes = np.asarray(quantize_bias(hard["bias"], step, scale), np.int64)
    assert np.abs(codes).max() <= 2**30
    values = codes * np.asarray(step * scale, np.float64).ravel()
    np.testing.assert_allclose(values, hard["bias"], atol=float(step) * float(scale.max()))
    assert values[2] == pytest.approx(50, rel=1e-6)


def test_float_layers_have_no_scales(model, images):
    rules = [Rule("fc", keep_float=True)]
    quantized = calibrate(model, resolve(model.graph, Scheme(8, 8), rules=rules), images)
    assert not [s for s in quantized.qparams if s.node == "fc"]


def test_guarding_new_biases(quantized):
    """Only the kernel scales that a corrected bias needs larger are raised."""
    bias = quantized.model.params["conv2"]["bias"]
    moved = with_params(quantized.model, {"conv2": {"bias": bias.at[3].set(1e8)}})
    guarded = guard_biases(type(quantized)(moved, quantized.plan, quantized.qparams))
    site, step = Site("conv2"), quantized.qparams[Site("conv2", 0)].scale
    for other, affine in quantized.qparams.items():
        if other != site:
            np.testing.assert_array_equal(guarded.affines[other].scale, affine.scale)
    old = np.asarray(quantized.qparams[site].scale).ravel()
    new = np.asarray(guarded.affines[site].scale).ravel()
    assert new[3] == pytest.approx(1e8 / (float(step) * 2**30), rel=1e-5)
    assert new[3] > old[3]
    np.testing.assert_array_equal(np.delete(new, 3), np.delete(old, 3))


def test_constants_have_their_own_range(nets):
    model = nets.vit()
    plan = resolve(model.graph, Scheme(8, 8))
    quantized = calibrate(model, plan, nets.images(model, 2))
    token = np.asarray(model.params["token"]["value"])
    affine = quantized.affines[Site("joined", 0)]
    ends = [float(v) for v in covers(affine, plan.table[Site("joined", 0)].grid)]
    step = float(affine.scale)
    assert step == pytest.approx((token.max() - token.min()) / 255, rel=1e-5)
    np.testing.assert_allclose(ends, [token.min(), token.max()], atol=step)


@pytest.mark.parametrize("net", ["vit", "two_heads", "unet"])
def test_networks_without_statistics_need_images(net, nets):
    model = getattr(nets, net)()
    plan = resolve(fold_batch_norm(model).graph, Scheme(8, 8))
    with pytest.raises(PlanError, match="no batch-norm statistics predict the range of "):
        calibrate(fold_batch_norm(model), plan, None)


def test_the_largest_bias_decides_a_single_scale(nets):
    """A grouped transposed convolution with tiny weights and a large bias."""
    model = fold_batch_norm(nets.unet())
    slots = model.params["up3"]
    hard = {"kernel": slots["kernel"] * 1e-10, "bias": slots["bias"].at[2].set(70.0)}
    model = with_params(model, {"up3": hard})
    plan = resolve(model.graph, Scheme(8, 8))
    quantized = calibrate(model, plan, nets.images(model, 2))
    scale = quantized.affines[Site("up3")].scale
    assert scale.shape == (1, 1, 1, 1)
    step = quantized.affines[Site("up3", 0)].scale
    codes = np.asarray(quantize_bias(hard["bias"], step, scale), np.int64)
    assert np.abs(codes).max() == pytest.approx(2**30, rel=1e-6)
    moved = with_params(model, {"up3": {"bias": hard["bias"] * 2}})
    guarded = guard_biases(type(quantized)(moved, plan, quantized.qparams))
    again = guarded.affines[Site("up3")].scale
    assert float(again.ravel()[0]) == pytest.approx(2 * float(scale.ravel()[0]), rel=1e-5)


def test_several_batches_and_outputs(nets):
    model = fold_batch_norm(nets.two_heads())
    plan = resolve(model.graph, Scheme(8, 8))
    found = calibrate(model, plan, nets.images(model, 5), batch=2)
    assert set(found.qparams) == set(plan.table)
    shared = [found.qparams[Site(n, 0)] for n in ("classes", "number")]
    assert shared[0] is shared[1]


def test_averaged_extremes_over_images(model, nets):
    """Every image counts once, though the last batch shows some again."""
    plan = resolve(model.graph, Scheme(4, 4), observers=Observers(activations=ImageMinMax()))
    x = nets.images(model, 10)
    quantized = calibrate(model, plan, x, batch=4)
    values = nets.forward(model, x)
    for tensor, sites in plan.groups[1:]:
        each = np.asarray(values[tensor]).reshape(10, -1)
        lo, hi = each.min(1).mean(), each.max(1).mean()
        scale = (max(hi, 0) - min(lo, 0)) / plan.table[sites[0]].grid.qmax
        assert float(quantized.affines[sites[0]].scale) == pytest.approx(scale, rel=1e-4)


def test_averaged_extremes_over_batches(model, nets):
    """The average of the batches' extremes, the last weighing most; images keep their range."""
    plan = resolve(model.graph, Scheme(4, 4), observers=Observers(activations=EmaMinMax(0.5)))
    x = nets.images(model, 12)
    quantized = calibrate(model, plan, x, batch=4)
    for tensor, sites in plan.groups[1:]:
        ends = []
        for start in (0, 4, 8):
            values = nets.forward(model, x[start : start + 4])[tensor]
            ends.append([values.min(), values.max()])
        lo, hi = np.average(ends, axis=0, weights=[0.25, 0.5, 1.0])
        scale = (max(hi, 0) - min(lo, 0)) / plan.table[sites[0]].grid.qmax
        assert float(quantized.affines[sites[0]].scale) == pytest.approx(scale, rel=1e-4)
