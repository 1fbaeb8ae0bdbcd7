import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import (
    Activation,
    Add,
    Clip,
    Concat,
    Constant,
    Conv2d,
    GlobalAvgPool,
    LeakyRelu,
    Linear,
    Maximum,
    MaxPool,
    Mul,
    PRelu,
    Reduce,
    Relu,
    Reshape,
    Scale,
    Softmax,
)
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.ranges import bounds, expected_ranges, gates, nonnegative
from dfq_jax.types import InputContract, Moments

MODERN = ("dense", "inception", "shuffle", "excite", "vit", "convnext", "unet", "two_heads")
compiled = jax.jit(expected_ranges, static_argnames="sigmas")


def ends(ranges):
    return {k: (float(a), float(b)) for k, (a, b) in ranges.items()}


def test_expected_ranges_cover_what_happens(tiny_net, nets):
    model = fold_batch_norm(tiny_net)
    predicted = ends(compiled(model))
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
    assert "images" not in predicted
    narrow = expected_ranges(model, sigmas=1.0)["conv1"]
    assert float(narrow[1]) == pytest.approx(np.max(mean + std), rel=1e-5)


@pytest.mark.parametrize("name", ["excite", "convnext", "dense"])
def test_parameters_of_numpy_give_the_ranges_of_jax(name, nets):
    model = fold_batch_norm(getattr(nets, name)())
    ours, theirs = expected_ranges(jax.device_get(model)), compiled(model)
    assert list(ours) == [n.name for n in model.graph.nodes if n.name in theirs]
    for tensor, found in ours.items():
        assert all(isinstance(end, np.ndarray | np.generic) for end in found), tensor
        np.testing.assert_allclose(found, theirs[tensor], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODERN)
def test_modern_networks_stay_inside(name, nets):
    model = fold_batch_norm(getattr(nets, name)())
    predicted = ends(compiled(model))
    lo, hi = model.contract.value_range
    x = np.clip(nets.images(model, 64, seed=4), lo, hi)
    truth = nets.forward(model, x)
    for tensor, (lo, hi) in predicted.items():
        outside = (truth[tensor] < lo - 1e-5) | (truth[tensor] > hi + 1e-5)
        assert outside.mean() < 3e-3, tensor
        assert np.isfinite([lo, hi]).all()


def test_what_is_known_of_networks_without_statistics(nets):
    found = ends(expected_ranges(nets.vit()))
    token = np.asarray(nets.vit().params["token"]["value"])
    assert set(found) == {"token", "places", "attention0.weights", "attention1.weights"}
    assert found["token"] == (float(token.min()), float(token.max()))
    assert found["attention1.weights"] == (0, 1)


def test_gates_leave_the_range_of_what_they_gate(nets):
    found = ends(expected_ranges(fold_batch_norm(nets.excite())))
    assert found["gate0"] == found["gate1"] == (0, 1)
    lo, hi = found["depthwise0.act"]
    assert (lo, hi) == pytest.approx((min(lo, 0), max(hi, 0)))
    assert found["excite0"] == pytest.approx((lo, hi))
    assert lo == pytest.approx(-0.27846, abs=1e-3)  # the least value of SiLU
    assert found["depthwise1.act"][0] == pytest.approx(-0.375, abs=1e-3)  # of hard swish


def imposed(op, *read, slots=None, tame=False):
    pairs = [None if r is None else tuple(map(jnp.float32, r)) for r in read]
    slots = {k: jnp.asarray(v, jnp.float32) for k, v in (slots or {}).items()}
    found = bounds(op, pairs, slots, tame)
    return None if found is None else tuple(float(v) for v in found)


@pytest.mark.parametrize(
    ("op", "wanted"),
    [
        (Relu(), (0, 4)),
        (Relu(3.0), (0, 3)),
        (Clip(-1.0, 1.0), (-1, 1)),
        (Clip(None, 2.0), (-2, 2)),
        (LeakyRelu(0.25), (-0.5, 4)),
        (Scale(-2.0, 1.0), (-7, 5)),
        (Activation("tanh"), (-1, 1)),
        (Activation("sigmoid"), (0, 1)),
        (Activation("hard_sigmoid"), (0, 1)),
        (Softmax(), (0, 1)),
        (MaxPool((2, 2), (2, 2)), (-2, 4)),
        (Reshape((7,)), (-2, 4)),
        (Activation("exp"), None),
        (Activation("sqrt"), None),
        (Linear(), None),
        (GlobalAvgPool(), None),  # by moments first
    ],
    ids=str,
)
def test_ranges_through_one_operator(op, wanted):
    assert imposed(op, (-2, 4)) == (None if wanted is None else pytest.approx(wanted, abs=1e-5))


