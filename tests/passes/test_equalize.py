import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.ops import Activation, Clip, Flatten, LeakyRelu, PRelu, Relu
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.affine import Grid, fake_quantize
from dfq_jax.numerics.ranges import MinMax, weight_affine
from dfq_jax.passes.equalize import equalizable_pairs, equalize_cross_layer, equalize_pair
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.types import InputContract

CONTRACT = InputContract(6, 6)
SHUFFLED = (("enter", "depthwise"), ("depthwise", "leave"))


def names(model):
    return [(a.name, b.name) for a, b in equalizable_pairs(model)]


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
    model = type(model)(model.graph, model.params, model.contract, {**model.moments, first: moved})
    return with_params(
        model,
        {
            first: {"kernel": a["kernel"] * factors, "bias": a["bias"] * factors},
            second: {"kernel": c["kernel"] / factors},
        },
    )


def test_worked_example():
    w1 = jnp.array([[4.0, 0.0], [0.0, 0.25]])
    w2 = jnp.array([[1.0, 3.0], [2.0, 4.0]])  # the transpose of (out, in)
    new1, new2, s = equalize_pair(w1, w2)
    np.testing.assert_allclose(1 / s, [0.8660, 4.0], rtol=1e-4)
    np.testing.assert_allclose(ranges(new1, 1), [3.4641, 1.0], rtol=1e-4)
    np.testing.assert_allclose(ranges(new2, 0), [3.4641, 1.0], rtol=1e-4)


@pytest.mark.parametrize("depthwise", [False, True])
def test_dead_channels_are_left_alone(depthwise):
    w1 = jnp.array([[2.0, 0.0, 3.0]])
    w2 = jnp.ones((3, 3, 1, 3)) if depthwise else jnp.ones((3, 4))
    w2 = w2.at[..., 2].set(0.0) if depthwise else w2.at[2].set(0.0)
    new1, new2, s = equalize_pair(w1, w2, depthwise=depthwise)
    np.testing.assert_allclose(s, [2**0.5, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(ranges(new1, 1), [2**0.5, 0, 3], rtol=1e-6)
    np.testing.assert_allclose(ranges(new2, -1 if depthwise else 0), [2**0.5, 1, 0], rtol=1e-6)


def test_kernels_must_share_channels():
    with pytest.raises(ValueError, match=r"equalize_pair\(\) got 3 and 4 shared channels"):
        equalize_pair(jnp.ones((2, 3)), jnp.ones((4, 5)))
    with pytest.raises(ValueError, match=r"equalize_pair\(\) got 3 and 5 shared channels"):
        equalize_pair(jnp.ones((2, 3)), jnp.ones((3, 3, 3, 5)), depthwise=True)


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
