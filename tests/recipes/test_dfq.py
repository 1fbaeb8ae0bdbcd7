import dataclasses
import inspect
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import PlanError, UsageError
from dfq_jax.graph.ops import Add, GlobalAvgPool, Relu
from dfq_jax.numerics.affine import Grid, covers, quantize
from dfq_jax.numerics.channels import input_ranges
from dfq_jax.numerics.ranges import MinMax, Statistics
from dfq_jax.numerics.splitting import plan_splits
from dfq_jax.optim.progress import Watcher
from dfq_jax.passes.before_quantization import Surgery, operated
from dfq_jax.passes.channel_split import unsplit
from dfq_jax.passes.level import LEVEL
from dfq_jax.passes.ranges import expected_ranges
from dfq_jax.quantization.calibrate import BatchShown, calibrate, observe_ranges, unseen_ranges
from dfq_jax.quantization.narrowing import activation_gap
from dfq_jax.quantization.observers import (
    ACTIVATIONS_ONLY,
    DEFAULT_OBSERVER,
    NAMED,
    Observers,
    observer_named,
)
from dfq_jax.quantization.plan import Rule, Site, parse_scheme
from dfq_jax.quantization.simulate import simulate
from dfq_jax.recipes.dfq import SIGNED, at_one_width, dfq
from dfq_jax.recipes.dfq_biases import rounded_kernels
from dfq_jax.report.analyze import analyze
from dfq_jax.types import InputContract


@pytest.fixture(scope="module")
def images(tiny_net, nets):
    return nets.images(tiny_net, 8) * 0.7


@pytest.fixture(scope="module")
def from_statistics(tiny_net):
    return dfq(tiny_net, None, parse_scheme("w8a8"))


@pytest.fixture(scope="module")
def from_images(tiny_net, images):
    return dfq(tiny_net, images, parse_scheme("w8a8"))


def scores(nets, model, images):
    return nets.forward(model, images)[model.graph.outputs[0]]


def test_the_reference_computes_what_the_network_computes(tiny_net, images, nets, from_statistics):
    wanted = scores(nets, tiny_net, images)
    found = scores(nets, from_statistics.reference, images)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_it_is_equalized_unless_told_otherwise(nets):
    model, scheme = nets.stem(), parse_scheme("w8a8")
    images = nets.images(model, 4)
    wanted = scores(nets, model, images)
    for equalize in (True, False):
        reference = dfq(
            model, None, scheme, surgery=Surgery("pairs" if equalize else None)
        ).reference
        first, second = (np.abs(reference.params[n]["kernel"]) for n in ("conv1", "conv2"))
        ratio = first.max((0, 1, 2)) / second.max((0, 1, 3))
        assert np.allclose(ratio, 1, rtol=1e-3) is equalize
        assert np.abs(scores(nets, reference, images) - wanted).max() <= 1e-5 * abs(wanted).max()


@pytest.mark.parametrize("made", ["from_statistics", "from_images"])
def test_eight_bits_are_close_with_and_without_images(made, request, images):
    found = request.getfixturevalue(made)
    assert found.used_images is (made == "from_images")
    assert found.quantized.model.graph == found.reference.graph
    report = analyze(found.reference, found.quantized, images)
    assert report.coverage == 1.0
    assert report.agreement >= 0.75
    assert report.sqnr > 18


def test_fewer_bits_are_worse(tiny_net, images, from_images):
    low = dfq(tiny_net, images, parse_scheme("w3a8"))
    coarse = analyze(low.reference, low.quantized, images)
    fine = analyze(from_images.reference, from_images.quantized, images)
    assert coarse.sqnr < fine.sqnr - 3


def test_biases_differ_from_the_reference_and_kernels_do_not(from_images):
    model, reference = from_images.quantized.model, from_images.reference
    for name, slots in reference.params.items():
        np.testing.assert_array_equal(slots["kernel"], model.params[name]["kernel"])
    moved = [
        np.abs(np.asarray(slots["bias"] - model.params[name]["bias"])).max()
        for name, slots in reference.params.items()
    ]
    assert max(moved) > 0


