"""Networks that lose channels: which, how many, and what makes up for them."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.graph.ops import Add, GlobalAvgPool, GroupNorm, Relu
from dfq_jax.graph.query import output_shapes
from dfq_jax.graph.rewrite import with_params
from dfq_jax.passes.select import masked, select
from dfq_jax.pruning.choose import ALL_BUT_ONE, Floor, by_share, never_empty, share_from
from dfq_jax.pruning.criteria import CRITERIA, channel_moments, reading_columns
from dfq_jax.pruning.groups import Subject, removables
from dfq_jax.pruning.prune import Pruning, prune
from dfq_jax.pruning.restore import RESTORATIONS, restored
from dfq_jax.types import InputContract

NETS = ("tiny", "mixed", "dense", "shuffle", "excite")


@pytest.fixture(scope="module")
def chain(nets):
    """Two blocks with a sum, wide enough to lose channels."""
    b = nets.Builder(InputContract(8, 8))
    x = b.unit("stem", "images", 8)
    for i in range(2):
        y = b.bn(f"out{i}.bn", b.conv(f"out{i}", b.unit(f"in{i}", x, 12), 8))
        x = b.op(f"relu{i}", Relu(), b.op(f"sum{i}", Add(), y, x))
    return b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), x), 5))


@pytest.fixture(scope="module")
def seen(chain, nets):
    """The network with images that look like those whose statistics it has."""
    return Subject(chain, nets.images(chain, 32))


# which may go


def test_what_sums_carry_stays_unless_asked_for(seen):
    inner = removables(seen)
    assert [group.makers for group in inner.groups] == [("in0",), ("in1",)]
    assert "a sum carries" in inner.left["stem"]
    assert inner.left["fc"] == "the network returns its channels"
    every = removables(seen, channels="all")
    assert {group.makers for group in every.groups} == {
        ("stem", "out0", "out1"),
        ("in0",),
        ("in1",),
    }
    alike = {group.makers: group.structure for group in every.groups}
    assert alike["in0",] == alike["in1",] != alike["stem", "out0", "out1"]


def test_untouched_layers_keep_all(seen):
    found = removables(seen, untouched=("in1",))
    assert [group.makers for group in found.groups] == [("in0",)]
    assert found.left["in1"] == "the pattern in1 says so"
    with pytest.raises(UsageError, match=r"'ni\*' matches no layer; layers are called stem, in0"):
        removables(seen, untouched=("ni*",))


def test_a_network_of_which_nothing_may_go_says_why(nets):
    b = nets.Builder(InputContract(6, 6))
    x = b.norm("norm", b.conv("a", "images", 6, bias=True), GroupNorm(1))
    model = b.done(b.conv("b", x, 3))
    with pytest.raises(
        UnsupportedModelError, match=r"a: what follows mixes its channels.*b: the n"
    ):
        prune(Subject(model), Pruning(0.3, restore="none"))


# how many


@pytest.mark.parametrize(
    ("text", "share"), [("30%", 0.3), ("0.3", 0.3), (0.5, 0.5), ("12.5 %", 0.125)]
)
def test_shares(text, share):
    assert share_from(text) == share


@pytest.mark.parametrize("text", ["0%", "100%", "1.5", "-3%", "some", "0", 1.0, "nan"])
def test_shares_that_are_none(text):
    with pytest.raises(UsageError, match=r"is no share of channels to remove: write 30% or 0\.3"):
        share_from(text)


def test_a_number_that_was_meant_in_percent():
    with pytest.raises(UsageError, match="say 30%"):
        share_from("30")


def counts(seen, share, floor=ALL_BUT_ONE, scores=None, **among: Any):
    groups = removables(seen, channels="all").groups
    scores = np.arange(len(seen.coupled), dtype=float) if scores is None else scores
    chosen = by_share(groups, scores, share, floor=floor, **among)
    return [int(chosen.kept[list(g.sets)].sum()) for g in groups], chosen


def test_every_layer_keeps_its_share_and_the_floor(seen):
    assert counts(seen, 0.25)[0] == [6, 9, 9]
    assert counts(seen, 0.3, Floor(round_to=4))[0] == [4, 8, 8]
    assert counts(seen, 0.3, Floor(round_to=8))[0] == [8, 8, 8]
    assert counts(seen, 0.3, Floor(round_to=16))[0] == [8, 12, 12]
    found, chosen = counts(seen, 0.9, Floor(least=4))
    assert found == [4, 4, 4]
    assert len(chosen.notes) == 3
    assert chosen.notes[0].startswith("stem and 2 more keeps 4 of 8 channels, more than asked for")
    assert counts(seen, 0.999)[0] == [1, 1, 1]
    for name in ("least", "round_to"):
        with pytest.raises(UsageError, match=f"{name} is a number of channels, 1 or more; got 0"):
            prune(seen, Pruning(0.3, floor=Floor(**{name: 0})))


def test_the_best_stay(seen):
    _, chosen = counts(seen, 0.25)
    for group in removables(seen, channels="all").groups:
        assert chosen.kept[list(group.sets)].tolist() == [False] * (len(group.sets) // 4) + [
            True
        ] * (len(group.sets) - len(group.sets) // 4)


def test_no_part_of_a_tensor_is_emptied(nets):
    """Half of what a layer makes goes one way, half another."""
    subject = Subject(nets.shuffle())
    scores = np.arange(len(subject.coupled), dtype=float)
    chosen = by_share(removables(subject, channels="all").groups, scores, 0.6)
    with pytest.raises(UsageError, match="nothing would be left of"):
        select(subject.model, subject.coupled, chosen.kept)
    found = never_empty(subject.coupled, scores, chosen)
    assert any("one channel of left" in note for note in found.notes)
    output_shapes(select(subject.model, subject.coupled, found.kept))


def test_groups_compete_in_units_of_their_means(seen):
    groups = removables(seen, channels="all").groups
    scores = np.ones(len(seen.coupled))
    scores[list(groups[1].sets)[:10]] = 1e-3  # ten of in0 are worth nothing
    scores[list(groups[0].sets)] = 1e-6  # a small scale of a whole group says nothing
    found, _ = counts(seen, 8 / 32, among="global", scores=scores)
    assert found == [8, 4, 12]
    found, _ = counts(seen, 8 / 32, among="alike", scores=scores)
    assert found == [6, 6, 12]
    assert min(counts(seen, 0.95, among="global", scores=scores)[0]) >= 1


# what they are worth


@pytest.mark.parametrize("name", CRITERIA)
def test_a_channel_that_does_nothing_goes_first(name, seen, chain):
    """Its filter, its norm's gain and shift, and the columns that read it are zero."""
    coupled = seen.coupled
    (idle,) = [g.sets[3] for g in removables(seen).groups if g.makers == ("in1",)]
    kept = np.arange(len(coupled)) != idle
    subject = Subject(masked(chain, coupled, kept), seen.images)
    scores = CRITERIA[name].score(subject)
    assert scores.shape == (len(coupled),)
    assert np.isfinite(scores).all()
    (sets,) = [list(g.sets) for g in removables(subject).groups if g.makers == ("in1",)]
    if name == "median":
        return  # zero lies near all
    assert scores[sets].argmin() == 3


