import jax
import numpy as np
import pytest

from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.affine import covers
from dfq_jax.numerics.ranges import MinMax, Percentile
from dfq_jax.optim.progress import Watcher
from dfq_jax.quantization.observers import Observers
from dfq_jax.quantization.plan import Site, parse_scheme
from dfq_jax.recipes.dfq import dfq
from dfq_jax.recipes.dfq_ranges import nearest_network
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
def test_ranges_cover_the_noise_and_biases_stay(net, nets):
    model = getattr(nets, net)()
    images = synthesize_images(model, noise(), 16, KEY).images
    said = []
    made = dfq(model, images, parse_scheme("w8a8"), noise=True, watch=Watcher(said.append))
    assert made.used_images
    assert [s.split()[0] for s in said] == ["folding", "calibrating"]
    assert made.quantized.model.params == made.reference.params
    truth = nets.forward(made.reference, images)
    for tensor, sites in made.quantized.plan.groups:
        spec = made.quantized.plan.table[sites[0]]
        assert spec.observer in (MinMax(), Percentile())
        if tensor != "images":
            lo, hi = covers(made.quantized.affines[sites[0]], spec.grid)
            step = float(made.quantized.affines[sites[0]].scale)
            outside = (truth[tensor] < float(lo) - step) | (truth[tensor] > float(hi) + step)
            assert outside.mean() <= (0 if spec.observer == MinMax() else 2e-4)
    report = analyze(made.reference, made.quantized, images)
    assert report.agreement >= 0.75
    assert report.sqnr > 15


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