def test_statistics_suffice_for_eight_bits_only(tiny_net, images, from_statistics):
    eight = dfq(tiny_net, images, parse_scheme("w8a8"), statistics_suffice=True)
    assert not eight.used_images
    for site, affine in eight.quantized.affines.items():
        np.testing.assert_array_equal(affine.scale, from_statistics.quantized.affines[site].scale)
    low = dfq(tiny_net, images, parse_scheme("w8a4"), layers="zsq_all_low", statistics_suffice=True)
    assert low.used_images


@pytest.mark.parametrize("name", NAMED)
def test_every_observer_runs_end_to_end(name, nets):
    observer = observer_named(name)
    weights = DEFAULT_OBSERVER if isinstance(observer, ACTIVATIONS_ONLY) else observer
    model = nets.stem()
    images = nets.images(model, 20) * 0.7
    found = dfq(
        model,
        images,
        parse_scheme("w6a6"),
        observers=Observers(weights, observer),
        statistics_suffice=True,
    )
    assert found.used_images
    report = analyze(found.reference, found.quantized, images)
    assert report.sqnr > 12
    assert {s.observer for _, s in found.quantized.plan.entries} == {weights, observer}


def test_chosen_observers_are_taken_at_their_word(tiny_net, images, from_images):
    """No 8-bit range is widened by what statistics predict, unless they are the observer."""
    scheme = parse_scheme("w8a8")
    shown = dfq(tiny_net, images, scheme, observers=Observers(activations=MinMax()))
    wanted = calibrate(shown.reference, shown.quantized.plan, images)
    told = dfq(tiny_net, images, scheme, observers=Observers(activations=Statistics()))
    blind = dfq(tiny_net, None, scheme)
    for site, spec in shown.quantized.plan.entries:
        if site.argument is not None:
            scale = lambda made, site=site: float(made.qparams[site].scale)
            assert scale(shown.quantized) == scale(wanted)
            assert scale(told.quantized) == scale(blind.quantized)
            assert scale(from_images.quantized) >= 0.99 * scale(blind.quantized)
            assert spec.observer == MinMax()
    assert told.used_images


def test_rules_presets_and_stages(tiny_net):
    said = []
    found = dfq(
        tiny_net,
        None,
        parse_scheme("w4a8"),
        layers="qdrop_8bit_ends",
        rules=[Rule("project", keep_float=True), Rule("conv2", weight_bits=5)],
        watch=Watcher(said.append),
    )
    bits = {
        s.node: spec.grid.bits for s, spec in found.quantized.plan.entries if s.argument is None
    }
    assert bits == {"conv1": 8, "depthwise": 4, "conv2": 5, "fc": 8}
    assert [s.split()[0] for s in said] == ["folding", "calibrating", "correcting"]
    assert "equalizing" in said[0]
    with pytest.raises(PlanError, match="nothing"):
        dfq(tiny_net, None, parse_scheme("w8a8"), rules=[Rule("nothing.*", weight_bits=4)])


def test_without_images_unknown_ranges_are_an_error(mixed_net):
    with pytest.raises(PlanError, match="images"):
        dfq(mixed_net, None, parse_scheme("w8a8"))


def test_rounded_kernels_lie_on_their_grids(from_statistics):
    found = from_statistics.quantized
    rounded = rounded_kernels(found)
    assert set(rounded) == {"conv1", "depthwise", "project", "conv2", "fc"}
    for name, kernel in rounded.items():
        codes = np.asarray(kernel / found.qparams[Site(name)].scale)
        assert np.abs(codes - np.rint(codes)).max() < 1e-3
        assert np.abs(codes).max() <= 128


