"""Labels of positions along the axes of arrays: those with one label go only together.

Label 0 marks positions that stay.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

Labels = Int[np.ndarray, " _"]
Axes = tuple[Labels, ...]
"""The labels along each axis of an array, batch first."""
Tie = tuple[Labels, Labels]
"""Labels that are the same, place by place; with 0 these positions stay."""


class Read(NamedTuple):
    """A tensor as an operator finds it.

    Attributes:
      axes: its labels.
      silent: whether it is zero wherever all that makes a labelled position is zero.
    """

    axes: Axes
    silent: bool


class Flow(NamedTuple):
    """What an operator does to channels.

    Attributes:
      axes: labels of its output.
      silent: as of what it reads.
      ties: labels that it makes the same.
      slots: labels along the axes of those parameters that lose positions as well.
      factors: whether positive factors on the channels (last axis) of all it reads come out as they
        went in, provided there are as many.
    """

    axes: Axes
    silent: bool = False
    ties: tuple[Tie, ...] = ()
    slots: Mapping[str, Axes] = {}
    factors: bool = False


class Tied:
    """Labels that ties have made the same, each class known by its smallest."""

    def __init__(self, ties: Iterable[Tie] = ()) -> None:
        """Starts with some ties."""
        self.parent: dict[int, int] = {}
        self.tie(ties)

    def root(self, label: int) -> int:
        """The smallest label that is the same."""
        path = [label]
        while (above := self.parent.get(path[-1], path[-1])) != path[-1]:
            path.append(above)
        self.parent |= dict.fromkeys(path[:-1], path[-1])
        return path[-1]

    def tie(self, ties: Iterable[Tie]) -> None:
        """Makes labels the same."""
        for first, second in ties:
            apart = first != second
            for pair in zip(first[apart].tolist(), second[apart].tolist(), strict=True):
                low, high = sorted(map(self.root, pair))
                self.parent[high] = low

    def resolved(self, labels: Labels) -> Labels:
        """The smallest label for each."""
        if not labels.any():
            return labels
        return np.array([self.root(one) for one in labels.tolist()], np.int64)


def stay(size: int) -> Labels:
    """Labels of positions that are never removed."""
    return np.zeros(size, np.int64)


def fixed(*axes: Labels) -> tuple[Tie, ...]:
    """These positions stay."""
    return tuple((labels, stay(len(labels))) for labels in axes if labels.any())


def own_labels(shape: tuple[int, ...], first: int) -> Axes:
    """Labels of their own for all positions but those of the batch and of axes of one."""
    axes = [stay(shape[0])] if shape else []
    for size in shape[1:]:
        axes.append(np.arange(first, first + size) if size > 1 else stay(size))
        first += size if size > 1 else 0
    return tuple(axes)


def alone(axes: Axes) -> bool:
    """Whether the last axis is the only one with positions that could be removed."""
    return not any(labels.any() for labels in axes[:-1])


def alike(rows: Int[np.ndarray, "rows size"]) -> tuple[Tie, ...]:
    """All rows have the labels of the first."""
    return tuple((rows[0], row) for row in rows[1:])


def labelled(axes: Axes) -> bool:
    """Whether there is a label on these axes that is not 0."""
    return any(labels.any() for labels in axes)


def broadcast_labels(x: Axes, y: Axes) -> tuple[Axes, tuple[Tie, ...]]:
    """Labels of two arrays that broadcast against each other, from their last axes."""
    rank = max(len(x), len(y))
    one = [(stay(1),) * (rank - len(axes)) + axes for axes in (x, y)]
    made, ties = [], ()
    for a, b in zip(*one, strict=True):
        if len(a) == len(b):
            made.append(a)
            ties += ((a, b),)
        else:
            made.append(max(a, b, key=len))
            ties += fixed(min(a, b, key=len))
    return tuple(made), ties
