import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import pytest

from dfq_jax.errors import GraphError, UnsupportedModelError
from dfq_jax.graph.graph import Graph, Model, Node, compose
from dfq_jax.graph.ops import Add, Relu
from dfq_jax.graph.query import output_shapes
from dfq_jax.types import InputContract, Moments, Tokens

CHAIN = (Node("a", Relu(), ("x",)), Node("b", Add(), ("a", "x")))


def test_valid_graph_prints_and_indexes():
    graph = Graph(CHAIN, ("x",), ("b",))
    assert str(graph) == "a = Relu(ceiling=None) <- x\nb = Add() <- a, x"
    assert graph["b"] is CHAIN[1]
    with pytest.raises(KeyError, match="'x'"):
        graph["x"]


def test_looking_up_changes_nothing_but_the_time_it_takes():
    graph = Graph(CHAIN, ("x",), ("b",))
    assert graph.by_name is graph.by_name
    assert list(graph.by_name) == ["a", "b"]
    fresh = Graph(CHAIN, ("x",), ("b",))
    assert (graph, hash(graph), repr(graph)) == (fresh, hash(fresh), repr(fresh))
    assert pickle.loads(pickle.dumps(graph)) == copy.deepcopy(graph) == fresh
    other = dataclasses.replace(graph, nodes=CHAIN[:1], outputs=("a",))
    assert list(other.by_name) == ["a"]


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
    model = Model(graph, {"a": {"bias": jnp.arange(3.0)}}, (InputContract(4, 4),), moments)
    doubled = jax.tree.map(lambda v: 2 * v, model)
    assert (doubled.graph, doubled.contract) == (model.graph, model.contract)
    assert doubled.params["a"]["bias"].tolist() == [0, 2, 4]
    assert doubled.moments["a"].var.tolist() == [2, 2]
    other = dataclasses.replace(model, inputs=(InputContract(5, 4),))
    assert jax.tree.structure(other) != jax.tree.structure(model)


def test_a_network_of_tokens_says_what_it_reads():
    nodes = (Node("sum", Add(), ("a", "b")),)
    inputs = (Tokens(4, 100), Tokens(4, mask=True))
    model = Model(Graph(nodes, ("a", "b"), ("sum",)), {}, inputs)
    assert output_shapes(model, 3) == dict.fromkeys(("a", "b", "sum"), (3, 4))
    with pytest.raises(UnsupportedModelError, match=r"4 tokens of 100, a mask of 4"):
        _ = model.contract


def test_inputs_that_are_not_those_of_the_graph_are_refused():
    with pytest.raises(GraphError, match=r"\('x',\) are stated by 3 tokens of 9, a mask of 3"):
        Model(Graph(CHAIN, ("x",), ("b",)), {}, (Tokens(3, 9), Tokens(3, mask=True)))


def test_compose_applies_from_left_to_right(tiny_net):
    def renamed(suffix):
        return lambda m: dataclasses.replace(m, params={k + suffix: v for k, v in m.params.items()})

    both = compose(renamed("1"), renamed("2"))(tiny_net)
    assert list(both.params) == [k + "12" for k in tiny_net.params]
    assert compose()(tiny_net) is tiny_net
