"""How many channels every layer keeps, and which: a share of all, or of every layer."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dfq_jax.base.words import Rivals
from dfq_jax.errors import UsageError
from dfq_jax.graph.coupling import Coupling
from dfq_jax.numerics.importance import normalised
from dfq_jax.passes.select import Kept
from dfq_jax.pruning.criteria import SetScores
from dfq_jax.pruning.groups import Removable

MOST = 0.9
"""Share of a group's channels that may go where groups compete: none is emptied for the others."""


class Floor(NamedTuple):
    """What every layer keeps at the least, and in what numbers.

    Attributes:
      least: channels.
      round_to: channels kept are a multiple of it, or all.
    """

    least: int = 1
    round_to: int = 1

    def kept(self, group: Removable, wanted: float) -> int:
        """How many sets of a group stay where so many are wanted.

        Args:
          group: of which.
          wanted: any number; rounded to the nearest multiple, of two the larger.
        """
        size, step = len(group.sets), self.step(group)
        floor = min(max(math.ceil(self.least / max(group.width, 1)), 1), size)
        nearest = step * math.floor(wanted / step + 0.5 + 1e-9)
        return min(max(nearest, step * math.ceil(floor / step)), size)

    def step(self, group: Removable) -> int:
        """Sets that make a multiple of channels."""
        return self.round_to // math.gcd(self.round_to, max(group.width, 1))


ALL_BUT_ONE = Floor()
"""The floor of a layer of which nobody asks for more."""


class Chosen(NamedTuple):
    """Which channels stay.

    Attributes:
      kept: for every set of the coupling.
      notes: what was not done as asked, in sentences.
    """

    kept: Kept
    notes: tuple[str, ...] = ()


def check_floor(floor: Floor) -> None:
    """Refuses numbers of channels that are none.

    Raises:
      UsageError: naming it.
    """
    for name, value in floor._asdict().items():
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"{name} is a number of channels, 1 or more; got {value!r}.")


def share_from(told: str | float) -> float:
    """A share as `30%` or `0.3`.

    Raises:
      UsageError: if it is not between 0 and 100 %.
    """
    text = str(told).strip()
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(%?)", text)
    share = -1.0 if match is None else float(match[1]) / (100 if match[2] else 1)
    if not 0 < share < 1:
        hint = f"; say {text}%" if match is not None and not match[2] and 1 <= share < 100 else ""
        raise UsageError(
            f"{text!r} is no share of channels to remove: write 30% or 0.3, above 0 and below "
            f"100 %{hint}."
        )
    return share


def by_share(
    groups: tuple[Removable, ...],
    scores: SetScores,
    share: float,
    *,
    among: Rivals = "layer",
    floor: Floor = ALL_BUT_ONE,
) -> Chosen:
    """Removes a share of the channels: those of least worth.

    Args:
      groups: what may go.
      scores: of every set of the coupling.
      share: of the sets of all groups, in (0, 1).
      among: `layer` removes that share of every layer; `global` lets all compete, by scores in
        units of their group's mean; `alike` those of groups that have one structure.
      floor: what stays at the least.

    Returns:
      What stays, and which layers had to keep more than that.

    Reference:
      Fang et al. 2023, "DepGraph" (scores normalised, ranked globally); Fang et al. 2024,
      "Isomorphic Pruning for Vision Models" (only groups of one structure are ranked together).
    """
    if among == "layer":
        return keeping(groups, scores, {g.makers: len(g.sets) * (1 - share) for g in groups}, floor)
    wanted: dict[tuple[str, ...], float] = {}
    for rivals in leagues(groups, among):
        wanted |= won(rivals, scores, share)
    return keeping(groups, scores, wanted, floor)


def leagues(groups: tuple[Removable, ...], among: Rivals) -> list[tuple[Removable, ...]]:
    """The groups that compete with each other."""
    if among == "global":
        return [groups] if groups else []
    structures = dict.fromkeys(group.structure for group in groups)
    return [tuple(g for g in groups if g.structure == one) for one in structures]


def won(
    rivals: tuple[Removable, ...], scores: SetScores, share: float
) -> dict[tuple[str, ...], float]:
    """{layers of a group: how many of its sets stay} where groups compete for what may stay."""
    sets = np.concatenate([group.sets for group in rivals])
    owner = np.repeat(np.arange(len(rivals)), [len(group.sets) for group in rivals])
    worth = normalised(scores[sets], owner)
    order = np.lexsort((sets, worth))
    left = {group.makers: len(group.sets) for group in rivals}
    spare = {g.makers: max(math.ceil(len(g.sets) * (1 - MOST)), 1) for g in rivals}
    goes = round(share * len(sets))
    for index in order:
        makers = rivals[owner[index]].makers
        if goes and left[makers] > spare[makers]:
            left[makers] -= 1
            goes -= 1
    return {makers: float(count) for makers, count in left.items()}


def never_empty(coupled: Coupling, scores: SetScores, chosen: Chosen) -> Chosen:
    """The choice with the best set back of every tensor of which nothing would be left.

    Parts of tensors, as slices of them, are not looked at before.
    """
    kept, notes = chosen.kept.copy(), list(chosen.notes)
    for name, axes in coupled.tensors.items():
        for numbers in axes:
            sets = np.unique(numbers) - 1
            if len(sets) and sets[0] >= 0 and not kept[sets].any():
                kept[sets[np.argmax(scores[sets])]] = True
                notes.append(f"one channel of {name} stays, or nothing would be left of it")
    return Chosen(kept, tuple(notes))


def keeping(
    groups: tuple[Removable, ...],
    scores: SetScores,
    wanted: Mapping[tuple[str, ...], float],
    floor: Floor,
) -> Chosen:
    """The best of each group, as many as wanted and the floor allows.

    Of equal scores those stay that come first.
    """
    kept, notes = np.ones(len(scores), bool), []
    for group in groups:
        count = floor.kept(group, wanted[group.makers])
        sets = np.asarray(group.sets)
        best = np.argsort(-scores[sets], kind="stable")
        kept[sets[best[count:]]] = False
        if count - wanted[group.makers] >= 1:
            told = f"{count * group.width} of {len(sets) * group.width} channels"
            notes.append(f"{group.name} keeps {told}, more than asked for: fewer are not allowed")
    return Chosen(kept, tuple(notes))
