from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import (
    Activation,
    AdaptiveAvgPool,
    Add,
    AvgPool,
    Broadcast,
    Clip,
    Concat,
    Constant,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    LeakyRelu,
    Linear,
    MatMul,
    Maximum,
    MaxPool,
    Mul,
    Pad,
    PRelu,
    Reduce,
    Relu,
    Reshape,
    Resize,
    Scale,
    Slice,
    Softmax,
    Sub,
    Transpose,
)
from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.graph.semantics import apply_op
from dfq_jax.graph.token_ops import Leading
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.moments import (
    Around,
    correct_biases_analytically,
    expected_moments,
    expected_output,
    propagated,
)
from dfq_jax.types import InputContract, Moments

KEEP = (0, None, 1)


def moments(mean, var):
    return Moments(jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32))


A = moments([0.5, -1.0], [1.0, 4.0])
B = moments([2.0, 0.0], [0.25, 1.0])
IMAGE = (1, 4, 4, 2)


def found(op, *inputs, slots: Any = None, read=IMAGE, made=IMAGE, fixed=(False, False)) -> Any:
    """What `propagated` says, for inputs of one shape."""
    around = Around(slots or {}, (read,) * len(inputs), made, fixed[: len(inputs)])
    return propagated(op, list(inputs), around)


@pytest.mark.parametrize(
    "op",
    [
        Relu(),
        Relu(6.0),
        Clip(-1.0, 2.0),
        Clip(None, 0.5),
        Clip(-0.25, None),
        Clip(),
        LeakyRelu(0.2),
        PRelu(),
        Scale(-2.0, 0.5),
        *map(Activation, ("silu", "hard_swish", "sigmoid", "hard_sigmoid", "tanh", "gelu")),
    ],
    ids=str,
)
def test_activations_against_samples(op, nets):
    rng = np.random.default_rng(0)
    x = np.asarray(A.mean) + np.sqrt(np.asarray(A.var)) * rng.normal(size=(400_000, 2))
    slots = {"slope": np.array([0.3, -0.1])} if op == PRelu() else {}
    y = nets.reference(op, slots, x)
    ours = found(op, A, slots={k: jnp.asarray(v, jnp.float32) for k, v in slots.items()})
    np.testing.assert_allclose(ours.mean, y.mean(0), atol=6e-3)
    np.testing.assert_allclose(ours.var, y.var(0), rtol=2e-2)


def test_sums_and_differences_of_independent_tensors():
    total = found(Add(), A, B)
    np.testing.assert_allclose(total.mean, [2.5, -1.0])
    np.testing.assert_allclose(total.var, [1.25, 5.0])
    gap = found(Sub(), A, B)
    np.testing.assert_allclose(gap.mean, [-1.5, -1.0])
    np.testing.assert_allclose(gap.var, [1.25, 5.0])


def test_products_with_constants():
    value = jnp.asarray([[[[2.0, -3.0]]]])
    gain = found(Constant(), slots={"value": value})
    assert gain.mean.tolist() == [2, -3]
    assert gain.var.tolist() == [0, 0]
    for fixed, pair in [((True, False), (gain, A)), ((False, True), (A, gain))]:
        scaled = found(Mul(), *pair, fixed=fixed)
        np.testing.assert_allclose(scaled.mean, [1, 3])
        np.testing.assert_allclose(scaled.var, [4, 36])
    assert found(Mul(), A, B) is None  # nobody says that two images are independent


def test_constants_that_vary_from_place_to_place():
    rng = np.random.default_rng(1)
    value = rng.normal(size=(1, 50_000, 2)) * [1.0, 2.0] + [0.5, 0.0]
    x = rng.normal(size=(50_000, 2)) * 2 + 1
    places = found(Constant(), slots={"value": jnp.asarray(value, jnp.float32)})
    known = moments(x.mean(0), x.var(0))
    for op, y in [(Add(), value[0] + x), (Mul(), value[0] * x)]:
        ours = found(op, known, places, fixed=(False, True))
        np.testing.assert_allclose(ours.mean, y.mean(0), atol=0.1)
        np.testing.assert_allclose(ours.var, y.var(0), rtol=0.1)