def test_large_biases_keep_their_codes_small(tiny_net, nets, images):
    params = {k: dict(v) for k, v in tiny_net.params.items()}
    params["fc"]["kernel"] = params["fc"]["kernel"].at[:, 1].multiply(1e-9)
    params["fc"]["bias"] = params["fc"]["bias"].at[1].set(50.0)
    model = dataclasses.replace(tiny_net, params=params)
    found = dfq(model, None, parse_scheme("w8a8"))
    scale = np.asarray(found.quantized.affines[Site("fc")].scale)
    data = np.asarray(found.quantized.affines[Site("fc", 0)].scale)
    bias = np.asarray(found.quantized.model.params["fc"]["bias"])
    assert (np.abs(bias / (scale.reshape(-1) * data)) < 2**31).all()
    assert np.asarray(simulate(found.quantized, images))[:, 1] == pytest.approx(50, rel=1e-3)


def test_the_default_surgery_is_that_of_the_paper(tiny_net, from_statistics):
    assert from_statistics.uncapped == ()
    assert from_statistics.unsplit == {}
    same = dfq(tiny_net, None, parse_scheme("w8a8"), surgery=Surgery("pairs", "keep", False, 0.0))
    for site, affine in same.quantized.affines.items():
        np.testing.assert_array_equal(affine.scale, from_statistics.quantized.affines[site].scale)


def test_what_surgery_did_is_told(tiny_net, images, nets):
    everything = Surgery("groups", "replace", absorb=True, split=0.1)
    found = dfq(tiny_net, images, parse_scheme("w4a8"), surgery=everything, reestimate=True)
    assert found.uncapped == ("relu2",)
    assert found.unsplit == unsplit(found.reference)
    assert found.reference.params["fc"]["kernel"].shape == (9, 5)
    wanted = scores(nets, tiny_net, images)
    assert np.abs(scores(nets, found.reference, images) - wanted).max() <= 0.05 * wanted.std()
    assert analyze(found.reference, found.quantized, images).sqnr > 8


def test_splitting_adds_no_rounding_error(nets):
    """On the grids found for equal halves, the codes of copies sum to the code of the whole."""
    model, scheme = nets.wide(), parse_scheme("w3a8")
    whole = operated(model, Surgery()).params["conv3"]["kernel"]
    found = dfq(model, None, scheme, surgery=Surgery(split=0.05))
    assert set(found.unsplit) == {"conv1", "conv2", "conv4"}
    site = Site("conv3")
    spec, affine = found.quantized.plan.spec(site), found.quantized.affines[site]
    kernel = found.quantized.model.params["conv3"]["kernel"]
    np.testing.assert_array_equal(kernel, found.reference.params["conv3"]["kernel"])
    assert kernel.shape == (3, 3, 34, 32)
    source = np.asarray(plan_splits(input_ranges(whole), 2).source)
    assert spec is not None
    codes = np.asarray(quantize(kernel, affine, spec.grid), np.int64)
    copies = np.isin(source, source[32:])  # of channels that were split
    total, clipped = np.zeros((32, 3, 3, 32)), np.zeros((32, 3, 3, 32), bool)
    np.add.at(total, source, np.moveaxis(codes - np.asarray(affine.zero_point, np.int64), 2, 0))
    ends = np.isin(codes, (spec.grid.qmin, spec.grid.qmax))
    np.logical_or.at(clipped, source, np.moveaxis(ends, 2, 0))
    off = np.abs(total - np.moveaxis(np.asarray(whole / affine.scale), 2, 0))
    clear = ~clipped & np.isin(np.arange(32), source[copies])[:, None, None, None]
    assert clear.sum() > 300
    assert off[clear].max() < 0.5 + 1e-3


def test_ranges_end_at_peaks(tiny_net, images):
    """All 8-bit grids end where tensors do on these images, statistics or not."""
    found = dfq(tiny_net, None, parse_scheme("w8a8"), peaks=images * 0.5)
    assert found.used_images
    plan, reference = found.quantized.plan, found.reference
    most = observe_ranges(
        reference, plan, images * 0.5, unseen_ranges(plan), BatchShown(1, 8, 8).traced()
    )
    for tensor, sites in plan.groups:
        if tensor not in reference.graph.inputs:
            low, high = covers(found.quantized.affines[sites[0]], Grid(8))
            step = found.quantized.affines[sites[0]].scale
            assert abs(high - max(most[tensor][1], 0)) <= step
            assert abs(low - min(most[tensor][0], 0)) <= step


