import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import GraphError
from dfq_jax.graph.evaluate import chained, evaluate
from dfq_jax.graph.graph import Edge, Graph, Model, Node
from dfq_jax.graph.ops import Add, AvgPool, BatchNorm, Conv2d, MaxPool, Relu
from dfq_jax.graph.semantics import apply_op
from dfq_jax.types import InputContract

CONTRACT = InputContract(4, 4)


@pytest.mark.parametrize("name", ["tiny_net", "mixed_net"])
def test_every_tensor_matches_numpy(name, nets, request):
    model = request.getfixturevalue(name)
    x = nets.images(model, 3, seed=7)
    names = (*model.graph.inputs, *(n.name for n in model.graph.nodes))
    outputs, taps = jax.jit(lambda m, x: evaluate(m, x, taps=names))(model, x)
    truth = nets.forward(model, x)
    np.testing.assert_allclose(outputs[0], truth[model.graph.outputs[0]], rtol=1e-5, atol=1e-5)
    assert set(taps) == set(names)
    for name in names:
        scale = np.abs(truth[name]).max()
        np.testing.assert_allclose(taps[name], truth[name], rtol=1e-5, atol=1e-5 * scale)


def test_taps_come_in_the_order_of_execution(tiny_net, nets):
    x = nets.images(tiny_net, 2)
    wanted = ("fc", Edge("add", 1), "images", Edge("bn3"), "relu1")
    _, taps = evaluate(tiny_net, x, taps=wanted)
    assert list(taps) == ["images", "relu1", Edge("bn3", 0), Edge("add", 1), "fc"]
    assert taps[Edge("add", 1)] is taps["relu1"]


def test_chained_hooks_see_what_those_before_left(tiny_net):
    double = lambda node, slots, args: (slots, tuple(2 * x for x in args))
    more = lambda node, slots, args: ({**slots, "more": args[0]}, tuple(x + 1 for x in args))
    slots, args = chained(double, more)(tiny_net.graph["fc"], {}, (jnp.array(3),))
    assert (slots, args) == ({"more": 6}, (7,))


def channels_first(x):
    return np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1))


@pytest.mark.torch
@pytest.mark.parametrize("counted", [True, False])
def test_pooling_matches_torch(counted):
    torch = pytest.importorskip("torch")
    x = -1 - jax.random.uniform(jax.random.key(0), (2, 7, 6, 3))  # all negative: padding must lose
    pads = ((1, 1), (1, 1))
    ours = apply_op(MaxPool((3, 3), (2, 2), pads), {}, x)
    theirs = torch.nn.functional.max_pool2d(torch.tensor(channels_first(x)), 3, 2, 1)
    np.testing.assert_array_equal(channels_first(ours), theirs)
    ours = apply_op(AvgPool((3, 3), (2, 2), pads, counted), {}, x)
    theirs = torch.nn.functional.avg_pool2d(
        torch.tensor(channels_first(x)), 3, 2, 1, count_include_pad=counted
    )
    np.testing.assert_allclose(channels_first(ours), theirs, rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_matches_torch(affine):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, mean, scale, bias = (rng.normal(size=s).astype(np.float32) for s in [(2, 3, 3, 4), 4, 4, 4])
    var = rng.uniform(0.01, 2, 4).astype(np.float32)
    p = {"mean": mean, "var": var} | ({"scale": scale, "bias": bias} if affine else {})
    ours = apply_op(BatchNorm(1e-3), jax.tree.map(jnp.asarray, p), jnp.asarray(x))
    theirs = torch.nn.functional.batch_norm(
        *map(torch.tensor, (channels_first(x), mean, var)),
        *(map(torch.tensor, (scale, bias)) if affine else ()),
        eps=1e-3,
    )
    np.testing.assert_allclose(channels_first(ours), theirs, rtol=1e-5, atol=1e-5)


def test_relu_ceilings():
    x = jnp.array([-1.0, 0.5, 6.0, 7.0])
    assert apply_op(Relu(), {}, x).tolist() == [0, 0.5, 6, 7]
    assert apply_op(Relu(6.0), {}, x).tolist() == [0, 0.5, 6, 6]


def test_hook_edits_what_taps_see_and_nodes_compute():
    graph = Graph((Node("r", Relu(), ("x",)), Node("s", Add(), ("r", "x"))), ("x",), ("s", "r"))
    model = Model(graph, {"r": {"bias": jnp.ones(1)}}, (CONTRACT,))
    seen = []

    def hook(node, slots, args):
        seen.append((node.name, dict(slots), len(args)))
        return slots, tuple(a - 1 for a in args)

    (s, r), taps = evaluate(
        model, jnp.array([3.0, -2.0]), taps=[Edge("s"), Edge("s", 1), "s"], hook=hook
    )
    assert r.tolist() == [2, 0]
    assert [taps[Edge("s", i)].tolist() for i in range(2)] == [[1, -1], [2, -3]]
    assert taps["s"] is s
    assert s.tolist() == [3, -4]
    assert seen == [("r", {"bias": jnp.ones(1)}, 1), ("s", {}, 2)]


def test_apply_replaces_the_semantics():
    graph = Graph((Node("r", Relu(), ("x",)),), ("x",), ("r",))
    double = lambda node, slots, args: 2 * args[0]
    outputs, _ = evaluate(Model(graph, {}, (CONTRACT,)), jnp.array([-1.0]), apply=double)
    assert outputs[0].tolist() == [-2]


def test_wrong_number_of_inputs_and_unknown_taps(tiny_net):
    x = jnp.zeros((1, 8, 8, 3))
    with pytest.raises(GraphError, match=r"network has inputs \('images',\), got 2 arrays"):
        evaluate(tiny_net, x, x)
    with pytest.raises(GraphError, match="has no argument 1 of 'fc', bn9, which"):
        jax.eval_shape(lambda m, x: evaluate(m, x, taps=["bn1", Edge("fc", 1), "bn9"]), tiny_net, x)


def test_new_parameters_do_not_retrace(tiny_net, nets):
    x = nets.images(tiny_net, 2)
    run = jax.jit(chex.assert_max_traces(lambda m, x: evaluate(m, x)[0][0], n=1))
    first = run(tiny_net, x)
    second = run(jax.tree.map(lambda v: v * 1.1, tiny_net), x)
    assert not np.allclose(first, second)


def test_node_names_reach_the_compiled_program(tiny_net, nets):
    lowered = jax.jit(lambda x: evaluate(tiny_net, x)[0]).lower(nets.images(tiny_net, 2))
    text = lowered.as_text(debug_info=True)
    assert "depthwise/" in text
    assert "project/" in text


def test_convolution_adds_its_bias():
    p = {"kernel": jnp.ones((1, 1, 1, 2)), "bias": jnp.array([1.0, -1.0])}
    assert apply_op(Conv2d(), p, jnp.full((1, 1, 1, 1), 5.0)).ravel().tolist() == [6, 4]
