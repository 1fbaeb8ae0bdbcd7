"""Small networks around one operator, on images brought into any form."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import GlobalAvgPool, Op, Reshape, Transpose
from dfq_jax.types import InputContract

RNG = np.random.default_rng(0)
Draw = Callable[[st.SearchStrategy], Any]


class Case(NamedTuple):
    """A small network around one operator."""

    nodes: tuple[Node, ...]
    params: dict[str, dict[str, np.ndarray]]
    shape: tuple[int, int, int]


def network(case: Case, *outputs: str) -> Model:
    """The network, returning its last node unless told otherwise."""
    h, w, c = case.shape
    params = {
        name: {slot: jnp.asarray(v, jnp.float32) for slot, v in slots.items()}
        for name, slots in case.params.items()
    }
    graph = Graph(case.nodes, ("images",), outputs or (case.nodes[-1].name,))
    return Model(graph, params, (InputContract(h, w, (0.5,) * c, (0.25,) * c),))


def prefix(form: str, shape: tuple[int, int, int]) -> tuple[tuple[Node, ...], tuple[int, ...]]:
    """Nodes that bring images into a form, and the shape of the last one without rows."""
    h, w, c = shape
    match form:
        case "first":
            return (), shape
        case "stored":
            return (Node("in", Transpose((0, 2, 1, 3)), ("images",)),), (w, h, c)
        case "tokens":
            return (Node("in", Reshape((h * w, c)), ("images",)),), (h * w, c)
        case "split":
            return (Node("in", Reshape((h, w, 1, c)), ("images",)),), (h, w, 1, c)
        case "cut":
            return (Node("in", Reshape((1, h, w, c)), ("images",)),), (1, h, w, c)
        case _:
            return (Node("in", GlobalAvgPool(), ("images",)),), (c,)


def alone(op: Op, form: str, shape: tuple[int, int, int], **slots: np.ndarray) -> Case:
    """One operator behind its prefix."""
    nodes, _ = prefix(form, shape)
    name = nodes[-1].name if nodes else "images"
    return Case((*nodes, Node("op", op, (name,))), {"op": slots} if slots else {}, shape)


def normal(*shape: int) -> np.ndarray:
    """Normal numbers."""
    return RNG.normal(size=shape)


forms = st.sampled_from(("first", "stored", "tokens", "vector", "split", "cut"))
"""Images as they come; rank 4 held as stored; rank 3; rank 2; rank 5, held both ways."""
image_forms = st.sampled_from(("first", "stored"))
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
either_end = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))
wide = st.tuples(either_end(0, 2), either_end(0, 2))
cuts = st.tuples(either_end(0, 1), either_end(0, 1)) | st.tuples(
    either_end(-2, 1), either_end(-1, 1)
)
numbers = st.sampled_from((-2.0, -0.5, 0.0, 0.25, 1.0, 3.0))


def shapes(*channels: int) -> st.SearchStrategy[tuple[int, int, int]]:
    """(height, width, channels)."""
    size = st.integers(5, 9)
    return st.tuples(size, size, st.sampled_from(channels or (1, 4, 6)))


def any_form(*ops: Op) -> Callable[[Draw], Case]:
    """One of these operators in any form."""
    return lambda draw: alone(draw(st.sampled_from(ops)), draw(forms), draw(shapes()))
