"""Tensors of a traced program, followed through views without moving a byte.

A source axis is a row-major product of *atoms*. A view, a permutation, a squeeze only regroup
atoms; the stored tensor stays as it is until an operator asks for a layout (`Builder.stored`).
So transposes that would meet and cancel are never made, and NCHW programs become NHWC graphs
by asking convolutions for their channels last.

The batch is the first stored axis and carries no atom when the program was traced with a batch of
one: its axes of size 1 have no atoms either. In a program traced with a larger batch one atom
stands for it, in `dims` only.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_jax.errors import UnsupportedModelError


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Atom:
    """An indivisible piece of an axis; two atoms are equal only if they are one object."""

    size: int

    def __repr__(self) -> str:
        """Size and identity."""
        return f"{self.size}@{id(self) % 10000}"


Dim = tuple[Atom, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """A tensor that depends on the network's input.

    Attributes:
      name: the graph node (or input) that stores it.
      axes: its stored axes after the batch, each a row-major product of atoms.
      dims: its axes in the source program; the same atoms, and maybe the batch's.
    """

    name: str
    axes: tuple[Dim, ...]
    dims: tuple[Dim, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the source axes."""
        return sizes(self.dims)


Literal = Value | np.ndarray | int | float | bool | str | None | tuple[Any, ...]
"""What an argument of a call can be."""


def sizes(dims: Iterable[Dim]) -> tuple[int, ...]:
    """The size of each axis."""
    return tuple(extent(d) for d in dims)


def extent(dim: Dim) -> int:
    """The size of one axis."""
    return math.prod(a.size for a in dim)


def atoms(dims: Iterable[Dim]) -> tuple[Atom, ...]:
    """All atoms of some axes in order."""
    return tuple(a for d in dims for a in d)


def new_dim(size: int) -> Dim:
    """An axis of its own; one of size 1 needs no atom."""
    return () if size == 1 else (Atom(size),)


def substituted(value: Value, parts: Mapping[Atom, Dim]) -> Value:
    """The same value with some atoms written as products of others."""
    if not parts:
        return value
    swap = lambda dims: tuple(tuple(p for a in d for p in parts.get(a, (a,))) for d in dims)
    return dataclasses.replace(value, axes=swap(value.axes), dims=swap(value.dims))


def apart_from(value: Value, other: Value, shared: Iterable[Atom | None]) -> Value:
    """The same value with new atoms in place of those of `other` that are not `shared`.

    Two axes of one tensor may meet as different axes (`x + x.mT`); atoms that mean the same
    position in both values are `shared`.
    """
    clash = set(atoms(other.dims)) & set(atoms(value.dims)) - set(shared)
    return substituted(value, {a: (Atom(a.size),) for a in clash})


class Irregular(Exception):
    """Axes that cannot be regrouped without moving values into a common axis first."""


def regrouped_axes(
    source: Sequence[Atom], shape: Sequence[int], batch: Atom | None
) -> tuple[tuple[Dim, ...], dict[Atom, Dim]]:
    """The axes of a row-major view.

    Args:
      source: atoms of the tensor, in row-major order.
      shape: sizes of the wanted axes; their product is that of the atoms.
      batch: the atom of the batch, which must stay whole.

    Returns:
      The axes, and {atom: the two atoms it was split into}, outermost splits first.

    Raises:
      Irregular: if an axis boundary falls inside no divisor of an atom.
      UnsupportedModelError: if it falls inside the batch.
    """
    queue, splits, dims = list(source), {}, []
    for size in shape:
        dim: list[Atom] = []
        while size > 1:
            if not queue:
                raise Irregular
            atom = queue.pop(0)
            if size % atom.size == 0:
                dim.append(atom)
                size //= atom.size
            elif atom.size % size == 0:
                if atom is batch:
                    raise UnsupportedModelError(
                        "a view cuts the batch into pieces; export the network with a batch of 1."
                    )
                parts = Atom(size), Atom(atom.size // size)
                splits[atom] = parts
                dim.append(parts[0])
                queue.insert(0, parts[1])
                size = 1
            else:
                raise Irregular
        dims.append(tuple(dim))
    return tuple(dims), splits


def split_all(value: Value, splits: Mapping[Atom, Dim]) -> Value:
    """The value with splits applied one after the other."""
    for atom, parts in splits.items():
        value = substituted(value, {atom: parts})
    return value


def matching_atoms(x: Value, y: Value, pairs: Iterable[tuple[Dim, Dim]]) -> tuple[Value, Value]:
    """Two values whose paired axes, of equal sizes, consist of the very same atoms.

    Args:
      x: one value.
      y: the other.
      pairs: (axis of x, axis of y).

    Returns:
      Both, atoms split as far as needed, those of `y` replaced by those of `x`.

    Raises:
      Irregular: if two axes have no common factors.
    """
    for mine, theirs in pairs:
        left, right = list(mine), list(theirs)
        while left and right:
            a, b = left.pop(0), right.pop(0)
            if a is b:
                continue
            small = min(a.size, b.size)
            if a.size % small or b.size % small:
                raise Irregular
            if a.size > small:
                parts = (Atom(small), Atom(a.size // small))
                x, left, a = substituted(x, {a: parts}), [parts[1], *left], parts[0]
            if b.size > small:
                parts = (Atom(small), Atom(b.size // small))
                y, right, b = substituted(y, {b: parts}), [parts[1], *right], parts[0]
            y = substituted(y, {b: (a,)})
    return x, y
