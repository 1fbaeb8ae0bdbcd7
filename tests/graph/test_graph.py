import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dfq_jax.errors import GraphError
from dfq_jax.graph.graph import Graph, Model, Node, compose
from dfq_jax.graph.ops import Add, Relu
from dfq_jax.types import InputContract, Moments

CHAIN = (Node("a", Relu(), ("x",)), Node("b", Add(), ("a", "x")))


def test_valid_graph_prints_and_indexes():
    graph = Graph(CHAIN, ("x",), ("b",))
    assert str(graph) == "a = Relu(ceiling=None) <- x\nb = Add() <- a, x"
    assert graph["b"] is CHAIN[1]
    with pytest.raises(KeyError, match="'x'"):
        graph["x"]


def test_equal_graphs_are_one_key():
    graphs = {Graph(CHAIN, ("x",), ("b",)), Graph(tuple(CHAIN), ("x",), ("b",))}
    assert len(graphs) == 1
    assert Graph(CHAIN, ("x",), ("a",)) not in graphs


@pytest.mark.parametrize(
    ("nodes", "outputs", "message"),
    [
        (CHAIN[::-1], ("b",), r"node 'b' reads \['a'\], not defined before it"),
        ((*CHAIN, Node("a", Relu(), ("b",))), ("b",), "duplicate node name 'a'"),
        ((*CHAIN, Node("x", Relu(), ("b",))), ("b",), "duplicate node name 'x'"),
        (CHAIN, ("b", "c"), r"graph outputs \['c'\] are defined by no node"),
    ],
)
def test_broken_graphs(nodes, outputs, message):
    with pytest.raises(GraphError, match=message):
        Graph(nodes, ("x",), outputs)


def test_model_is_a_pytree_of_its_arrays():
    graph = Graph(CHAIN, ("x",), ("b",))
    moments = {"a": Moments(jnp.zeros(2), jnp.ones(2))}
    model = Model(graph, {"a": {"bias": jnp.arange(3.0)}}, InputContract(4, 4), moments)
    doubled = jax.tree.map(lambda v: 2 * v, model)
    assert (doubled.graph, doubled.contract) == (model.graph, model.contract)
    assert doubled.params["a"]["bias"].tolist() == [0, 2, 4]
    assert doubled.moments["a"].var.tolist() == [2, 2]
    other = dataclasses.replace(model, contract=InputContract(5, 4))
    assert jax.tree.structure(other) != jax.tree.structure(model)


def test_compose_applies_from_left_to_right(tiny_net):
    def renamed(suffix):
        return lambda m: dataclasses.replace(m, params={k + suffix: v for k, v in m.params.items()})

    both = compose(renamed("1"), renamed("2"))(tiny_net)
    assert list(both.params) == [k + "12" for k in tiny_net.params]
    assert compose()(tiny_net) is tiny_net
