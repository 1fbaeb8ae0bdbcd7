"""Operators of networks that read tokens; they belong to the union in `graph/ops.py`."""

import dataclasses


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


OfTokens = Embed | Present | Rotary
