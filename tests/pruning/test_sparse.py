"""Networks with weights at zero: as many as asked for, less lost than by dropping them alone."""

import numpy as np
import pytest

import dfq_jax as dfq
from dfq_jax.errors import UsageError
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.sparsity import Pattern, surviving
from dfq_jax.pruning.groups import Subject
from dfq_jax.pruning.sparse import parse_pattern, sparsified
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
    return subject, sparsified(subject, "2:4")


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


def test_of_too_many_inputs_the_largest_weights_stay(made, monkeypatch):
    subject, _ = made
    monkeypatch.setattr("dfq_jax.numerics.regression.MOST_INPUTS", 7)
    found = sparsified(subject, "2:4", untouched=("conv3",))
    wanted = dropped(subject.model, ("conv2",)).params["conv2"]["kernel"]
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
