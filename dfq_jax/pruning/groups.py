"""Which channels of a network may go, by the layers that make them; and why others may not."""

import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dfq_jax.base.words import Channels
from dfq_jax.errors import UsageError
from dfq_jax.graph.coupling import Coupling, coupled_channels
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import Add, Maximum, Minimum, Sub
from dfq_jax.graph.query import constants, last_weighted, weighted_nodes
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.moments import expected_moments
from dfq_jax.types import Moments

Structure = tuple[tuple[str, str, int, tuple[int, ...]], ...]
"""(operator, slot, axis from the end, window) of all that channels of a group touch."""


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A network that is to lose channels, and what is known of it.

    Attributes:
      model: with its batch norms in place.
      images: normalised, or rows of ids, for what looks at some; None where nothing does.
    """

    model: Model
    images: Shaped[Array, "n ..."] | None = None

    @property
    def seen(self) -> Shaped[Array, "n ..."]:
        """The images.

        Raises:
          UsageError: if there are none, or no image among them.
        """
        if self.images is None or not len(self.images):
            raise UsageError(
                "this criterion or restoration looks at images, and there are none: synthesize "
                'some, or restore by `restore="udfc"`, which looks at weights alone.'
            )
        return self.images

    def showing(self, images: Shaped[Array, "n ..."] | None) -> "Subject":
        """The same network with images; what is known of it already is not found again."""
        other = Subject(self.model, images)
        of_model = ("coupled", "folded", "expected")
        vars(other).update({name: v for name, v in vars(self).items() if name in of_model})
        return other

    @cached_property
    def coupled(self) -> Coupling:
        """Its channels, by the sets they can only be removed with."""
        return coupled_channels(self.model)

    @cached_property
    def folded(self) -> Model:
        """The same function with batch norms in the layers before them, and their moments."""
        return fold_batch_norm(self.model)

    @cached_property
    def expected(self) -> Mapping[str, Moments]:
        """{tensor of the folded network: mean and variance of its channels}, where known."""
        return expected_moments(self.folded)

    def by_set(
        self, numbers: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " sets"]:
        """Sums over positions with one number of a coupling; those that stay are left out."""
        return np.bincount(numbers, values, len(self.coupled) + 1)[1:]


class Removable(NamedTuple):
    """Channels of some layers that are judged against each other.

    Attributes:
      makers: the layers.
      sets: numbers of what can only be removed together, counted from 0.
      width: channels of the first layer in each of them.
      structure: what they touch, the same for groups that can stand for each other.
    """

    makers: tuple[str, ...]
    sets: tuple[int, ...]
    width: int
    structure: Structure

    @property
    def name(self) -> str:
        """What people call it: its first layer, and how many follow."""
        more = len(self.makers) - 1
        return f"{self.makers[0]} and {more} more" if more else self.makers[0]


class Removables(NamedTuple):
    """What may go.

    Attributes:
      groups: in execution order.
      left: {layer whose channels stay: why}.
    """

    groups: tuple[Removable, ...]
    left: Mapping[str, str]


def removables(
    subject: Subject, *, channels: Channels = "inner", untouched: tuple[str, ...] = ()
) -> Removables:
    """The channels that may go.

    Args:
      subject: the network.
      channels: `inner` leaves alone what sums carry from block to block, since every layer of a
        stage reads it and nothing restores it as well; `all` takes what can be taken.
      untouched: patterns of layers (`layer3.*`) whose channels stay.

    Raises:
      UsageError: for a pattern that matches no layer.
    """
    told = left_alone(subject.model, untouched)
    carried = frozenset() if channels == "all" else carried_by_sums(subject)
    groups, left = [], unremovable(subject)
    for makers, sets in subject.coupled.groups().items():
        told_of = [name for name in makers if name in told]
        if told_of:
            why = f"{told[told_of[0]]} says so"
        elif carried.intersection(sets):
            why = 'a sum carries its channels on (`channels="all"` takes them too)'
        elif len(sets) == 1:
            why = "it has one set of channels, which would leave none"
        else:
            groups.append(Removable(makers, sets, *shape_of(subject, makers[0], sets[0])))
            continue
        left |= {name: why for name in makers if name not in left}
    taken = {name for group in groups for name in group.makers}
    return Removables(tuple(groups), {k: v for k, v in left.items() if k not in taken})


def left_alone(model: Model, patterns: tuple[str, ...]) -> dict[str, str]:
    """{layer: the first pattern that matches it}.

    Raises:
      UsageError: naming a pattern that matches none.
    """
    names = [node.name for node in weighted_nodes(model.graph)]
    found: dict[str, str] = {}
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            some = ", ".join(names[:5])
            raise UsageError(
                f"untouched pattern {pattern!r} matches no layer; layers are called {some}, ... "
                "(`dfq inspect` lists them)."
            )
        found |= {name: f"the pattern {pattern}" for name in matched if name not in found}
    return found


def carried_by_sums(subject: Subject) -> frozenset[int]:
    """The sets, counted from 0, of which a sum of two tensors carries a channel."""
    fixed, found = constants(subject.model.graph), set[int]()
    for node in subject.model.graph.nodes:
        if isinstance(node.op, Add | Sub | Maximum | Minimum) and not fixed & set(node.inputs):
            for numbers in subject.coupled.tensors[node.name]:
                found |= set((numbers[numbers > 0] - 1).tolist())
    return frozenset(found)


def unremovable(subject: Subject) -> dict[str, str]:
    """{layer none of whose channels can go: why}."""
    graph = subject.model.graph
    last = last_weighted(graph)
    able = {name for makers in subject.coupled.makers for name in makers}
    mixed = "what follows mixes its channels, so that a missing one would change the others"
    why = lambda name: "the network returns its channels" if name in last else mixed
    return {n.name: why(n.name) for n in weighted_nodes(graph) if n.name not in able}


def shape_of(subject: Subject, maker: str, first: int) -> tuple[int, Structure]:
    """How many channels of a layer a set has, and what it touches."""
    width, touched = 0, []
    for name, slots in subject.coupled.slots.items():
        op = subject.model.graph[name].op
        for slot, axes in slots.items():
            window = subject.model.params[name][slot].shape[:-2]
            for axis, numbers in enumerate(axes):
                count = int((numbers == first + 1).sum())
                if count:
                    place = axis - len(axes)
                    touched.append((type(op).__name__, slot, place, window))
                    if (name, slot, place) == (maker, "kernel", -1):
                        width = count
    return width, tuple(sorted(touched))
