"""Operators of networks that read tokens; they belong to the union in `graph/ops.py`."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One of several numbers of every token: Int[n t k] -> Int[n t]; files have inputs for it."""

    index: int


@dataclasses.dataclass(frozen=True, slots=True)
class Leading:
    """A table's first rows, as many as the ids that are read have tokens.

    Int[n t] -> Float[1 ...], of which each of `axes` has t positions. Slot: value Float[1 ...],
    with as many as there may be tokens along them.
    """

    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Embed:
    """Rows of a table by their numbers: Int[n ...] -> Float[n ... c]. Slot: table Float[ids c]."""


@dataclasses.dataclass(frozen=True, slots=True)
class Present:
    """1 where an id is another than `absent`, 0 elsewhere: Int[n t] -> Float[n t]."""

    absent: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class RmsNorm:
    """x / sqrt(mean of x^2 + eps) over the last axis. Optional slot: scale Float[c]."""

    eps: float = 1e-5


@dataclasses.dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary position embedding: Float[n t heads d] turned in d/2 planes by angles of its place.

    A plane is spanned by one value of the first half of the last axis and the one d/2 behind it.
    Slots: cos, sin Float[t d/2]. Source: Su et al. 2021, "RoFormer", section 3.4.2, whose planes
    are of neighbours; who reads such weights reorders the rows that make x.
    """


OfTokens = Column | Leading | Embed | Present | Rotary
