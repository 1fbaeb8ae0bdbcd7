"""Norms that a network spells out compute in float, from squares to what is divided by them."""

import pytest

from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import (
    Activation,
    Add,
    Constant,
    Linear,
    Mul,
    Power,
    Reduce,
    Relu,
    Reshape,
    Scale,
    Sub,
)
from dfq_jax.quantization.sites import float_operators
from dfq_jax.quantization.standardised import standardising

MEAN = Reduce("mean", (1,), keepdims=True)


def norm(square="mul", root="sqrt", gap=True) -> tuple[Node, ...]:
    """Mean of squares less the squared mean, as Flax writes its norms, between two layers."""
    squares = Node("x2", Mul(), ("x", "x")) if square == "mul" else Node("x2", Power(2.0), ("x",))
    inverse = (
        (Node("root", Activation("sqrt"), ("eps",)), Node("inverse", Power(-1.0), ("root",)))
        if root == "sqrt"
        else (Node("inverse", Power(-0.5), ("eps",)),)
    )
    return (
        Node("x", Linear(), ("images",)),
        squares,
        Node("mean", MEAN, ("x",)),
        Node("of_squares", MEAN, ("x2",)),
        Node("mean2", Mul(), ("mean", "mean")),
        Node("variance", Sub(), ("of_squares", "mean2")),
        Node("positive", Relu(), ("variance",)),
        Node("eps", Scale(1.0, 1e-6), ("positive" if gap else "of_squares",)),
        *inverse,
        Node("scale", Constant(), ()),
        Node("gain", Mul(), ("inverse", "scale")),
        Node("centred", Sub(), ("x", "mean")),
        Node("scaled", Mul(), ("centred" if gap else "x", "gain")),
        Node("shift", Constant(), ()),
        Node("shifted", Add(), ("scaled", "shift")),
        Node("flat", Reshape((8,)), ("shifted",)),
        Node("last", Linear(), ("flat",)),
    )


@pytest.mark.parametrize("square", ["mul", "power"])
@pytest.mark.parametrize("root", ["sqrt", "power"])
def test_a_norm_by_mean_squares_is_found_whole(square, root):
    graph = Graph(norm(square, root), ("images",), ("last",))
    found = standardising(graph)
    assert found - {"root"} == {
        *("x2", "mean", "of_squares", "mean2", "variance", "positive", "eps", "inverse", "gain"),
        *("centred", "scaled", "shifted", "flat"),
    }
    floats = float_operators(graph)
    assert found <= floats.keys()
    assert not {"x", "last", "scale", "shift"} & floats.keys()


def test_a_norm_by_root_mean_square_leaves_what_it_divides():
    graph = Graph(norm(gap=False), ("images",), ("last",))
    found = standardising(graph)
    assert {"x2", "of_squares", "gain", "scaled"} <= found
    assert "x" not in found


@pytest.mark.parametrize("source", ["images", "x"])
def test_roots_of_other_things_are_none(source):
    """A root of an input, or of what a layer makes, is no deviation."""
    nodes = (
        Node("x", Linear(), ("images",)),
        Node("shifted", Scale(1.0, 3.0), (source,)),
        Node("root", Activation("sqrt"), ("shifted",)),
        Node("last", Linear(), ("root",)),
    )
    assert standardising(Graph(nodes, ("images",), ("last",))) == frozenset()


def test_a_root_of_a_sum_of_other_things_than_squares_is_none():
    nodes = (
        Node("x", Linear(), ("images",)),
        Node("sum", MEAN, ("x",)),
        Node("root", Activation("sqrt"), ("sum",)),
        Node("last", Linear(), ("root",)),
    )
    assert standardising(Graph(nodes, ("images",), ("last",))) == frozenset()
