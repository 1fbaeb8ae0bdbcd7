import jax.numpy as jnp

from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import Add, Relu
from dfq_jax.graph.rewrite import bypass, drop_params, replace_nodes, with_params

NODES = (
    Node("a", Relu(), ("x",)),
    Node("b", Relu(), ("a",)),
    Node("c", Add(), ("b", "a")),
    Node("d", Relu(), ("c",)),
)
GRAPH = Graph(NODES, ("x",), ("d", "b"))


def test_replace_nodes_keeps_the_places():
    new = Node("b", Relu(6.0), ("x",))
    changed = replace_nodes(GRAPH, {"b": new})
    assert changed.nodes == (NODES[0], new, *NODES[2:])
    assert (changed.inputs, changed.outputs) == (GRAPH.inputs, GRAPH.outputs)
    assert GRAPH["b"] is NODES[1]


def test_bypass_rewires_readers_outputs_and_chains():
    short = bypass(GRAPH, ["a", "b", "d"])
    assert short.nodes == (Node("c", Add(), ("x", "x")),)
    assert short.outputs == ("c", "x")
    assert bypass(GRAPH, []) == GRAPH


def test_with_params_adds_and_replaces_without_touching_the_original(tiny_net):
    before = {k: dict(v) for k, v in tiny_net.params.items()}
    new = with_params(tiny_net, {"conv1": {"bias": jnp.ones(6)}, "fc": {"bias": jnp.zeros(5)}})
    assert set(new.params["conv1"]) == {"kernel", "bias"}
    assert new.params["conv1"]["kernel"] is before["conv1"]["kernel"]
    assert new.params["fc"]["bias"].tolist() == [0] * 5
    assert tiny_net.params == before
    assert set(with_params(tiny_net, {"relu1": {"ceiling": jnp.ones(1)}}).params) == {
        *before,
        "relu1",
    }


def test_drop_params(tiny_net):
    assert set(drop_params(tiny_net.params, ["bn1", "relu1"])) == set(tiny_net.params) - {"bn1"}
