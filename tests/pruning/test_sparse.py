"""Networks with weights at zero: as many as asked for, less lost than by dropping them alone."""

import itertools

import numpy as np
import pytest

import dfq_jax as dfq
from dfq_jax.errors import UsageError
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.regression import refitted_where
from dfq_jax.numerics.sparsity import Pattern, arranged, surviving
from dfq_jax.pruning.groups import Subject
from dfq_jax.pruning.sparse import arranged_channels, parse_pattern, sparsified
from dfq_jax.quantization.node_by_node import on_grids


@pytest.mark.parametrize(
    ("text", "wanted"), [("2:4", Pattern(2, 4)), ("1:4", Pattern(1, 4)), ("75%", Pattern(0.25))]
)
def test_patterns(text, wanted):
    assert parse_pattern(text) == wanted


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "120%", "0%", "0.5", "some"])
def test_patterns_that_are_none(text):
    with pytest.raises(UsageError, match="write 2:4"):
        parse_pattern(text)


def dropped(model, names):
    """The two largest of four weights left, and nothing done about the others."""
    new = {}
    for name in names:
        kernel = np.asarray(model.params[name]["kernel"])
        flat = kernel.reshape(-1, kernel.shape[-1])
        new[name] = {
            "kernel": (flat * surviving(np.abs(flat), Pattern(2, 4))).reshape(kernel.shape)
        }
    return with_params(model, new)


@pytest.fixture(scope="module")
def made(nets):
    subject = Subject(nets.wide(), nets.images(nets.wide(), 16))
    return subject, sparsified(subject, "2:4", arrange=True)


def test_two_of_four_stay_and_make_up_for_the_others(made, nets):
    subject, found = made
    assert found.zeros["conv1"] == 0  # three channels
    inner = [name for name, share in found.zeros.items() if share]
    assert {"conv2", "conv3", "conv4", "conv5"} <= set(inner)
    for name in inner:
        kernel = np.asarray(found.model.params[name]["kernel"])
        groups = kernel.reshape(-1, 4, kernel.shape[-1]) != 0
        assert (groups.sum(1) == 2).all()
    fresh = nets.images(subject.model, 8, seed=3)
    exact = np.asarray(dfq.predict(subject.model, fresh))
    lost = lambda model: np.mean((np.asarray(dfq.predict(model, fresh)) - exact) ** 2)
    assert lost(found.model) < 0.7 * lost(dropped(subject.model, inner))


def test_dropping_alone_needs_no_images(made, nets):
    subject, found = made
    alone = sparsified(Subject(subject.model), "2:4", restore="none")
    assert alone.zeros == found.zeros
    assert not alone.order
    inner = [name for name, share in alone.zeros.items() if share]
    wanted = dropped(subject.model, inner).params
    for name in inner:
        assert np.array_equal(alone.model.params[name]["kernel"], wanted[name]["kernel"])


def survived(scores, order, pattern):
    """The sum of the scores that stay, by definition."""
    groups = scores[order].reshape(-1, pattern.among, scores.shape[1])
    return np.sort(groups, 1)[:, pattern.among - int(pattern.kept) :].sum()


def test_an_order_keeps_as_much_as_any_of_a_few():
    """Two groups of four: all ways to divide them are tried."""
    scores, pattern = np.random.default_rng(0).uniform(size=(8, 6)), Pattern(2, 4)
    every = [np.array(p) for p in itertools.permutations(range(8)) if p[:4] == tuple(sorted(p[:4]))]
    best = max(survived(scores, p, pattern) for p in every)
    assert survived(scores, arranged(scores, pattern), pattern) == pytest.approx(best)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8)])
def test_an_order_never_keeps_less(pattern):
    """Half of the channels have large weights, which lie beside each other."""
    rng = np.random.default_rng(1)
    scores = rng.uniform(size=(32, 20)) * np.repeat([4.0, 1.0], 16)[:, None]
    order = arranged(scores, pattern)
    assert sorted(order) == list(range(32))
    assert survived(scores, order, pattern) > 1.03 * survived(scores, np.arange(32), pattern)


def test_channels_come_into_an_order_in_which_more_stays(made, nets):
    subject, found = made
    moved, order = arranged_channels(subject, Pattern(2, 4), ())
    assert found.order.keys() == order.keys()
    fresh = nets.images(subject.model, 4, seed=3)
    exact, same = (np.asarray(dfq.predict(m, fresh)) for m in (subject.model, moved.model))
    assert np.abs(same - exact).max() <= 1e-5 * np.abs(exact).max()
    kept = lambda model: np.mean(
        [
            np.sum((kernel * surviving(np.abs(kernel), Pattern(2, 4))) ** 2) / np.sum(kernel**2)
            for kernel in (
                np.asarray(model.params[name]["kernel"]).reshape(
                    -1, model.params[name]["kernel"].shape[-1]
                )
                for name in ("conv2", "conv3", "conv4", "conv5")
            )
        ]
    )
    assert kept(moved.model) > kept(subject.model)


def test_of_too_many_inputs_the_largest_weights_stay(made, monkeypatch):
    subject, _ = made
    monkeypatch.setattr("dfq_jax.numerics.regression.MOST_INPUTS", 7)
    found = sparsified(subject, "2:4", untouched=("conv3",), arrange=True)
    moved, _ = arranged_channels(subject, Pattern(2, 4), ("conv3",))
    wanted = dropped(moved.model, ("conv2",)).params["conv2"]["kernel"]
    assert np.array_equal(found.model.params["conv2"]["kernel"], wanted)
    assert found.zeros["conv3"] == 0


def test_zeros_stay_zeros_on_the_grid(made):
    subject, found = made
    images = dfq.Examples((subject.images,), subject.model.inputs)
    integer = on_grids(dfq.quantize(found.model, images).quantized)
    for name in ("conv2", "conv5"):
        codes = np.asarray(integer.params[name]["kernel"])
        was = np.asarray(found.model.params[name]["kernel"]) == 0
        assert (codes[was] == 0).all()


def test_weights_that_stay_are_fitted_together():
    """`refitted_where` against `numpy.linalg.lstsq` on the inputs that stay of each output."""
    rng = np.random.default_rng(2)
    x, y, stays = rng.normal(size=(40, 8)), rng.normal(size=(40, 3)), rng.uniform(size=(8, 3)) < 0.5
    found = refitted_where(stays, x.T @ x, x.T @ y)
    assert (found[~stays] == 0).all()
    for output in range(3):
        there = stays[:, output]
        wanted = np.linalg.lstsq(x[:, there], y[:, output], rcond=None)[0]
        assert np.allclose(found[there, output], wanted)