def test_gradients_are_those_of_a_factor_on_a_channel(seen, chain, nets):
    """How the loss of each image moves as a channel shrinks: by size, and by its square."""
    (sets,) = [g.sets for g in removables(seen).groups if g.makers == ("in0",)]

    def losses(factor, channel):
        gains = np.ones(12)
        gains[channel] = factor
        kernel = chain.params["out0"]["kernel"] * gains[:, None].astype(np.float32)
        model = with_params(chain, {"out0": {"kernel": kernel}})
        scores = nets.forward(model, seen.images)["fc"]
        top = scores.max(1)
        return np.log(np.exp(scores - top[:, None]).sum(1))

    slopes = np.stack([(losses(1.01, j) - losses(0.99, j)) / 0.02 for j in range(4)])
    size = np.abs(slopes).mean(1)
    assert (np.abs(slopes.mean(1)) < 0.8 * size).any()  # signs differ
    first = list(sets[:4])
    close = lambda found, wanted: np.allclose(found[first], wanted, rtol=0.02, atol=1e-5)
    assert close(CRITERIA["taylor"].score(seen), size)
    assert close(CRITERIA["fisher"].score(seen), (slopes**2).mean(1))


def test_the_group_score_is_that_of_its_library(seen, chain):
    """All that a channel touches, squared and summed, by the number of members; no root."""
    (sets,) = [g.sets for g in removables(seen).groups if g.makers == ("in0",)]
    square = lambda name, slot: np.asarray(chain.params[name][slot], np.float64) ** 2
    made, read = square("in0", "kernel").sum((0, 1, 2)), square("out0", "kernel").sum((0, 1, 3))
    wanted = (made + square("in0.bn", "scale") + read) / 3
    assert np.allclose(CRITERIA["group"].score(seen)[list(sets)], wanted, rtol=1e-12)