def test_norms_cannot_be_reestimated_blindly(tiny_net):
    with pytest.raises(UsageError, match=r"reestimate=True\) got no images"):
        dfq(tiny_net, None, parse_scheme("w8a8"), reestimate=True)


def test_an_unknown_way_to_correct_biases(tiny_net):
    """What callers without a type checker see."""
    unchecked: Any = inspect.unwrap(dfq)
    with pytest.raises(UsageError, match=r"bias correction 'bothe' is none of .*; nearest: both"):
        unchecked(tiny_net, None, parse_scheme("w8a8"), bias="bothe")


def bottleneck(nets):
    """A linear bottleneck beside a shortcut, its inner activations with a ceiling."""
    b = nets.Builder(InputContract(8, 8))
    x = b.bn("stem.bn", b.conv("stem", "images", 6))
    y = b.unit("expand", x, 12, Relu(6.0), kernel=1)
    y = b.bn("project.bn", b.conv("project", y, 6, kernel=1))
    x = b.unit("head", b.op("sum", Add(), x, y), 8, kernel=1)
    return b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), x), 5))


@pytest.mark.parametrize("scheme", ["w8a4", "w2a4"])
@pytest.mark.parametrize("known", [True, False])
def test_channels_get_one_width_where_outputs_are_nearer_so(known, scheme, nets):
    """They are not where statistics foretell a tenth of what channels do: the rest is cut off.

    Kernels of 2 bits, rounded to nearest, would hide it.
    """
    model = bottleneck(nets)
    images = nets.images(model, 8)
    slots = dict(model.params["expand.bn"])
    wide = jnp.where(jnp.arange(12) < 2, 1.0, 0.03)
    slots |= {"scale": slots["scale"] * wide, "bias": slots["bias"] * wide}
    if not known:
        narrow = jnp.where(jnp.arange(12) % 2, 1.0, 0.01)
        slots |= {"scale": slots["scale"] * jnp.sqrt(narrow), "var": slots["var"] * narrow}
    model = dataclasses.replace(model, params={**model.params, "expand.bn": slots})
    make = partial(dfq, model, images, parse_scheme(scheme), bias="none")
    made = make()
    chosen, again = at_one_width(made, images, make)
    assert (chosen is made) != known
    both = (made, make(level=LEVEL))
    gaps = [activation_gap(m.quantized, made.reference, images) for m in both]
    assert (gaps[1] < gaps[0]) == known
    site = Site("project", 0)
    np.testing.assert_array_equal(
        again().quantized.affines[site].scale, chosen.quantized.affines[site].scale
    )


def test_an_outlier_does_not_widen_coarse_grids_of_channels_on_one_width(nets):
    """Linear bottlenecks end where statistics say, ceilings where the widest channel does."""
    model = bottleneck(nets)
    plain = nets.images(model, 8)
    far = plain.at[0, 2, 3].multiply(40.0)
    found = [dfq(model, x, parse_scheme("w4a4"), level=4.0) for x in (plain, far)]
    known = expected_ranges(found[0].reference, sigmas=SIGNED)
    plan = found[0].quantized.plan
    coarse = {t: sites for t, sites in plan.groups if plan.table[sites[0]].grid.bits == 4}
    signed = [t for t in coarse if t in known and known[t][0] < 0]
    assert signed
    for tensor in signed:
        first, second = (f.quantized.affines[coarse[tensor][0]].scale for f in found)
        np.testing.assert_array_equal(first, second)
        low, high = known[tensor]
        np.testing.assert_allclose(first, (high - low) / 15, rtol=0.1)
    wide = [dfq(model, x, parse_scheme("w4a4")) for x in (plain, far)]
    site = coarse[signed[-1]][0]
    assert wide[1].quantized.affines[site].scale > 1.5 * wide[0].quantized.affines[site].scale
