import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import rankdata

from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import (
    Activation,
    Add,
    Concat,
    ConvTranspose2d,
    Flatten,
    GroupNorm,
    LayerNorm,
    MatMul,
    Maximum,
    MaxPool,
    Mul,
    Relu,
    Reshape,
)
from dfq_jax.graph.query import batch_norms, last_weighted, weighted_nodes
from dfq_jax.passes.estimate import (
    SUFFIX,
    analytic_moments,
    inner_layers,
    measured_moments,
    recursive_moments,
    resize_vector,
    with_estimated_norms,
    with_norms,
)
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.synthesis.terms.targets import recorded_statistics
from dfq_jax.types import InputContract, Moments

SMALL = InputContract(4, 4)


def normal(channels=3):
    return Moments(jnp.zeros(channels), jnp.ones(channels))


def f32(x):
    return jnp.asarray(x, jnp.float32)


# norms that change nothing


def same_function(nets, before, after):
    x = nets.images(before, 3)
    for output, new in zip(before.graph.outputs, after.graph.outputs, strict=True):
        wanted = nets.forward(before, x)[output]
        found = nets.forward(after, x)[new]
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("tiny", mode) for mode in ("gzsq", "analytic", "noise")),
        *(("mixed", "gzsq"), ("excite", "noise")),
        *(("convnext", "analytic"), ("two_heads", "gzsq")),
    ],
)
def test_the_function_stays(name, mode, nets):
    model = fold_batch_norm(getattr(nets, name)())
    images = nets.images(model, 4) if mode == "noise" else None
    changed = with_estimated_norms(model, mode, images=images)
    same_function(nets, model, changed)
    added = {n.inputs[0] for n in batch_norms(changed.graph) if n.name.endswith(SUFFIX)}
    last = set(last_weighted(model.graph))
    assert added == {n.name for n in weighted_nodes(model.graph)} - last
    assert not last & added
    targets, _ = recorded_statistics(changed)
    assert {layer + SUFFIX for layer in added} <= set(targets)
    assert model.moments == changed.moments


