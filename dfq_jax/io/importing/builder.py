"""Collects the nodes of a graph, and stores values in the layouts operators ask for."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.graph import Node
from dfq_jax.graph.ops import Broadcast, Constant, Flatten, Op, Reshape, Slice, Transpose
from dfq_jax.graph.token_ops import Column, Embed, Leading, Present
from dfq_jax.io.importing.values import Atom, Dim, Value, atoms, extent, new_dim, sizes

MOVES_IDS = (Broadcast, Flatten, Reshape, Slice, Transpose)
READS_IDS = (Leading, Column, Embed, Present)
"""Operators that ids are moved by, and those that make something of them."""
HostSlots = dict[str, np.ndarray]
"""The parameters of a node while it is imported, in NumPy."""
Arrays = Mapping[str, np.ndarray]
LARGEST = float(np.finfo(np.float32).max)
MOST_NODES = 100_000
"""Operations a network may have; beyond, it is an attack or a loop written out."""


class Builder:
    """A graph under construction.

    Attributes:
      nodes: so far.
      params: {node: {slot: array}}, float32.
      batch: the atom of the batch, None where the program was traced with a batch of one.
      path: what the node made next should be called: the module path of the call at work.
      ids: stored tensors that hold ids of tokens, with which nothing is computed.
    """

    def __init__(self, batch: Atom | None = None) -> None:
        """An empty graph."""
        self.nodes: list[Node] = []
        self.params: dict[str, dict[str, np.ndarray]] = {}
        self.batch = batch
        self.path = ""
        self.ids: set[str] = set()
        self._made: dict[str, Node] = {}
        self._taken: set[str] = set()
        self._stored: dict[tuple[str, tuple[Dim, ...], tuple[Dim, ...]], str] = {}

    def unique(self, name: str) -> str:
        """`name`, numbered if it is taken."""
        found, count = name, 1
        while found in self._taken:
            count += 1
            found = f"{name}_{count}"
        self._taken.add(found)
        return found

    def add(
        self, op: Op, inputs: Sequence[str] = (), slots: Arrays | None = None, name: str = ""
    ) -> str:
        """Adds a node and returns its name.

        Args:
          op: what it computes.
          inputs: stored tensors it reads.
          slots: its parameters, converted to float32.
          name: what to call it; by default the path of the call at work.

        Raises:
          UnsupportedModelError: if there are too many nodes, one has a number beyond float32, or
            computes with ids of tokens.
        """
        if len(self.nodes) >= MOST_NODES:
            raise UnsupportedModelError(f"the network has more than {MOST_NODES:,} operations.")
        name = self.unique(name or self.path or type(op).__name__.lower())
        self._made[name] = Node(name, with_real_numbers(op), tuple(inputs))
        self.nodes.append(self._made[name])
        if not self.ids.isdisjoint(inputs) and not isinstance(op, READS_IDS):
            if not isinstance(op, MOVES_IDS):
                raise UnsupportedModelError(
                    f"{type(op).__name__} of ids of tokens: they only look up rows of tables, or "
                    "are compared with one number. Let the network read such numbers apart."
                )
            self.ids.add(name)
        if slots:
            self.params[name] = {k: as_float(v) for k, v in slots.items()}
        return name

    def maker(self, name: str) -> Node | None:
        """The node that stores a tensor; None for the input."""
        return self._made.get(name)

    def constant(self, array: np.ndarray, name: str = "") -> str:
        """Adds a tensor of its own; `array` has a leading axis of 1 for the batch."""
        return self.add(Constant(), (), {"value": array}, name or f"{self.path}.constant")

    def value(self, name: str, axes: Sequence[Dim], dims: Sequence[Dim]) -> Value:
        """A value stored by the node `name`."""
        return Value(name, tuple(axes), tuple(dims))

    def stored(self, value: Value, layout: Sequence[Dim]) -> str:
        """The name of a tensor that holds `value` with exactly these axes after the batch.

        Args:
          value: what to store.
          layout: the wanted axes; together the atoms of `value` less the batch's.

        Returns:
          The tensor itself if it is stored so, else that of a reshape or transpose, made once.

        Raises:
          UnsupportedModelError: if the batch would have to leave the first axis.
        """
        layout = tuple(tuple(d) for d in layout)
        if value.axes == layout:
            return value.name
        key = (value.name, value.axes, layout)
        if key not in self._stored:
            self._stored[key] = self._rearranged(value, layout)
        return self._stored[key]

    def _rearranged(self, value: Value, layout: tuple[Dim, ...]) -> str:
        before, after = atoms(value.axes), atoms(layout)
        if set(before) != set(after):
            raise UnsupportedModelError(
                f"{value.name!r} of shape {value.shape} is wanted with sizes {sizes(layout)}: the "
                "batch would leave the first axis. Export the network with a batch of 1."
            )
        name, axes = value.name, value.axes
        if before != after:
            pieces = cut(before, axes, layout, after)
            name = self._reshaped(name, axes, pieces)
            wanted = sorted(pieces, key=lambda piece: after.index(piece[0]))
            order = (0, *(1 + pieces.index(piece) for piece in wanted))
            name = self.add(Transpose(order), (name,), name=f"{value.name}.transpose")
            axes = tuple(wanted)
        return self._reshaped(name, axes, layout)

    def _reshaped(self, name: str, axes: tuple[Dim, ...], layout: tuple[Dim, ...]) -> str:
        if sizes(axes) == sizes(layout):
            return name
        if len(layout) == 1:
            return self.add(Flatten(), (name,), name=f"{name}.flatten")
        return self.add(Reshape(sizes(layout)), (name,), name=f"{name}.reshape")

    def remade(self, value: Value) -> Value:
        """The value stored in row-major order of its source axes, each with one new atom."""
        inner = [tuple(a for a in d if a is not self.batch) for d in value.dims]
        name = self.stored(value, [d for d in inner if d])
        fresh = [new_dim(extent(d)) for d in inner]
        dims = [
            (self.batch, *new) if self.batch is not None and self.batch in old else new
            for old, new in zip(value.dims, fresh, strict=True)
        ]
        return Value(name, tuple(d for d in fresh if d), tuple(dims))

    def inner(self, dim: Dim) -> Dim:
        """An axis without the batch."""
        return tuple(a for a in dim if a is not self.batch)


def cut(
    before: tuple[Atom, ...],
    axes: tuple[Dim, ...],
    layout: tuple[Dim, ...],
    after: tuple[Atom, ...],
) -> tuple[Dim, ...]:
    """Stored atoms in the fewest pieces that are whole in both layouts.

    Args:
      before: atoms in stored order.
      axes: the stored axes.
      layout: the wanted axes.
      after: atoms in wanted order.

    Returns:
      Pieces in stored order; a permutation of them gives the wanted order.
    """
    follows = dict(itertools.pairwise(after))
    ends = {axis[-1] for axis in (*axes, *layout) if axis}
    pieces: list[list[Atom]] = [[]]
    for atom in before:
        last = pieces[-1][-1] if pieces[-1] else None
        if last is not None and (last in ends or follows.get(last) is not atom):
            pieces.append([])
        pieces[-1].append(atom)
    return tuple(tuple(p) for p in pieces)


def as_float(array: np.ndarray) -> np.ndarray:
    """A copy in float32, contiguous: no parameter keeps a whole file alive."""
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused by name
        return np.array(array, np.float32, order="C")


def with_real_numbers(op: Op) -> Op:
    """An operator whose real attributes are floats: files may hold whole numbers in their place.

    Raises:
      UnsupportedModelError: for a number that float32 cannot hold.
    """
    changed = {}
    for field in dataclasses.fields(op):
        value = getattr(op, field.name)
        if field.type not in (float, float | None) or value is None:
            continue
        if not abs(value) <= LARGEST and abs(value) != math.inf:
            text = f"{value!r:.30}"
            raise UnsupportedModelError(f"{type(op).__name__} with {field.name}={text}.")
        changed[field.name] = float(value)
    return dataclasses.replace(op, **changed) if changed else op