@pytest.mark.parametrize(
    "op",
    [
        MaxPool((2, 2), (2, 2)),
        AvgPool((2, 2), (2, 2)),
        AdaptiveAvgPool((2, 2)),
        GlobalAvgPool(),
        GlobalAvgPool(keepdims=True),
        Resize((8, 8), (2.0, 2.0), "bilinear", "half_pixel"),
        Reduce("mean", (1, 2)),
        Reduce("max", (1,), keepdims=True),
        Pad(((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect"),
    ],
    ids=str,
)
def test_operators_that_keep_channels(op):
    assert found(op, A) is A


def test_zero_channels_have_zero_moments():
    padded = found(Pad(((0, 0), (0, 0), (0, 0), (1, 2))), A)
    np.testing.assert_allclose(padded.mean, [0, 0.5, -1, 0, 0])
    np.testing.assert_allclose(padded.var, [0, 1, 4, 0, 0])


def test_channels_cut_and_joined():
    assert found(Slice((KEEP, (0, None, 2), (1, 3, 1), KEEP)), A).mean.tolist() == [0.5, -1]
    assert found(Slice((KEEP, KEEP, KEEP, (1, 2, 1))), A).var.tolist() == [4]
    for axis in (3, -1):
        joined = found(Concat(axis), A, B)
        assert joined.mean.tolist() == [0.5, -1, 2, 0]
        assert joined.var.tolist() == [1, 4, 0.25, 1]
    assert found(Concat(1), A, B) is None


def test_channels_shuffled_by_reshape_and_transpose():
    c = moments(np.arange(6), np.arange(6) + 1)
    split = found(Reshape((4, 4, 2, 3)), c, read=(1, 4, 4, 6), made=(1, 4, 4, 2, 3))
    assert split.mean.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found(Relu(), split) is None
    swapped = found(Transpose((0, 1, 2, 4, 3)), split, made=(1, 4, 4, 3, 2))
    merged = found(Reshape((4, 4, 6)), swapped, made=(1, 4, 4, 6))
    assert merged.mean.tolist() == [0, 3, 1, 4, 2, 5]
    assert merged.var.tolist() == [1, 4, 2, 5, 3, 6]


@pytest.mark.parametrize("inner", [True, False])
def test_channels_that_become_pixels(inner):
    """The mean and variance over all pixels that a channel is made of."""
    rng = np.random.default_rng(0)
    x = rng.normal(np.arange(8), np.arange(8) + 1, (1, 200, 200, 8)).astype(np.float32)
    op = DepthToSpace(2, inner)
    y = np.asarray(apply_op(op, {}, jnp.asarray(x)))
    ours = found(op, moments(np.arange(8), (np.arange(8) + 1.0) ** 2))
    np.testing.assert_allclose(ours.mean, y.mean((0, 1, 2)), atol=0.05)
    np.testing.assert_allclose(ours.var, y.var((0, 1, 2)), rtol=0.02)


def test_first_rows_of_a_table_are_as_its_rows():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 3)), jnp.float32)
    slots = {"value": table}
    ours, whole = found(Leading((1,)), slots=slots), found(Constant(), slots=slots)
    np.testing.assert_array_equal(ours.mean, whole.mean)
    np.testing.assert_array_equal(ours.var, whole.var)


def test_moves_that_keep_the_last_axis():
    c = moments(np.arange(3), np.ones(3))
    tokens = found(Reshape((16, 3)), c, made=(1, 16, 3))
    assert tokens.mean.tolist() == [0, 1, 2]
    assert found(Transpose((0, 2, 1, 3)), c).mean.tolist() == [0, 1, 2]
    assert found(Transpose((0, 3, 1, 2)), c) is None
    assert found(Reshape((48,)), c, made=(1, 48)) is None
    one = moments([2.0], [3.0])
    assert found(Broadcast((4, 4, 2)), one, made=(1, 4, 4, 2)).mean.tolist() == [2, 2]
    assert found(Broadcast((4, 4, 3)), c, made=(1, 4, 4, 3)).var.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "op",
    [
        Flatten(),
        Linear(),
        MatMul(),
        LayerNorm(),
        Softmax(),
        Maximum(),
        Reduce("mean", (3,)),
        Reduce("sum", (1, 2)),
        Activation("exp"),
        Activation("sqrt"),
        Pad(((0, 0), (1, 1)), 0.5),
        Pad(((0, 0), (0, 0), (0, 0), (1, 1)), mode="edge"),
    ],
    ids=str,
)
def test_operators_that_determine_nothing(op):
    assert found(op, A) is None


def test_expected_moments_of_a_network(tiny_net, nets):
    """Near the measured ones; exact where a batch norm recorded them."""
    model = fold_batch_norm(tiny_net)
    known = expected_moments(model)
    truth = nets.forward(model, nets.images(model, 64, seed=4))
    assert set(known) == {n.name for n in model.graph.nodes} - {"fc"}
    assert known["conv2"] is model.moments["conv2"]
    for name in ("relu1", "relu2", "add", "relu3", "relu4"):
        np.testing.assert_allclose(known[name].mean, truth[name].mean((0, 1, 2)), atol=0.25)
    assert expected_moments(tiny_net) == {}  # nothing folded, nothing known


