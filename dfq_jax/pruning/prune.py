"""A network without the channels that matter least: chosen, restored, cut, and told."""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import numpy as np

from dfq_jax.base.words import Channels, CriterionName, RestorationName, Rivals
from dfq_jax.errors import UnsupportedModelError, check_choice
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import macs, parameter_count, weighted_nodes
from dfq_jax.passes.select import Kept, select
from dfq_jax.pruning.budget import IN_FLOAT, Ceiling, Price, by_budget, require_reach
from dfq_jax.pruning.choose import ALL_BUT_ONE, Chosen, Floor, by_share, check_floor, never_empty
from dfq_jax.pruning.criteria import CRITERIA, SetScores
from dfq_jax.pruning.groups import Removables, Subject, removables
from dfq_jax.pruning.restore import RESTORATIONS, restored


class Pruning(NamedTuple):
    """How channels are removed.

    Attributes:
      share: of the channels that may go, in (0, 1); or what the network may take.
      criterion: how they are judged.
      restore: what makes up for them.
      among: whose channels compete.
      channels: which may go: `inner`, all but what sums carry on, or `all`.
      floor: what every layer keeps.
      untouched: patterns of layers that keep all.
      price: of stored numbers, for a budget of bytes.
    """

    share: float | Ceiling
    criterion: CriterionName = "energy"
    restore: RestorationName = "ridge"
    among: Rivals = "layer"
    channels: Channels = "inner"
    floor: Floor = ALL_BUT_ONE
    untouched: tuple[str, ...] = ()
    price: Price = IN_FLOAT

    @property
    def looks(self) -> bool:
        """Whether it looks at images."""
        return CRITERIA[self.criterion].looks or RESTORATIONS[self.restore].looks


class LayerShape(NamedTuple):
    """A layer before and after.

    Attributes:
      name: of the layer.
      kind: of operator.
      inputs: channels that it reads.
      outputs: channels that it makes.
      macs: multiply-accumulates of an image.
      values: in its kernel and bias.
    """

    name: str
    kind: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    macs: tuple[int, int]
    values: tuple[int, int]

    def __str__(self) -> str:
        """What people see: `Conv2d(512 -> 256)`, what it made and makes."""
        before, after = self.outputs
        return f"{self.kind}({before})" if before == after else f"{self.kind}({before} -> {after})"


class Pruned(NamedTuple):
    """A smaller network, and how it differs from the original.

    Attributes:
      model: the network.
      kept: for every set of the original's coupling whether it is there.
      layers: every layer before and after.
      macs: multiply-accumulates of an image, before and after.
      values: stored numbers, likewise.
      left: {layer whose channels all stayed: why}.
      notes: what was not done as asked, in sentences.
    """

    model: Model
    kept: Kept
    layers: tuple[LayerShape, ...]
    macs: tuple[int, int]
    values: tuple[int, int]
    left: Mapping[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        pair = lambda both: {"before": both[0], "after": both[1]}
        layers = [
            {"name": x.name, "kind": x.kind, "shown": str(x)}
            | {key: pair(getattr(x, key)) for key in ("inputs", "outputs", "macs", "values")}
            for x in self.layers
        ]
        told = {"layers": layers, "macs": pair(self.macs), "values": pair(self.values)}
        return {**told, "left": dict(self.left), "notes": list(self.notes)}


def prune(subject: Subject, how: Pruning, kept: Kept | None = None) -> Pruned:
    """Removes channels, and has what is left make up for them.

    Args:
      subject: the network, with images if `how` looks at some.
      how: which, and how.
      kept: which sets stay, where that is settled; None for as many as `how` says.

    Raises:
      UsageError: for what means nothing, or a pattern that matches no layer.
      UnsupportedModelError: if nothing may go; says why, layer by layer.
    """
    found = what_may_go(subject, how)
    if kept is not None:
        settled = never_empty(subject.coupled, np.ones(len(kept)), Chosen(kept))
        return cut(subject, settled, how, found)
    scores = CRITERIA[how.criterion].score(subject)
    return cut(subject, chosen_by(subject, how, found, scores), how, found)


def check_pruning(how: Pruning) -> None:
    """Refuses names that are none and numbers that mean nothing, before any work is done.

    Raises:
      UsageError: naming it.
    """
    check_choice("criterion", how.criterion, CRITERIA)
    check_choice("restoration", how.restore, RESTORATIONS)
    check_choice("among", how.among, get_args(Rivals))
    check_choice("channels", how.channels, get_args(Channels))
    check_floor(how.floor)


def chosen_by(subject: Subject, how: Pruning, found: Removables, scores: SetScores) -> Chosen:
    """Which channels stay, under a share or a budget."""
    if isinstance(how.share, Ceiling):
        more = {"floor": how.floor, "price": how.price}
        chosen = by_budget(subject, found.groups, scores, how.share, **more)
    else:
        chosen = by_share(found.groups, scores, how.share, among=how.among, floor=how.floor)
    return never_empty(subject.coupled, scores, chosen)


def what_may_go(subject: Subject, how: Pruning) -> Removables:
    """The channels that may go, of a network of which some may.

    Raises:
      UsageError: for what means nothing, or a pattern that matches no layer.
      UnsupportedModelError: if nothing may go; says why, layer by layer.
    """
    check_pruning(how)
    found = removables(subject, channels=how.channels, untouched=how.untouched)
    if isinstance(how.share, Ceiling) and found.groups:
        require_reach(subject, found.groups, how.share, floor=how.floor, price=how.price)
    if found.groups:
        return found
    reasons = dict.fromkeys(found.left.values())
    each = lambda why: ", ".join(list_of(name for name, w in found.left.items() if w == why))
    told = "; ".join(f"{each(why)}: {why}" for why in reasons) or "it has no layers"
    raise UnsupportedModelError(f"no channel of this network may go: {told}.")


def list_of(names: Any, most: int = 3) -> list[str]:
    """The first of some names."""
    every = list(names)
    return every if len(every) <= most else [*every[:most], f"{len(every) - most} more"]


def cut(subject: Subject, chosen: Chosen, how: Pruning, found: Removables) -> Pruned:
    """The restored network without what was chosen to go."""
    whole = restored(subject, chosen.kept, RESTORATIONS[how.restore])
    model = select(whole, subject.coupled, chosen.kept)
    work = macs(subject.model), macs(model)
    return Pruned(
        model,
        chosen.kept,
        tuple(shapes_of(subject.model, model, *work)),
        (sum(work[0].values()), sum(work[1].values())),
        (parameter_count(subject.model), parameter_count(model)),
        found.left,
        chosen.notes,
    )


def shapes_of(
    before: Model, after: Model, work: Mapping[str, int], less: Mapping[str, int]
) -> list[LayerShape]:
    """Every layer before and after."""
    found = []
    for node in weighted_nodes(before.graph):
        both = before.params[node.name], after.params[node.name]
        stored = [sum(x.size for x in slots.values()) for slots in both]
        wide = [slots["kernel"].shape for slots in both]
        groups = [getattr(m.graph[node.name].op, "groups", 1) for m in (before, after)]
        found.append(
            LayerShape(
                node.name,
                type(node.op).__name__,
                (wide[0][-2] * groups[0], wide[1][-2] * groups[1]),
                (wide[0][-1], wide[1][-1]),
                (work[node.name], less[node.name]),
                (stored[0], stored[1]),
            )
        )
    return found