def test_looking_needs_images(chain):
    with pytest.raises(UsageError, match="looks at images"):
        prune(Subject(chain), Pruning(0.3, criterion="fisher", restore="none"))
    with pytest.raises(UsageError, match="looks at images"):
        prune(Subject(chain), Pruning(0.3, restore="ridge"))


# what makes up for them


@pytest.mark.parametrize("restore", ["udfc", "ridge"])
@pytest.mark.parametrize("name", NETS)
def test_cut_is_what_zeros_compute(name, restore, nets):
    """In every structure, whatever was restored: `select` of it computes what it does."""
    model = getattr(nets, name)()
    subject = Subject(model, nets.images(model, 8))
    groups, scores = removables(subject, channels="all").groups, CRITERIA["energy"].score(subject)
    chosen = never_empty(subject.coupled, scores, by_share(groups, scores, 0.3))
    whole = restored(subject, chosen.kept, RESTORATIONS[restore])
    small = select(whole, subject.coupled, chosen.kept)
    images, out = nets.images(model, 2, seed=1), model.graph.outputs[0]
    wanted, found = nets.forward(whole, images)[out], nets.forward(small, images)[out]
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert np.isfinite(found).all()
    output_shapes(small)


def error(model, original, images, nets):
    wanted, found = (nets.forward(m, images)["fc"] for m in (original, model))
    return float(np.mean((found - wanted) ** 2) / np.mean((wanted - wanted.mean(0)) ** 2))


def test_layers_fitted_anew_lose_least(seen, chain, nets):
    fresh = nets.images(chain, 64, seed=5)
    lost = {
        name: error(prune(seen, Pruning(0.3, restore=name)).model, chain, fresh, nets)
        for name in ("none", "means", "udfc", "ridge")
    }
    assert lost["ridge"] < lost["udfc"] < lost["means"] < lost["none"]
    assert lost["ridge"] < 0.3 * lost["none"]


def doubled(chain):
    """The chain, its filter 3 of `in0` made twice filter 2, with the same norm."""
    kernel = np.array(chain.params["in0"]["kernel"])
    norm = {slot: np.array(v) for slot, v in chain.params["in0.bn"].items()}
    kernel[..., 3] = 2 * kernel[..., 2]
    norm["mean"][3], norm["var"][3] = 2 * norm["mean"][2], norm["var"][2]
    norm["scale"][3], norm["bias"][3] = norm["scale"][2], norm["bias"][2]
    bias = (norm["bias"][2] - 0) * 2 - norm["bias"][2]
    norm["bias"][3] += bias
    slots = {"in0": {"kernel": jax.device_put(kernel)}}
    return with_params(chain, slots | {"in0.bn": {k: jax.device_put(v) for k, v in norm.items()}})


@pytest.mark.parametrize("restore", ["merging", "ridge"])
def test_what_another_says_twice_as_loud_is_not_missed(restore, chain, nets):
    """relu(2 z) = 2 relu(z): nothing is lost, by weights alone too."""
    model = doubled(chain)
    subject = Subject(model, nets.images(model, 64))
    (sets,) = [g.sets for g in removables(subject).groups if g.makers == ("in0",)]
    kept = np.ones(len(subject.coupled), bool)
    kept[sets[3]] = False
    how = RESTORATIONS[restore]._replace(norms=False)
    how = how if how.damping is None else how._replace(damping=1e-7)
    whole = restored(subject, kept, how)
    limit = 1e-8 if restore == "merging" else 1e-3
    assert error(whole, model, nets.images(model, 8, seed=2), nets) < limit
    zeros = masked(model, subject.coupled, kept)
    assert error(zeros, model, nets.images(model, 8, seed=2), nets) > 1e-3


