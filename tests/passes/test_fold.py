import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.graph import Graph
from dfq_jax.graph.ops import BatchNorm, Relu
from dfq_jax.graph.query import batch_norms
from dfq_jax.graph.rewrite import drop_params
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.types import InputContract

CONTRACT = InputContract(5, 5)


def same_function(nets, before, after):
    x = nets.images(before, 4)
    wanted = np.asarray(nets.run(before, x))
    np.testing.assert_allclose(nets.run(after, x), wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_whole_network_keeps_its_function(tiny_net, nets):
    folded = fold_batch_norm(tiny_net)
    assert not batch_norms(folded.graph)
    assert set(folded.params) == set(folded.moments) | {"fc"}
    assert set(folded.moments) == {"conv1", "depthwise", "project", "conv2"}
    assert folded.graph["relu1"].inputs == ("conv1",)
    assert folded.contract == tiny_net.contract
    same_function(nets, tiny_net, folded)
    assert "bias" not in tiny_net.params["conv1"]  # the original is untouched


def test_arrays_are_folded_without_a_program_and_as_in_one(tiny_net, caplog):
    with jax.log_compiles():
        found = fold_batch_norm(tiny_net)
    assert not [r for r in caplog.records if "compilation" in r.getMessage()]
    for got, wanted in zip(
        jax.tree.leaves(found), jax.tree.leaves(jax.jit(fold_batch_norm)(tiny_net)), strict=True
    ):
        assert isinstance(got, jax.Array)
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("linear", [True, False])
def test_formula(bias, affine, linear, nets):
    b = nets.Builder(CONTRACT, seed=5)
    layer = b.linear("layer", "images", 4, bias) if linear else b.conv("layer", "images", 4)
    if bias and not linear:
        b.params["layer"]["bias"] = b.rng.normal(size=4)
    model = b.done(b.op("relu", Relu(), b.bn("bn", layer, affine)))
    folded = fold_batch_norm(model)
    old, bn = b.params["layer"], b.params["bn"]
    gamma, beta = bn.get("scale", np.ones(4)), bn.get("bias", np.zeros(4))
    assert not affine or gamma[0] < 0
    for o in range(4):
        gain = gamma[o] / np.sqrt(bn["var"][o] + 1e-5)
        shift = beta[o] + gain * (old.get("bias", np.zeros(4))[o] - bn["mean"][o])
        new = folded.params["layer"]
        np.testing.assert_allclose(new["kernel"][..., o], gain * old["kernel"][..., o], rtol=1e-5)
        assert float(new["bias"][o]) == pytest.approx(shift, abs=1e-5)
        mean, var = folded.moments["layer"]
        assert float(mean[o]) == pytest.approx(beta[o], abs=1e-6)
        assert float(var[o]) == pytest.approx(gain**2 * bn["var"][o], rel=1e-5)
    same_function(nets, model, folded)


def test_moments_are_those_of_the_outputs(nets):
    """On the images whose statistics the batch norms recorded."""
    b = nets.Builder(CONTRACT, seed=1)
    x = b.op("relu", Relu(), b.bn("bn1", b.conv("first", "images", 4)))
    b.params["bn1"]["var"] = b.seen["first"].var((0, 1, 2))
    folded = fold_batch_norm(b.done(x))
    tensor = nets.forward(folded, b.seen["images"])["first"]
    np.testing.assert_allclose(folded.moments["first"].mean, tensor.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(folded.moments["first"].var, tensor.var((0, 1, 2)), rtol=1e-4)


def test_other_batch_norms_stay(mixed_net, nets):
    assert fold_batch_norm(mixed_net).graph == mixed_net.graph  # its norm follows a ReLU
    b = nets.Builder(CONTRACT)
    shared = b.conv("shared", "images", 4)
    branch = b.bn("one", shared)
    twice = b.bn("again", b.bn("two", b.conv("plain", b.op("relu", Relu(), shared), 4)))
    returned = b.bn("three", b.conv("returned", branch, 4))
    model = b.done(twice, returned, "returned")
    folded = fold_batch_norm(model)
    assert [n.name for n in batch_norms(folded.graph)] == ["one", "again", "three"]
    assert folded.graph["again"].inputs == ("plain",)
    assert set(folded.moments) == {"plain", "one", "again", "three"}
    slots = b.params["one"]
    var = slots["scale"] ** 2 * slots["var"] / (slots["var"] + 1e-5)
    np.testing.assert_allclose(folded.moments["one"].mean, slots["bias"], rtol=1e-6)
    np.testing.assert_allclose(folded.moments["one"].var, var, rtol=1e-5)
    same_function(nets, model, folded)


def test_a_folded_norm_may_be_the_output(nets):
    b = nets.Builder(CONTRACT)
    folded = fold_batch_norm(b.done(b.bn("bn", b.conv("conv", "images", 3))))
    assert folded.graph.outputs == ("conv",)
    assert isinstance(folded.graph, Graph)
    assert drop_params(folded.params, ["conv"]) == {}


def test_epsilon_is_that_of_the_norm(nets):
    b = nets.Builder(CONTRACT)
    x = b.conv("conv", "images", 2)
    slots = {"mean": np.zeros(2), "var": np.array([1e-4, 1.0])}
    model = b.done(b.op("bn", BatchNorm(0.1), x, **slots))
    folded = fold_batch_norm(model)
    same_function(nets, model, folded)
    np.testing.assert_allclose(folded.moments["conv"].var, [1e-4 / 0.1001, 1 / 1.1], rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(groups, nets):
    b = nets.Builder(CONTRACT, seed=7)
    x = b.upscale("up", b.conv("conv", "images", 4), 6, kernel=3, groups=groups, extra=(1, 0))
    model = b.done(b.op("relu", Relu(), b.bn("bn", x)))
    folded = fold_batch_norm(model)
    assert [n.name for n in folded.graph.nodes] == ["conv", "up", "relu"]
    assert set(folded.moments) == {"up"}
    same_function(nets, model, folded)


MODERN = ("dense", "inception", "shuffle", "excite", "vit", "convnext", "unet", "two_heads")


@pytest.mark.parametrize("name", MODERN)
def test_modern_networks_keep_their_function(name, nets):
    model = getattr(nets, name)()
    folded = fold_batch_norm(model)
    same_function(nets, model, folded)
    left = [n.name for n in batch_norms(folded.graph)]
    assert left == ([f"norm{i}" for i in range(5)] if name == "dense" else [])


def test_distrusted_statistics_leave_no_moments(tiny_net, mixed_net):
    folded = fold_batch_norm(tiny_net, distrusted=frozenset({"bn2", "bn4"}))
    assert set(folded.moments) == {"conv1", "project"}
    assert folded.graph == fold_batch_norm(tiny_net).graph
    assert fold_batch_norm(mixed_net, distrusted=frozenset({"lone"})).moments == {}


def test_an_infinite_variance_is_an_output_that_never_moves(nets):
    b = nets.Builder(CONTRACT)
    model = b.done(b.bn("bn", b.conv("conv", "images", 2)))
    params = {**model.params, "bn": {**model.params["bn"], "var": jnp.array([jnp.inf, 1.0])}}
    folded = fold_batch_norm(type(model)(model.graph, params, model.inputs))
    mean, var = folded.moments["conv"]
    assert np.isfinite(mean).all()
    assert float(var[0]) == 0
    assert float(var[1]) > 0
