import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import (
    Add,
    AvgPool,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool,
    Pad,
    Relu,
    Slice,
)
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.moments import (
    correct_biases_analytically,
    expected_moments,
    expected_output,
    expected_ranges,
    propagated,
)
from dfq_jax.types import InputContract, Moments

KEEP = (0, None, 1)


def moments(mean, var):
    return Moments(jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32))


A = moments([0.5, -1.0], [1.0, 4.0])
B = moments([2.0, 0.0], [0.25, 1.0])


@pytest.mark.parametrize("op", [Relu(), Relu(6.0)], ids=str)
def test_activations_against_samples(op):
    rng = np.random.default_rng(0)
    x = np.asarray(A.mean) + np.sqrt(np.asarray(A.var)) * rng.normal(size=(400_000, 2))
    y = np.clip(x, 0, op.ceiling)
    found = propagated(Node("r", op, ("x",)), [A])
    assert found is not None
    np.testing.assert_allclose(found.mean, y.mean(0), atol=6e-3)
    np.testing.assert_allclose(found.var, y.var(0), rtol=2e-2)


def test_sums_add_means_and_variances():
    found = propagated(Node("s", Add(), ("a", "b")), [A, B])
    assert found is not None
    np.testing.assert_allclose(found.mean, [2.5, -1.0])
    np.testing.assert_allclose(found.var, [1.25, 5.0])


@pytest.mark.parametrize(
    "op",
    [
        MaxPool((2, 2), (2, 2)),
        AvgPool((2, 2), (2, 2)),
        GlobalAvgPool(),
        Slice((KEEP, (0, None, 2), (1, 3, 1), KEEP)),
    ],
    ids=str,
)
def test_operators_that_keep_channels(op):
    assert propagated(Node("n", op, ("x",)), [A]) is A


def test_zero_channels_have_zero_moments():
    op = Pad(((0, 0), (0, 0), (0, 0), (1, 2)))
    found = propagated(Node("p", op, ("x",)), [A])
    assert found is not None
    np.testing.assert_allclose(found.mean, [0, 0.5, -1, 0, 0])
    np.testing.assert_allclose(found.var, [0, 1, 4, 0, 0])


@pytest.mark.parametrize(
    "op", [Flatten(), Linear(), Slice((KEEP, (0, 1, 1))), Pad(((0, 0), (1, 1)), 0.5)], ids=str
)
def test_operators_that_determine_nothing(op):
    assert propagated(Node("n", op, ("x",)), [A]) is None


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


def test_expected_ranges_cover_what_happens(tiny_net, nets):
    model = fold_batch_norm(tiny_net)
    predicted = {k: (float(a), float(b)) for k, (a, b) in expected_ranges(model).items()}
    truth = nets.forward(model, nets.images(model, 64, seed=4))
    for name, (lo, hi) in predicted.items():
        outside = (truth[name] < lo - 1e-6) | (truth[name] > hi + 1e-6)
        assert outside.mean() < 1e-3, name
    conv = model.moments["conv1"]
    mean, std = np.asarray(conv.mean), np.sqrt(np.asarray(conv.var))
    assert predicted["conv1"][0] == pytest.approx(np.min(mean - 6 * std), rel=1e-5)
    assert predicted["conv1"][1] == pytest.approx(np.max(mean + 6 * std), rel=1e-5)
    assert predicted["relu1"] == (0, predicted["conv1"][1])
    assert predicted["relu2"] == (0, min(6.0, predicted["depthwise"][1]))
    assert predicted["maxpool"] == predicted["relu3"]
    assert predicted["pool"][0] == 0
    narrow = expected_ranges(model, sigmas=1.0)["conv1"]
    assert float(narrow[1]) == pytest.approx(np.max(mean + std), rel=1e-5)


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
    model = Model(Graph(nodes, ("x",), ("layer",)), params, InputContract(1, 1), known)
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