@pytest.mark.parametrize("groups", [1, 2])
def test_means_that_a_transposed_convolution_misses(groups, nets):
    """On an image that is the same everywhere; layers in groups are left alone."""
    b = nets.Builder(InputContract(6, 6))
    x = b.unit("in", "images", 4)
    model = b.done(b.upscale("up", x, 6, 4, 2, groups, padding=nets.SAME))
    subject = Subject(model)
    kept = np.ones(len(subject.coupled), bool)
    kept[subject.coupled.tensors[x][-1][1] - 1] = False
    whole = restored(subject, kept, RESTORATIONS["means"])
    zeros = masked(model, subject.coupled, kept)
    moved = np.asarray(whole.params["up"]["bias"] - zeros.params["up"]["bias"])
    if groups > 1:
        np.testing.assert_array_equal(moved, 0)
        return
    mean = np.asarray(subject.expected[x].mean, np.float64) * [0, 1, 0, 0]
    kernel = np.asarray(model.params["up"]["kernel"], np.float64)
    flat = np.broadcast_to(mean, (1, 6, 6, 4))
    wanted = nets.conv_transposed(flat, model.graph["up"].op, kernel)[:, 2:-2, 2:-2]
    np.testing.assert_allclose(moved, wanted.mean((0, 1, 2)), atol=1e-5)
    assert np.abs(moved).max() > 1e-3


def test_norms_follow_what_images_show(seen, chain, nets):
    """In units of the original's: what does not match the recorded statistics does no harm."""
    made = prune(seen, Pruning(0.5, restore="ridge")).model
    before, after = (nets.forward(m, seen.images) for m in (chain, made))
    for name in ("out0", "out1"):
        for wanted, found, old, new in (
            (before[name].mean((0, 1, 2)), after[name].mean((0, 1, 2)), *means(chain, made, name)),
        ):
            assert np.allclose(found - wanted, new - old, atol=2e-3)


def means(chain, made, name):
    return (np.asarray(m.params[f"{name}.bn"]["mean"]) for m in (chain, made))


def test_without_a_loss_nothing_changes(seen, chain):
    """Images that show no difference leave every number as it is."""
    kept = np.ones(len(seen.coupled), bool)
    whole = restored(seen, kept, RESTORATIONS["ridge"])
    for name, slots in chain.params.items():
        for slot, value in slots.items():
            assert np.array_equal(whole.params[name][slot], value), (name, slot)


def test_layers_with_too_many_inputs_are_not_solved(seen, chain, nets, monkeypatch):
    """Their biases and norms still follow; their channels are judged by their own energy."""
    names = tuple(sorted({node.inputs[0] for node, _, _ in reading_columns(seen)}))
    whole = channel_moments(seen.folded, names, seen.images)
    monkeypatch.setattr("dfq_jax.numerics.regression.MOST_INPUTS", 7)
    wide = channel_moments(seen.folded, names, seen.images)
    for name in names:
        assert np.allclose(wide[name].spread, np.diag(whole[name].spread), rtol=1e-6)
    how = Pruning(0.3, criterion="reconstruction")
    made, dropped = (prune(seen, how._replace(restore=x)).model for x in ("ridge", "none"))
    kernels = lambda model: np.asarray(model.params["out0"]["kernel"])
    assert np.array_equal(kernels(made), kernels(dropped))
    fresh = nets.images(chain, 32, seed=5)
    assert error(made, chain, fresh, nets) < 0.8 * error(dropped, chain, fresh, nets)


# what is told


def test_shapes_are_told_layer_by_layer(seen, chain):
    made = prune(seen, Pruning(0.25, restore="none"))
    told = {x.name: x for x in made.layers}
    assert str(told["in0"]) == "Conv2d(12 -> 9)"
    assert str(told["fc"]) == "Linear(5)"
    assert (told["out0"].inputs, told["out0"].outputs) == ((12, 9), (8, 8))
    assert told["out0"].macs == (64 * 9 * 12 * 8, 64 * 9 * 9 * 8)
    assert made.macs[1] < made.macs[0]
    assert made.to_dict()["layers"][1]["outputs"] == {"before": 12, "after": 9}
    assert dataclasses.fields(made.model)


@pytest.mark.parametrize(
    ("field", "told"),
    [("criterion", "l3"), ("restore", "rigde"), ("among", "all"), ("channels", "outer")],
)
def test_names_that_are_none(field, told, seen):
    with pytest.raises(UsageError, match=f"'{told}' is none of"):
        prune(seen, Pruning(0.3, **{field: told}))
