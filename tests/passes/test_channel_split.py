from math import ceil

import jax
import numpy as np
import pytest

from dfq_jax.errors import UsageError
from dfq_jax.graph.ops import Flatten, MaxPool, PRelu, Relu
from dfq_jax.graph.query import weighted_nodes
from dfq_jax.passes.channel_split import runs, split_channels, unsplit
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.types import InputContract

split = jax.jit(split_channels, static_argnames="ratio")


@pytest.fixture(scope="module")
def mobile(nets):
    """Expand, depthwise, project, twice as it were; all that may lie between two layers."""
    b = nets.Builder(InputContract(8, 8), seed=3)
    x = b.unit("stem", "images", 5)
    x = b.unit("expand", x, 7, Relu(6.0), kernel=1)
    x = b.bn("depthwise.bn", b.conv("depthwise", x, 7, groups=7))
    x = b.op("depthwise.act", PRelu(), x, slope=b.rng.uniform(0.1, 0.3, 7))
    x = b.op("smaller", MaxPool((2, 2), (2, 2)), x)
    x = b.op("one slope", PRelu(), b.conv("project", x, 4, kernel=1), slope=np.array([0.2]))
    x = b.conv("last", x, 3)
    return fold_batch_norm(b.done(b.linear("fc", b.op("flat", Flatten(), x), 5)))


def peaks(model):
    return {
        n.name: float(np.abs(model.params[n.name]["kernel"]).max())
        for n in weighted_nodes(model.graph)
    }


def test_which_layers_can_be_split(mobile, tiny_net):
    assert [run.layer for run in runs(mobile)] == ["expand", "project", "last"]
    assert runs(mobile)[1].repeated == (
        "expand",
        "expand.act",
        "depthwise",
        "depthwise.act",
        "smaller",
    )
    assert unsplit(mobile) == {
        "stem": "it reads the image",
        "depthwise": "it has groups",
        "fc": "channels of flat cannot be repeated",
    }
    found = unsplit(fold_batch_norm(tiny_net))
    assert found["project"] == "relu1 is read or returned elsewhere too"
    assert found["conv2"] == "channels of add cannot be repeated"


@pytest.mark.parametrize(
    ("name", "ratio"),
    [("mobile", 0.01), ("mobile", 1.0), ("tiny", 0.3), ("wide", 0.02), ("excite", 0.3)],
)
def test_the_function_stays_and_weights_shrink(name, ratio, mobile, nets):
    model = mobile if name == "mobile" else fold_batch_norm(getattr(nets, name)())
    found = split(model, ratio)
    x = nets.images(model, 2)
    wanted = np.asarray(nets.run(model, x))
    np.testing.assert_allclose(nets.run(found, x), wanted, atol=2e-6 * np.abs(wanted).max())
    old, new = peaks(model), peaks(found)
    for run in runs(model):
        before, after = (m.params[run.layer]["kernel"].shape[-2] for m in (model, found))
        assert after == before + ceil(ratio * before)
        assert new[run.layer] < old[run.layer]
    for name in unsplit(model):
        assert new[name] == pytest.approx(old[name])


def test_a_depthwise_layer_between_is_repeated_too(mobile):
    found = split(mobile, 0.2)
    assert found.graph["depthwise"].op.groups == 9
    assert found.params["depthwise"]["kernel"].shape == (3, 3, 1, 9)
    assert found.params["depthwise.act"]["slope"].shape == (9,)
    assert found.params["one slope"]["slope"].shape == (1,)
    assert found.params["expand"]["kernel"].shape == (1, 1, 6, 9)


def test_moments_and_their_channels(mobile, nets):
    found = split(mobile, 0.5)
    seen = nets.forward(found, nets.images(mobile, 8))
    truth = nets.forward(mobile, nets.images(mobile, 8))
    for layer in ("stem", "expand", "depthwise"):
        mean, _ = found.moments[layer]
        same = np.isclose(mean[:, None], mobile.moments[layer].mean[None])
        assert same.any(1).all()
        origin = same.argmax(1)
        np.testing.assert_allclose(seen[layer], truth[layer][..., origin], atol=1e-4)
        np.testing.assert_allclose(found.moments[layer].var, mobile.moments[layer].var[origin])


def test_halves_apart_by_half_a_step_keep_the_function(mobile, nets):
    naive, steps = split(mobile, 0.3), {}
    for run in runs(mobile):
        kernel = naive.params[run.layer]["kernel"]
        steps[run.layer] = abs(kernel).max(tuple(range(kernel.ndim - 1)), keepdims=True) / 7
    apart = split(mobile, 0.3, steps=steps)
    x = nets.images(mobile, 2)
    wanted = np.asarray(nets.run(mobile, x))
    np.testing.assert_allclose(nets.run(apart, x), wanted, atol=2e-6 * np.abs(wanted).max())
    gap = np.asarray(apart.params["project"]["kernel"] - naive.params["project"]["kernel"])
    assert gap.any()
    np.testing.assert_allclose(gap.sum(-2), 0, atol=1e-6)


def test_nothing_to_split(mobile):
    assert split_channels(mobile, 0.0) is mobile
    with pytest.raises(UsageError, match=r"ratio=1\.5; it is a share in \[0, 1\], e\.g\. 0\.02"):
        split_channels(mobile, 1.5)