def test_readers_and_outputs_read_the_norm(nets):
    b = nets.Builder(SMALL)
    layer = b.conv("layer", "images", 2)
    relu = b.op("relu", Relu(), layer)
    both = b.op("both", Add(), relu, layer)
    model = b.done(both, layer)
    found = with_norms(model, {"layer": Moments(f32([0.5, -1.0]), f32([2.0, 0.25]))})
    assert [n.name for n in found.graph.nodes] == ["layer", "layer.estimated", "relu", "both"]
    assert found.graph["relu"].inputs == ("layer.estimated",)
    assert found.graph["both"].inputs == ("relu", "layer.estimated")
    assert found.graph.outputs == ("both", "layer.estimated")
    slots = found.params["layer.estimated"]
    np.testing.assert_allclose(slots["mean"], [0.5, -1.0])
    np.testing.assert_allclose(slots["var"], [2.0, 0.25])
    np.testing.assert_allclose(slots["scale"], np.sqrt(np.array([2.0, 0.25]) + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(slots["bias"], [0.5, -1.0])
    assert "layer.estimated" not in model.params


def test_estimates_that_are_not_finite_are_unusable(nets):
    b = nets.Builder(SMALL)
    model = b.done(b.linear("fc", b.op("flat", Flatten(), b.conv("layer", "images", 4)), 2))
    odd = Moments(f32([np.nan, 0.5, np.inf, 1.0]), f32([1.0, np.inf, 2.0, 3.0]))
    changed = with_norms(model, {"layer": odd})
    same_function(nets, model, changed)
    (target,) = recorded_statistics(changed)[0].values()
    assert target.usable.tolist() == [False, False, False, True]


def test_noise_mode_measures_images(nets):
    model = fold_batch_norm(nets.tiny())
    x = nets.images(model, 5) * 0.5 + 0.2
    truth = nets.forward(model, x)
    found = measured_moments(model, x)
    assert tuple(found) == inner_layers(model) == ("conv1", "depthwise", "project", "conv2")
    for name, (mean, var) in found.items():
        np.testing.assert_allclose(mean, truth[name].mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(var, truth[name].var((0, 1, 2)), rtol=1e-4)
    with pytest.raises(ValueError, match=r"needs images for mode 'noise'"):
        with_estimated_norms(model, "noise")


# the recursion


def chain(nets, widths, spread=None, channels=3):
    """Convolutions and ReLUs; with `spread`, every kernel has mean 0 and that deviation."""
    contract = InputContract(4, 4, (0.5,) * channels, (0.5,) * channels)
    b, x = nets.Builder(contract, 7), "images"
    for i, width in enumerate(widths):
        x = b.conv(f"conv{i}", x, width, kernel=2, bias=spread is None, padding=((0, 1), (0, 1)))
        if spread is not None:
            kernel = b.params[x]["kernel"]
            signs = np.resize([1.0, -1.0], kernel[..., 0].size)
            kernel[:] = spread * signs.reshape(*kernel.shape[:3], 1)
        x = b.op(f"relu{i}", Relu(), x)
    return b.done(x)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_deviations_add_in_squares(layers, nets):
    """n layers of kernels with mean 0 and deviation a: sqrt(1 + n a^2)."""
    model = chain(nets, [4] * layers, spread=0.3, channels=4)
    found = recursive_moments(model, normal(4))[f"conv{layers - 1}"]
    np.testing.assert_allclose(np.sqrt(found.var), np.sqrt(1 + layers * 0.3**2), rtol=1e-6)
    np.testing.assert_allclose(found.mean, 0, atol=1e-7)


def test_recursion_by_hand(nets):
    """Sizes 3 -> 5 -> 2 -> 2, biases, a start of one's own."""
    model = chain(nets, (5, 2, 2))
    inputs = Moments(f32([0.5, -0.25, 0.0]), f32([1.0, 4.0, 0.25]))
    found = recursive_moments(model, inputs)
    mean, std = np.array([0.5, -0.25, 0.0]), np.array([1.0, 2.0, 0.5])
    for i, width in enumerate((5, 2, 2)):
        if width > mean.size:
            mean = np.append(mean, [mean.mean()] * (width - mean.size))
            std = np.append(std, [std.mean()] * (width - std.size))
        elif width < mean.size:
            mean, std = np.full(width, mean.mean()), np.full(width, std.mean())
        slots = {k: np.asarray(v, float) for k, v in model.params[f"conv{i}"].items()}
        for o in range(width):
            weights = slots["kernel"][..., o]
            mean[o] += weights.mean() + slots["bias"][o]
            std[o] = np.hypot(std[o], weights.std())
        np.testing.assert_allclose(found[f"conv{i}"].mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[f"conv{i}"].var, std**2, rtol=1e-5)


VECTOR = np.array([1.0, 4.0, 7.0])
STATISTICS = {
    **{"min": 1.0, "mean-min": 3.0, "mean+min": 5.0, "mean": 4.0},
    **{"max-mean": 3.0, "max+mean": 11.0, "max": 7.0},
}


@pytest.mark.parametrize("rule", STATISTICS)
def test_equal_sizes(rule):
    value = STATISTICS[rule]
    assert resize_vector(VECTOR, 5, rule).tolist() == [1.0, 4.0, 7.0, value, value]
    assert resize_vector(VECTOR, 2, rule).tolist() == [value, value]
    assert resize_vector(VECTOR, 3, rule) is VECTOR


def test_the_rule_is_the_callers(nets):
    model = chain(nets, (6, 2), spread=0.5)
    wide, narrow = (recursive_moments(model, normal(), rule="mean+min")[f"conv{i}"] for i in (0, 1))
    std = np.sqrt([1.25, 1.25, 1.25, 4.25, 4.25, 4.25])  # three more start from mean + min = 2
    np.testing.assert_allclose(np.sqrt(wide.var), std, rtol=1e-5)
    np.testing.assert_allclose(narrow.var, (std.mean() + std.min()) ** 2 + 0.25, rtol=1e-5)
    assert np.all(np.asarray(recursive_moments(model, normal())["conv1"].var) == 1.5)


@pytest.mark.parametrize("op", [Add(), Maximum(), Mul()], ids=str)
def test_where_paths_meet_the_longer_one_counts(op, nets):
    """As if there were no skip connection, in either order of arguments."""
    for order in (1, -1):
        b = nets.Builder(SMALL, 1)
        first = b.conv("first", "images", 4, bias=True)
        branch = b.conv("branch", b.op("relu", Relu(), first), 4, bias=True)
        joined = b.op("joined", op, *(branch, first)[::order])
        model = b.done(b.conv("after", joined, 4))
        straight = (*model.graph.nodes[:-2], Node("after", model.graph["after"].op, ("branch",)))
        graph = Graph(straight, ("images",), ("after",))
        wanted = recursive_moments(type(model)(graph, model.params, (SMALL,)), normal())["after"]
        found = recursive_moments(model, normal())["after"]
        np.testing.assert_array_equal(found.mean, wanted.mean)
        np.testing.assert_array_equal(found.var, wanted.var)


def test_channels_joined_and_normed(nets):
    b = nets.Builder(SMALL, 2)
    joined = b.op("joined", Concat(3), b.conv("one", "images", 2), b.conv("two", "images", 3))
    model = b.done(b.conv("after", b.bn("bn", joined), 5, kernel=1))
    found, slots = recursive_moments(model, normal()), model.params["bn"]
    mean = np.concatenate([found["one"].mean, found["two"].mean])
    std = np.sqrt(np.concatenate([found["one"].var, found["two"].var]))
    gain = np.asarray(slots["scale"]) / np.sqrt(np.asarray(slots["var"]) + 1e-5)
    mean = (mean - slots["mean"]) * gain + slots["bias"]
    weights = np.asarray(model.params["after"]["kernel"])[0, 0]
    np.testing.assert_allclose(found["after"].mean, mean + weights.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["after"].var, (std * gain) ** 2 + weights.var(0), rtol=1e-4)


def test_constants_do_not_count(nets):
    """Class tokens and position embeddings of a transformer."""
    model = nets.vit()
    found = recursive_moments(model, normal())
    assert set(found) == {n.name for n in weighted_nodes(model.graph)}
    wanted = resize_vector(np.asarray(found["patches"].var, float) ** 0.5, 24) ** 2
    kernel = np.asarray(model.params["attention0.qkv"]["kernel"])
    np.testing.assert_allclose(found["attention0.qkv"].var, wanted + kernel.var(0), rtol=1e-5)


# normal variables


def near(found, samples, mean=0.01, std=0.01):
    """Moments agree with samples; means in units of the deviation."""
    axes = tuple(range(samples.ndim - 1))
    spread = samples.std(axes)
    np.testing.assert_allclose(np.sqrt(found.var), spread, rtol=std)
    assert np.max(np.abs(np.asarray(found.mean) - samples.mean(axes)) / spread) < mean


def sampled(nets, model, count=400):
    """Every tensor for independent normal pixels."""
    rng = np.random.default_rng(0)
    return nets.forward(model, rng.normal(size=(count, *model.contract.shape)))


def test_pointwise_linear_layers_against_samples(nets):
    b = nets.Builder(InputContract(16, 16, (0.5,) * 4, (0.5,) * 4), 3)
    b.conv("plain", "images", 6, kernel=1, bias=True)
    b.conv("grouped", "images", 6, kernel=1, groups=2, bias=True)
    model = b.done("plain", "grouped")
    found, truth = analytic_moments(model, normal(4)), sampled(nets, model)
    for name in model.graph.outputs:
        near(found[name], truth[name])


def test_a_rectified_normal_variable(nets):
    b = nets.Builder(SMALL)
    model = b.done(b.op("six", Relu(6.0), b.op("relu", Relu(), "images")))
    found = analytic_moments(model, normal())["relu"]
    np.testing.assert_allclose(found.mean, 0.3989, atol=1e-4)
    np.testing.assert_allclose(found.var, 0.3408, atol=1e-4)


def test_layers_without_borders_against_samples(nets):
    """Windows, strides, biases, ReLU6, transposed convolution, all of independent pixels."""
    b = nets.Builder(InputContract(9, 9), 4)
    nothing = ((0, 0), (0, 0))
    b.conv("conv", "images", 4, stride=3, padding=nothing, bias=True)
    b.op("relu", Relu(6.0), "conv")
    up = b.upscale("up", "images", 4, kernel=2, stride=2)
    model = b.done("relu", up)
    found, truth = analytic_moments(model, normal()), sampled(nets, model, 3000)
    near(found["conv"], truth["conv"], 0.02, 0.015)
    near(found["relu"], truth["relu"], 0.02, 0.02)
    near(found["up"], truth["up"], 0.02, 0.015)
    assert isinstance(model.graph["up"].op, ConvTranspose2d)


@pytest.mark.parametrize("op", [LayerNorm(), GroupNorm(4)], ids=str)
def test_norms_against_samples(op, nets):
    contract = InputContract(4, 4, (0.5,) * 64, (0.5,) * 64)
    b = nets.Builder(contract, 5)
    model = b.done(b.norm("norm", b.conv("conv", "images", 64, kernel=1), op))
    model.params["conv"]["kernel"] = f32(np.diag(np.linspace(0.5, 2.0, 64))[None, None])
    model.params["conv"]["bias"] = f32(np.linspace(-1, 2, 64))
    found, truth = analytic_moments(model, normal(64)), sampled(nets, model, 1000)
    near(found["norm"], truth["norm"], 0.05, 0.06)


def test_a_norm_of_something_unknown_starts_anew(nets):
    b = nets.Builder(SMALL, 6)
    x = b.op("tokens", Reshape((16, 3)), "images")
    x = b.op("unknown", MatMul(), b.op("scores", MatMul(True), x, x), x)
    model = b.done(b.linear("fc", b.norm("norm", x), 2))
    found = analytic_moments(model, normal())
    assert "unknown" not in found
    slots = model.params["norm"]
    np.testing.assert_allclose(found["norm"].mean, slots["bias"], rtol=1e-5)
    np.testing.assert_allclose(found["norm"].var, slots["scale"] ** 2, rtol=1e-4)
    kernel, bias = (np.asarray(model.params["fc"][k]) for k in ("kernel", "bias"))
    np.testing.assert_allclose(found["fc"].mean, slots["bias"] @ kernel + bias, rtol=1e-4)
    np.testing.assert_allclose(found["fc"].var, slots["scale"] ** 2 @ kernel**2, rtol=1e-4)


def test_sums_gates_flattening_and_folded_norms(nets):
    b = nets.Builder(InputContract(6, 6), 8)
    first = b.op("limited", Activation("sigmoid"), b.conv("gate", "images", 4, kernel=1, bias=True))
    second = b.bn("bn", b.conv("other", "images", 4, kernel=1, bias=True))
    model = b.done(b.op("product", Mul(), first, second), b.op("sum", Add(), first, second))
    found = analytic_moments(model, normal())
    one, two = found["limited"], found["bn"]
    np.testing.assert_allclose(found["sum"].mean, one.mean + two.mean, rtol=1e-6)
    np.testing.assert_allclose(found["sum"].var, one.var + two.var, rtol=1e-6)
    square = (one.var + one.mean**2) * (two.var + two.mean**2)
    np.testing.assert_allclose(found["product"].mean, one.mean * two.mean, rtol=1e-6)
    spread = square - (one.mean * two.mean) ** 2
    np.testing.assert_allclose(found["product"].var, spread, rtol=1e-4, atol=1e-6)
    folded = analytic_moments(fold_batch_norm(model), normal())["other"]
    np.testing.assert_allclose(folded.mean, two.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(folded.var, two.var, rtol=1e-4)


def test_flattening_repeats_channels(nets):
    b = nets.Builder(SMALL, 9)
    x = b.op("pool", MaxPool((2, 2), (2, 2)), b.conv("conv", "images", 3, bias=True))
    model = b.done(b.linear("fc", b.op("flat", Flatten(), x), 2))
    found = analytic_moments(model, normal())
    np.testing.assert_array_equal(found["flat"].mean, np.tile(found["conv"].mean, 4))
    kernel = np.asarray(model.params["fc"]["kernel"])
    np.testing.assert_allclose(found["fc"].var, np.tile(found["conv"].var, 4) @ kernel**2, 1e-5)
    c = b.op("again", Reshape((48,)), "images")
    assert analytic_moments(b.done(c), normal())["again"].mean.shape == (48,)


def test_layers_that_cannot_be_told_have_no_norm(nets):
    """What attention mixes has unknown moments; the blocks around it do not suffer."""
    model = nets.vit()
    changed = with_estimated_norms(model, "analytic")
    told = {n.inputs[0] for n in batch_norms(changed.graph)}
    assert told == {"patches", *(f"{n}{i}" for i in (0, 1) for n in ("wide", "narrow"))} | {
        "attention0.qkv",
        "attention1.qkv",
    }
    same_function(nets, model, changed)


# how near the truth


def agreement(model, found):
    """Spearman correlation of estimated and recorded deviations of all batch-norm inputs."""
    estimates, truth = [], []
    for norm in batch_norms(model.graph):
        if norm.inputs[0] in found:
            estimates.append(np.sqrt(found[norm.inputs[0]].var))
            truth.append(np.sqrt(model.params[norm.name]["var"]))
    assert len(truth) >= 2
    ranks = [rankdata(np.concatenate(v)) for v in (estimates, truth)]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("name", ["tiny", "excite", "resnet20"])
def test_analytic_estimates_beat_the_recursion(name, nets, request):
    """Ranks of channels by deviation, against those that batch norms recorded."""
    real = name == "resnet20"
    model = request.getfixturevalue(name).model if real else getattr(nets, name)()
    images = jax.random.normal(jax.random.key(1), (16, *model.contract.shape))
    found = {
        "gzsq": recursive_moments(model, normal()),
        "analytic": analytic_moments(model, normal()),
        "noise": measured_moments(model, images),
    }
    ranks = {mode: agreement(model, moments) for mode, moments in found.items()}
    print(name, {mode: round(value, 3) for mode, value in ranks.items()})
    assert ranks["analytic"] > ranks["gzsq"]
    assert ranks["analytic"] > 0.6
    assert ranks["noise"] > 0.6
