import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.channels import groups_of
from dfq_jax.graph.ops import (
    Activation,
    Add,
    Clip,
    Flatten,
    GlobalAvgPool,
    LeakyRelu,
    PRelu,
    Relu,
)
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.affine import Grid, fake_quantize
from dfq_jax.numerics.channels import input_ranges, output_ranges
from dfq_jax.numerics.ranges import MinMax, weight_affine
from dfq_jax.passes.equalize import (
    capped_between,
    equalizable,
    equalize_cross_layer,
    uncapped,
    with_tensors_divided,
)
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.types import InputContract

CONTRACT = InputContract(6, 6)
SHUFFLED = (("enter", "depthwise"), ("depthwise", "leave"))


def names(model):
    return [(*g.producers, *g.consumers) for g in equalizable(model, "pairs")]


def ranges(kernel, axis):
    kernel = np.asarray(kernel)
    axis %= kernel.ndim
    return np.abs(kernel).max(tuple(i for i in range(kernel.ndim) if i != axis))


@pytest.fixture(scope="module")
def chain(nets):
    """Folded pointwise, depthwise, pointwise, linear; channels of very different sizes."""
    b = nets.Builder(CONTRACT, seed=2)
    x = b.op("relu1", Relu(), b.bn("bn1", b.conv("expand", "images", 5, kernel=1)))
    x = b.op("relu2", Relu(), b.bn("bn2", b.conv("depthwise", x, 5, groups=5)))
    x = b.op("relu3", Relu(), b.bn("bn3", b.conv("project", x, 4, kernel=1)))
    model = fold_batch_norm(b.done(b.linear("fc", x, 3)))
    return skewed(model, "expand", "depthwise", 10 ** b.rng.uniform(-1.5, 1.5, 5))


def skewed(model, first, second, factors):
    """The same function with badly balanced channels between two layers."""
    a, c = model.params[first], model.params[second]
    factors = jnp.asarray(factors, jnp.float32)
    moments = model.moments[first]
    moved = type(moments)(moments.mean * factors, moments.var * factors**2)
    model = type(model)(model.graph, model.params, model.inputs, {**model.moments, first: moved})
    return with_params(
        model,
        {
            first: {"kernel": a["kernel"] * factors, "bias": a["bias"] * factors},
            second: {"kernel": c["kernel"] / factors},
        },
    )


def test_chain_keeps_its_function_and_balances(chain, nets):
    balanced = equalize_cross_layer(chain, sweeps=50, tolerance=1e-4)
    x = nets.images(chain, 4)
    wanted = np.asarray(nets.run(chain, x))
    np.testing.assert_allclose(nets.run(balanced, x), wanted, atol=1e-5 * np.abs(wanted).max())
    kernels = {k: v["kernel"] for k, v in balanced.params.items()}
    first, middle = ranges(kernels["expand"], -1), ranges(kernels["depthwise"], -1)
    np.testing.assert_allclose(first, middle, rtol=1e-3)
    np.testing.assert_allclose(middle, ranges(kernels["project"], -2), rtol=1e-3)
    np.testing.assert_allclose(ranges(kernels["project"], -1), ranges(kernels["fc"], -2), rtol=1e-3)


def test_a_triple_meets_at_the_geometric_mean(nets):
    """With the last layer's outputs untied, all three ranges of a channel become (r1 r2 r3)^1/3."""
    b = nets.Builder(CONTRACT, seed=3)
    x = b.op("relu1", Relu(), b.conv("a", "images", 4, kernel=1))
    model = b.done(b.conv("c", b.conv("b", x, 4, groups=4), 3, kernel=1))
    old = {k: np.asarray(v["kernel"]) for k, v in model.params.items()}
    mean = np.cbrt(ranges(old["a"], -1) * ranges(old["b"], -1) * ranges(old["c"], -2))
    new = equalize_cross_layer(model, sweeps=60, tolerance=1e-6).params
    for name, axis in [("a", -1), ("b", -1), ("c", -2)]:
        np.testing.assert_allclose(ranges(new[name]["kernel"], axis), mean, rtol=1e-3)