def test_slopes_of_channels():
    slots = {"slope": [0.5, -2.0]}
    assert imposed(PRelu(), (-2, 4), slots=slots) == pytest.approx((-1, 4), abs=1e-5)
    assert imposed(PRelu(), (-3, 4), slots=slots) == pytest.approx((-1.5, 6), abs=1e-5)


def test_ranges_of_two_tensors():
    assert imposed(Concat(3), (-2, 4), (0, 6), (-1, 1)) == (-2, 6)
    assert imposed(Concat(3), (-2, 4), None) is None
    assert imposed(Mul(), (-2, 4), (0, 1), tame=True) == (-2, 4)
    assert imposed(Mul(), (2, 4), (-3, 1), tame=True) == (-12, 4)
    assert imposed(Mul(), (-2, 4), None, tame=True) is None
    assert imposed(Mul(), (-2, 4), (0, 1)) is None
    assert imposed(Add(), (-2, 4), (0, 1)) is None
    assert imposed(Constant(), slots={"value": [[3.0, -1.0]]}) == (-1, 3)


@pytest.mark.parametrize(
    "op", [Relu(), LeakyRelu(), Clip(0.0, 1.0), Concat(1), MaxPool((1, 1), (1, 1))]
)
def test_nothing_follows_from_nothing(op):
    assert imposed(op, None) is None


def test_averages_without_moments_lie_inside():
    nodes = (
        Node("scaled", Scale(2.0), ("x",)),
        Node("mean", Reduce("mean", (1, 2)), ("scaled",)),
        Node("fc", Linear(), ("mean",)),
    )
    params = {"fc": {"kernel": jnp.ones((1, 2))}}
    contract = InputContract(2, 2, mean=(0.0,), std=(1.0,))
    found = ends(expected_ranges(Model(Graph(nodes, ("x",), ("fc",)), params, (contract,))))
    assert found == {"scaled": (0, 2), "mean": (0, 2)}


def test_signs_and_gates():
    nodes = (
        Node("c", Conv2d(), ("x",)),
        Node("r", Relu(), ("c",)),
        Node("s", Activation("sigmoid"), ("c",)),
        Node("sum", Add(), ("r", "s")),
        Node("mixed", Add(), ("r", "c")),
        Node("least", Maximum(), ("sum", "r")),
        Node("pool", GlobalAvgPool(keepdims=True), ("s",)),
        Node("limited", Clip(0.5, None), ("c",)),
        Node("leak", LeakyRelu(), ("c",)),
        Node("soft", Activation("softplus"), ("c",)),
    )
    graph = Graph(nodes, ("x",), ("sum",))
    assert gates(graph) == {"s", "pool"}
    assert nonnegative(graph) == {"r", "s", "sum", "least", "pool", "limited", "soft"}


def test_a_steep_slope_counts_for_its_own_channel():
    """Channels of deviation 1 and 10, slopes -4 and 0.5: the steep one is the narrow one."""
    graph = Graph(
        (
            Node("layer", Linear(), ("images",)),
            Node("bent", PRelu(), ("layer",)),
            Node("last", Linear(), ("bent",)),
        ),
        ("images",),
        ("last",),
    )
    params = {
        "layer": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)},
        "bent": {"slope": jnp.array([-4.0, 0.5])},
        "last": {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)},
    }
    moments = {"layer": Moments(jnp.array([1.0, 0.0]), jnp.array([1.0, 100.0]))}
    model = Model(graph, params, (InputContract(1, 1, (0.0,) * 2, (1.0,) * 2),), moments)
    found = ends(expected_ranges(model, sigmas=6.0))
    assert found["layer"] == pytest.approx((-60, 60), rel=1e-5)
    assert found["bent"] == pytest.approx((-30, 60), rel=1e-5)