@pytest.mark.parametrize(
    ("name", "unknown"),
    [
        ("dense", {"join0", "grow0", "transition", "halve", "fc"}),
        ("inception", {"flat", "fc"}),
        ("shuffle", {"split0", "swap0", "split1", "swap1", "fc"}),
        ("excite", {"reduce0", "gate0", "excite0", "reduce1.act", "restore1", "fc"}),
        ("vit", {"patches", "joined", "placed", "attention0.weights", "head"}),
        ("convnext", {"stem", "norm0", "scaled0", "add2", "fc"}),
        ("unet", {"up3", "scores"}),
        ("two_heads", {"classes", "number"}),
    ],
)
def test_expected_moments_of_modern_networks(name, unknown, nets):
    model = fold_batch_norm(getattr(nets, name)())
    known = expected_moments(model)
    truth = nets.forward(model, nets.images(model, 64, seed=4))
    everything = {n.name for n in model.graph.nodes}
    assert unknown <= everything - set(known)
    if name in ("inception", "shuffle", "unet", "two_heads"):
        assert set(known) == everything - unknown
    recorded = [k for k in known if k in model.moments and k not in nets.CURVES]
    for tensor in recorded:
        values = truth[tensor]
        axes = tuple(range(values.ndim - 1))
        size = values.std()
        np.testing.assert_allclose(known[tensor].mean, values.mean(axes), atol=0.6 * size)
    for tensor in set(known) - set(recorded):
        assert known[tensor].mean.shape == truth[tensor].shape[-1:]
        assert np.isfinite(known[tensor].mean).all()
        assert (np.asarray(known[tensor].var) >= 0).all()


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_expected_output_by_loops(groups):
    rng = np.random.default_rng(groups)
    kernel = rng.normal(size=(3, 2, 6 // groups, 12))
    mean = rng.normal(size=6)
    wanted = np.zeros(12)
    for o in range(12):
        first = o // (12 // groups) * (6 // groups)
        for i, j, k in np.ndindex(kernel.shape[:3]):
            wanted[o] += kernel[i, j, k, o] * mean[first + k]
    ours = expected_output(jnp.asarray(kernel, jnp.float32), jnp.asarray(mean, jnp.float32), groups)
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


def test_correction_removes_the_mean_error_of_a_gaussian_layer(nets):
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=6) + 1, rng.uniform(0.5, 2, 6)
    w0, w1 = np.diag(std), rng.normal(size=(6, 4))
    nodes = (Node("source", Linear(), ("x",)), Node("r", Relu(), ("source",)))
    nodes += (Node("layer", Linear(), ("r",)),)
    params = {"source": {"kernel": w0, "bias": mean}, "layer": {"kernel": w1}}
    params = {k: {s: jnp.asarray(a, jnp.float32) for s, a in v.items()} for k, v in params.items()}
    known = {"source": moments(mean, std**2)}
    contract = InputContract(1, 1, mean=(0.0,) * 6, std=(1.0,) * 6)
    model = Model(Graph(nodes, ("x",), ("layer",)), params, (contract,), known)
    rounded = jnp.round(params["layer"]["kernel"] * 2) / 2
    corrected = correct_biases_analytically(model, {"layer": rounded})
    x = np.maximum(rng.normal(size=(400_000, 6)) * std + mean, 0)
    gap = x @ np.asarray(rounded) + np.asarray(corrected.params["layer"]["bias"]) - x @ w1
    raw = x @ np.asarray(rounded) - x @ w1
    assert np.abs(raw.mean(0)).max() > 0.1
    np.testing.assert_allclose(gap.mean(0), 0, atol=5 * gap.std() / 400_000**0.5)
    assert corrected.params["source"]["bias"] is params["source"]["bias"]


def test_only_layers_with_known_inputs_change(tiny_net):
    model = fold_batch_norm(tiny_net)
    kernels = {
        k: v["kernel"] + 0.1 for k, v in model.params.items() if k in ("conv1", "depthwise", "fc")
    }
    corrected = correct_biases_analytically(model, kernels).params
    changed = {
        k for k in model.params if not np.array_equal(corrected[k]["bias"], model.params[k]["bias"])
    }
    assert changed == {"depthwise", "fc"}  # nothing is known about images
    shift = 0.9 * np.asarray(expected_moments(model)["relu1"].mean)
    wanted = np.asarray(model.params["depthwise"]["bias"]) - shift
    np.testing.assert_allclose(corrected["depthwise"]["bias"], wanted, rtol=1e-4, atol=1e-5)
    assert all(corrected[k]["kernel"] is model.params[k]["kernel"] for k in kernels)


@pytest.mark.parametrize("groups", [1, 2])
def test_correction_of_a_transposed_convolution(groups, nets):
    """On an image that is the same everywhere, away from the border."""
    b = nets.Builder(InputContract(6, 6), 1)
    x = b.bn("bn", b.conv("conv", "images", 4))
    model = fold_batch_norm(b.done(b.upscale("up", x, 6, 4, 2, groups, padding=nets.SAME)))
    rounded = jnp.round(model.params["up"]["kernel"] * 2) / 2
    corrected = correct_biases_analytically(model, {"up": rounded})
    flat = np.broadcast_to(np.asarray(model.moments["conv"].mean, np.float64), (1, 6, 6, 4))
    op = model.graph["up"].op
    before, after = (
        nets.conv_transposed(flat, op, np.asarray(k, np.float64)) + np.asarray(bias, np.float64)
        for k, bias in [
            (model.params["up"]["kernel"], model.params["up"]["bias"]),
            (rounded, corrected.params["up"]["bias"]),
        ]
    )
    inside = (after - before)[:, 2:-2, 2:-2].mean((0, 1, 2))
    np.testing.assert_allclose(inside, 0, atol=1e-5)
    moved = corrected.params["up"]["bias"] - model.params["up"]["bias"]
    assert float(jnp.max(jnp.abs(moved))) > 0.01