def test_sweeps_and_tolerance_bound_the_work(chain):
    once = equalize_cross_layer(chain, sweeps=1)
    more = equalize_cross_layer(chain, sweeps=2, tolerance=1e-9)
    stopped = equalize_cross_layer(chain, sweeps=2, tolerance=100.0)
    kernel = lambda m: np.asarray(m.params["depthwise"]["kernel"])
    assert not np.allclose(kernel(once), kernel(more), rtol=1e-3)
    np.testing.assert_array_equal(kernel(once), kernel(stopped))


def test_moments_follow_their_channels(chain, nets):
    balanced = equalize_cross_layer(chain)
    x = nets.images(chain, 8)
    before, after = nets.forward(chain, x), nets.forward(balanced, x)
    for layer in ("expand", "depthwise", "project"):
        ratio = after[layer].std((0, 1, 2)) / before[layer].std((0, 1, 2))
        old, new = chain.moments[layer], balanced.moments[layer]
        np.testing.assert_allclose(new.mean, old.mean * ratio, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(new.var, old.var * ratio**2, rtol=1e-3)
    assert np.ptp(after["expand"].std((0, 1, 2)) / before["expand"].std((0, 1, 2))) > 0.1


def per_tensor(model):
    """All kernels rounded to 8 bits with one scale each."""
    grid = Grid(8)
    snap = lambda w: fake_quantize(w, weight_affine(w, grid, MinMax()), grid)
    return with_params(model, {k: {"kernel": snap(v["kernel"])} for k, v in model.params.items()})


def test_equalization_rescues_per_tensor_quantization(chain, nets):
    x = nets.images(chain, 8)
    truth = np.asarray(nets.run(chain, x))
    error = lambda m: np.abs(np.asarray(nets.run(per_tensor(m), x)) - truth).mean()
    assert error(equalize_cross_layer(chain)) < error(chain) / 4


def test_which_pairs_qualify(tiny_net, chain, nets):
    assert names(chain) == [("expand", "depthwise"), ("depthwise", "project"), ("project", "fc")]
    assert names(tiny_net) == []  # batch norms in between
    assert names(fold_batch_norm(tiny_net)) == []  # ReLU6, a branch, an addition, a mean


def test_what_stands_in_the_way(nets):
    b = nets.Builder(CONTRACT)
    x = b.conv("a", "images", 4)
    x = b.conv("grouped", b.op("r1", Relu(), x), 4, groups=2)  # not depthwise: no pair
    x = b.conv("wide", b.op("r2", Relu(), x), 4, kernel=1)  # grouped -> dense: pair
    x = b.conv("doubled", x, 8, groups=4)  # two outputs an input: no pair
    x = b.conv("direct", x, 3)  # no activation at all: pair
    x = b.linear("fc1", b.op("flat", Flatten(), b.op("r3", Relu(), x)), 5)  # flattened: no pair
    x = b.linear("fc2", b.op("r5", Relu(), b.op("r4", Relu(), x)), 5)  # two activations: no pair
    x = b.linear("fc3", b.op("r6", Relu(), x), 2)  # pair
    model = b.done(x)
    assert names(model) == [("grouped", "wide"), ("doubled", "direct"), ("fc2", "fc3")]
    returned = b.done("fc2", x)
    assert names(returned) == [("grouped", "wide"), ("doubled", "direct")]
    balanced = equalize_cross_layer(model)
    x = nets.images(model, 2)
    np.testing.assert_allclose(nets.run(balanced, x), nets.run(model, x), rtol=1e-4, atol=1e-5)
    untouched = {"a", "fc1"}
    for name, slots in model.params.items():
        same = np.array_equal(slots["kernel"], balanced.params[name]["kernel"])
        assert same == (name in untouched), name


def test_what_else_commutes_with_a_positive_factor(nets):
    b = nets.Builder(CONTRACT, seed=4)
    x = b.op("leak", LeakyRelu(0.2), b.conv("a", "images", 4))
    x = b.op("prelu", PRelu(), b.conv("b", x, 4), slope=b.rng.uniform(-0.3, 0.3, 4))
    x = b.upscale("up", x, 6, kernel=3)  # dense and transposed: pair on both sides
    x = b.upscale("alone", b.op("r", Relu(), x), 6, groups=6)  # depthwise and transposed: pair
    x = b.upscale("grouped", x, 4, groups=2, kernel=1, stride=1)  # no pair
    x = b.conv("c", b.op("silu", Activation("silu"), x), 4)  # no pair
    x = b.conv("d", b.op("clip", Clip(0.0, 6.0), x), 4)  # no pair
    model = b.done(x)
    assert names(model) == [("a", "b"), ("b", "up"), ("up", "alone")]
    balanced = equalize_cross_layer(model)
    x = nets.images(model, 2)
    wanted = np.asarray(nets.run(model, x))
    np.testing.assert_allclose(nets.run(balanced, x), wanted, atol=1e-5 * np.abs(wanted).max())
    kernels = {k: v["kernel"] for k, v in balanced.params.items() if "kernel" in v}
    for first, second, axis in [("a", "b", -2), ("b", "up", -2), ("up", "alone", -1)]:
        np.testing.assert_allclose(
            ranges(kernels[first], -1), ranges(kernels[second], axis), rtol=2e-2
        )


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("dense", [(f"squeeze{i}", f"grow{i}") for i in range(3)]),
        ("inception", [("before", "three")]),
        ("shuffle", [(f"{a}{i}", f"{b}{i}") for i in range(2) for a, b in SHUFFLED]),
        ("excite", [("reduce0", "restore0"), ("reduce1", "restore1")]),
        ("vit", []),
        ("convnext", []),
        ("unet", [("low", "up1"), ("up3", "scores")]),
        ("two_heads", [("stem", "conv")]),
    ],
)
def test_pairs_of_modern_networks(name, pairs, nets):
    model = fold_batch_norm(getattr(nets, name)())
    found = names(model)
    assert found == pairs
    balanced = equalize_cross_layer(model)
    x = nets.images(model, 2)
    wanted = np.asarray(nets.run(model, x))
    np.testing.assert_allclose(nets.run(balanced, x), wanted, atol=2e-5 * np.abs(wanted).max())


