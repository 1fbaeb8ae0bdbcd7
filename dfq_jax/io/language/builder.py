"""Writes a network of tokens down node by node, its weights with it."""

import math
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import (
    Compare,
    Constant,
    Linear,
    MatMul,
    Op,
    Reshape,
    Select,
    Softmax,
    Transpose,
)
from dfq_jax.types import Tokens

LOWEST = -1e9
"""The score of what is not attended to: nothing is left of it behind a softmax."""
IDS = "input_ids"
"""What the networks here read."""

Weights = Float[np.ndarray, "..."]


class Heads(NamedTuple):
    """The heads of an attention.

    Attributes:
      queries: how many heads ask.
      keys: how many answer; several that ask share one that answers.
      size: values of each.
    """

    queries: int
    keys: int
    size: int

    @property
    def sharers(self) -> int:
        """How many that ask share one that answers."""
        return self.queries // self.keys


class TokenNetwork:
    """Collects nodes and weights; lives only while a network is built.

    Attributes:
      read: the rows of ids.
    """

    def __init__(self, read: Tokens) -> None:
        """An empty network that reads these ids."""
        self.read = read
        self._nodes: list[Node] = []
        self._params: dict[str, dict[str, jax.Array]] = {}

    def add(self, name: str, op: Op, *inputs: str, **slots: Weights) -> str:
        """Adds a node with its parameters, and returns its name."""
        self._nodes.append(Node(name, op, inputs))
        if slots:
            arrays = {slot: np.ascontiguousarray(v, np.float32) for slot, v in slots.items()}
            self._params[name] = {slot: jax.device_put(v) for slot, v in arrays.items()}
        return name

    def constant(self, name: str, value: Weights) -> str:
        """Adds a tensor that is the same for every row of ids; `value` is without batch."""
        return self.add(name, Constant(), value=np.asarray(value)[None])

    def linear(self, name: str, x: str, weight: Weights, bias: Weights | None = None) -> str:
        """Adds a layer whose weight is stored as (outputs, inputs)."""
        slots = {"kernel": weight.T} | ({} if bias is None else {"bias": bias})
        return self.add(name, Linear(), x, **slots)

    def split(self, name: str, x: str, heads: int, size: int) -> str:
        """Adds the values of every head apart: (n, t, heads * size) -> (n, t, heads, size)."""
        return self.add(name, Reshape((self.read.length, heads, size)), x)

    def attended(self, name: str, parts: tuple[str, str, str], heads: Heads, mask: str) -> str:
        """Adds an attention.

        Args:
          name: of its nodes, before a dot.
          parts: queries, keys and values, (n, t, heads, size); the queries are scaled already.
          heads: how many there are.
          mask: not 0 where the token of a column may be looked at by that of a row; as many axes
            as scores have, (n, heads that answer, rows of all that share it, columns).

        Returns:
          What they found, (n, t, heads that ask * size).
        """
        length = self.read.length
        first = lambda what, x: self.add(f"{name}.{what}", Transpose((0, 2, 1, 3)), x)
        q, k, v = map(first, ("queries", "keys", "values"), parts)
        if heads.sharers > 1:
            shape = (heads.keys, heads.sharers * length, heads.size)
            q = self.add(f"{name}.shared", Reshape(shape), q)
        scores = self.add(f"{name}.scores", MatMul(transposed=True), q, k)
        lowest = self.constant(f"{name}.lowest", np.full((1, 1, 1), LOWEST))
        seen = self.add(f"{name}.seen", Select(), mask, scores, lowest)
        chances = self.add(f"{name}.chances", Softmax(-1), seen)
        found = self.add(f"{name}.found", MatMul(), chances, v)
        if heads.sharers > 1:
            found = self.add(f"{name}.apart", Reshape((heads.queries, length, heads.size)), found)
        found = first("joined", found)
        return self.add(f"{name}.flat", Reshape((length, heads.queries * heads.size)), found)

    def causal(self, name: str, sharers: int) -> str:
        """Adds the mask by which no token looks at later ones, for so many heads on one."""
        places = np.arange(self.read.length, dtype=np.float32)
        rows = self.constant(f"{name}.row", np.tile(places, sharers)[None, :, None])
        columns = self.constant(f"{name}.column", places[None, None, :])
        return self.add(name, Compare("greater_equal"), rows, columns)

    def finish(self, *outputs: str) -> Model:
        """The network."""
        return Model(Graph(tuple(self._nodes), (IDS,), outputs), self._params, (self.read,))


def scaled_queries(weights: Weights, size: int) -> Weights:
    """Weights or biases of queries divided by `sqrt(size)`, so that scores need not be."""
    return weights * np.float32(1 / math.sqrt(size))
