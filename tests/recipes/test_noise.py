import dataclasses

import jax
import numpy as np
import pytest

from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.affine import covers
from dfq_jax.numerics.ranges import MinMax, Percentile
from dfq_jax.optim.progress import Watcher
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import guard_biases
from dfq_jax.quantization.kernel_shifts import correct_kernel_shifts
from dfq_jax.quantization.observers import Observers
from dfq_jax.quantization.plan import Site, parse_scheme
from dfq_jax.quantization.simulate import simulate
from dfq_jax.recipes.dfq import dfq
from dfq_jax.recipes.dfq_trials import BLIND, nearest_network
from dfq_jax.recipes.noise import noise
from dfq_jax.report.analyze import analyze
from dfq_jax.synthesis.run.engine import synthesize_images

KEY = jax.random.key(3)


def test_images_are_possible_pixels_of_the_contract(nets):
    model = nets.vit()
    made = synthesize_images(model, noise(batch=4), 10, KEY)
    lo, hi = model.contract.value_range
    images = np.asarray(made.images)
    assert images.shape == (10, *model.contract.shape)
    assert (made.losses, made.excluded, made.notes) == ((), (), ())
    assert lo - 1e-5 <= images.min() < images.max() <= hi + 1e-5
    assert images.std(0).min() > 0.1
    np.testing.assert_array_equal(images, synthesize_images(model, noise(batch=4), 10, KEY).images)
    other = synthesize_images(model, noise(batch=4), 10, jax.random.key(4)).images
    assert not np.array_equal(images, other)
    assert len(synthesize_images(model, noise(), 3, KEY).images) == 3


@pytest.mark.parametrize("net", ["vit", "convnext"])
def test_ranges_hold_the_noise_and_its_means_correct_biases(net, nets):
    model = getattr(nets, net)()
    images = synthesize_images(model, noise(), 16, KEY).images
    said = []
    made = dfq(model, images, parse_scheme("w8a8"), noise=True, watch=Watcher(said.append))
    assert made.used_images
    assert [s.split()[0] for s in said] == ["folding", "calibrating", "correcting"]
    unmended = dfq(model, images, parse_scheme("w8a8"), noise=True, bias="none")
    assert unmended.quantized.model.params == unmended.reference.params
    wanted = guard_biases(correct_kernel_shifts(unmended.quantized, images)).model
    jax.tree.map(np.testing.assert_array_equal, made.quantized.model.params, wanted.params)
    truth = nets.forward(made.reference, images)
    for tensor, sites in made.quantized.plan.groups:
        spec = made.quantized.plan.table[sites[0]]
        assert spec.observer in BLIND
        if tensor != "images":
            lo, hi = covers(made.quantized.affines[sites[0]], spec.grid)
            step = float(made.quantized.affines[sites[0]].scale)
            outside = (truth[tensor] < float(lo) - step) | (truth[tensor] > float(hi) + step)
            most = {MinMax(): 0.0, Percentile(): 2e-4}.get(spec.observer, 0.01)
            assert outside.mean() <= most
    report = analyze(made.reference, made.quantized, images)
    assert report.agreement >= 0.75
    assert report.sqnr > 15


def test_noise_mends_few_bits_of_a_network_without_statistics(tiny_net, nets):
    """What recorded statistics do for biases, means of noise do nearly as well."""
    folded = fold_batch_norm(tiny_net)
    blind = dataclasses.replace(folded, moments={})
    images = synthesize_images(blind, noise(), 32, KEY).images
    fresh = nets.images(blind, 64)
    scheme = parse_scheme("w3a8")

    def error(bias):
        made = dfq(blind, images, scheme, noise=True, bias=bias).quantized
        gap = np.asarray(simulate(made, fresh)) - nets.forward(blind, fresh)["fc"]
        return np.abs(gap.mean(0)).max()

    assert error("analytic") < 0.7 * error("none")


def test_images_of_ones_own_correct_biases(nets):
    model = nets.vit()
    made = dfq(model, nets.images(model, 8), parse_scheme("w4a8"))
    bias = lambda m: np.asarray(m.params["wide0"]["bias"])
    assert not np.array_equal(bias(made.quantized.model), bias(made.reference))
    table = made.quantized.plan.table
    assert table[Site("head", 0)].observer != MinMax()


def test_statistics_count_for_more_than_noise(tiny_net):
    """A network with batch norms keeps its correction and its ranges."""
    images = synthesize_images(tiny_net, noise(), 8, KEY).images
    scheme = parse_scheme("w8a8")
    told, plain = (dfq(tiny_net, images, scheme, noise=flag) for flag in (True, False))
    assert told.quantized.plan == plain.quantized.plan
    bias = told.quantized.model.params["project"]["bias"]
    np.testing.assert_array_equal(bias, plain.quantized.model.params["project"]["bias"])
    assert not np.array_equal(bias, told.reference.params["project"]["bias"])


def test_statistics_that_were_never_recorded_are_none(tiny_net):
    fresh = {n: {"mean": np.zeros(6), "var": np.ones(6)} for n in ("bn1", "bn2", "bn3")}
    fresh["bn4"] = {"mean": np.zeros(8), "var": np.ones(8)}
    slots = {n: {k: jax.numpy.float32(v) for k, v in s.items()} for n, s in fresh.items()}
    model = with_params(tiny_net, slots)
    images = synthesize_images(model, noise(), 8, KEY).images
    made = dfq(model, images, parse_scheme("w8a8"), noise=True, statistics_suffice=True)
    assert made.used_images
    assert made.reference.moments == {}
    some = with_params(tiny_net, {"bn1": slots["bn1"]})
    kept = dfq(some, images, parse_scheme("w8a8"), noise=True).reference.moments
    assert set(kept) == {"depthwise", "project", "conv2"}


@pytest.mark.parametrize("turn", [1, -1])
def test_of_several_grids_the_best_for_outputs_is_taken(turn, tiny_net):
    images = synthesize_images(tiny_net, noise(), 8, KEY).images
    scheme = parse_scheme("w8a8")
    made = [
        dfq(tiny_net, images, scheme, observers=Observers(activations=observer))
        for observer in (MinMax(), Percentile(60.0))
    ]
    grids = [(one.quantized, True) for one in made]
    found, used = nearest_network(grids[::turn], made[0].reference, images)
    assert used
    assert found is made[0].quantized
    rather = nearest_network(grids[::turn], made[0].reference, images, (1e9, 1.0)[::turn])
    assert rather[0] is made[1].quantized