def test_untouched_networks_come_back_unchanged(tiny_net):
    folded = fold_batch_norm(tiny_net)
    again = equalize_cross_layer(folded)
    assert again.params == folded.params


RESIDUAL = ("tiny", "wide", "inverted", "loop")


def loop(nets):
    """A layer that reads what it adds to: it makes and reads the same channels."""
    b = nets.Builder(CONTRACT, seed=6)
    x = b.unit("a", "images", 5)
    x = b.op("add", Add(), x, b.bn("b.bn", b.conv("b", x, 5)))
    return b.done(b.conv("c", b.op("relu", Relu(), x), 3))


def inverted(nets):
    """Two inverted residual blocks as in EfficientNet-lite, a stem before and a head behind."""
    b = nets.Builder(CONTRACT, seed=5)
    x = b.bn("stem.bn", b.conv("stem", "images", 4))
    for i in range(2):
        y = b.unit(f"expand{i}", x, 8, Relu(6.0), kernel=1)
        y = b.unit(f"depthwise{i}", y, 8, Relu(6.0), groups=8)
        y = b.bn(f"project{i}.bn", b.conv(f"project{i}", y, 4, kernel=1))
        x = b.op(f"add{i}", Add(), x, y)
    x = b.unit("head", x, 6, Clip(0.0, 6.0), kernel=1)
    return b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), x), 5))


def folded(nets, name):
    here = {"inverted": inverted, "loop": loop}
    return fold_batch_norm(here[name](nets) if name in here else getattr(nets, name)())


@pytest.mark.parametrize("name", RESIDUAL)
def test_groups_keep_the_function_and_meet_in_the_middle(name, nets):
    """All that makes a tensor, at its widest, has the range of all that reads it, at its widest."""
    model = folded(nets, name)
    balanced = equalize_cross_layer(model, reach="groups", sweeps=100, tolerance=1e-4)
    x = nets.images(model, 4)
    wanted = np.asarray(nets.run(model, x))
    np.testing.assert_allclose(nets.run(balanced, x), wanted, atol=1e-5 * np.abs(wanted).max())
    kernels = {k: v["kernel"] for k, v in balanced.params.items()}
    groups = equalizable(model, "groups")
    assert any(len(group.producers) > 1 and len(group.consumers) > 1 for group in groups)
    for group in groups:
        made = np.max([output_ranges(kernels[n]) for n in group.producers], 0)
        count = {n: groups_of(model.graph[n].op) for n in group.consumers}
        read = np.max([input_ranges(kernels[n], c) for n, c in count.items()], 0)
        np.testing.assert_allclose(made, read, rtol=1e-3)


@pytest.mark.parametrize("name", ["dense", "inception", "shuffle", "excite", "unet", "two_heads"])
def test_groups_keep_the_function_of_modern_networks(name, nets):
    model = folded(nets, name)
    balanced = equalize_cross_layer(model, reach="groups")
    name = equalizable(model, "groups")[0].producers[0]
    old, new = (np.asarray(m.params[name]["kernel"]) for m in (model, balanced))
    assert not np.array_equal(old, new)
    x = nets.images(model, 2)
    wanted = np.asarray(nets.run(model, x))
    np.testing.assert_allclose(nets.run(balanced, x), wanted, atol=2e-5 * np.abs(wanted).max())


def test_moments_of_groups_follow(nets):
    model = folded(nets, "inverted")
    balanced = equalize_cross_layer(model, reach="groups")
    x = nets.images(model, 8)
    before, after = nets.forward(model, x), nets.forward(balanced, x)
    for layer in ("stem", "project0", "project1"):
        ratio = after[layer].std((0, 1, 2)) / before[layer].std((0, 1, 2))
        old, new = model.moments[layer], balanced.moments[layer]
        np.testing.assert_allclose(new.mean, old.mean * ratio, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(new.var, old.var * ratio**2, rtol=1e-3)
        assert np.ptp(ratio) > 0.1
    np.testing.assert_array_equal(balanced.moments["head"].mean, model.moments["head"].mean)


def test_groups_rescue_per_tensor_quantization_of_a_residual_network(nets):
    """A stream whose channels differ a hundredfold: pairs cannot reach it, groups can."""
    model = folded(nets, "wide")
    group = equalizable(model, "groups")[0]
    factors = jnp.asarray(10 ** np.random.default_rng(0).uniform(-1, 1, 32), jnp.float32)
    model = with_tensors_divided(model, group, factors)
    x = nets.images(model, 4)
    truth = np.asarray(nets.run(model, x))
    error = lambda m: np.abs(np.asarray(nets.run(per_tensor(m), x)) - truth).mean()
    assert error(equalize_cross_layer(model, reach="groups")) < error(model) / 3
    assert error(equalize_cross_layer(model)) > error(model) / 3


def test_which_ceilings_are_in_the_way(nets):
    tiny, model = folded(nets, "tiny"), folded(nets, "inverted")
    assert capped_between(tiny, "pairs") == capped_between(tiny, "groups") == ("relu2",)
    inside = tuple(f"{a}{i}.act" for i in range(2) for a in ("expand", "depthwise"))
    assert capped_between(model, "pairs") == inside
    assert capped_between(model, "groups") == (*inside, "head.act")


def test_without_ceilings_only_what_they_cut_changes(nets):
    model = folded(nets, "inverted")
    free = uncapped(model, capped_between(model, "groups"))
    assert not any(
        op == Relu(6.0) or isinstance(op, Clip) for op in (n.op for n in free.graph.nodes)
    )
    x = nets.images(model, 4) * 0.9
    cut = max(nets.forward(model, x)[n].max() for n in ("expand0", "depthwise0", "head"))
    assert cut < 6, cut  # nothing is cut here
    wanted = np.asarray(nets.run(model, x))
    np.testing.assert_allclose(nets.run(free, x), wanted, atol=1e-6)
    balanced = equalize_cross_layer(free, reach="groups")
    np.testing.assert_allclose(nets.run(balanced, x), wanted, atol=1e-5 * np.abs(wanted).max())
    first = {name: m.params["expand0"]["kernel"] for name, m in [("a", model), ("b", balanced)]}
    assert not np.allclose(first["a"], first["b"], rtol=1e-2)
    large = x * 20
    assert np.abs(nets.run(free, large) - nets.run(model, large)).max() > 0.1
