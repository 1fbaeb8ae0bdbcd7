"""Bits and channels together: how wide each layer is and how many bits its weights have, in one.

What a kernel takes is a product of the channels it reads, those it makes and the bits of a weight,
so that one knapsack chooses all three (`numerics/knapsack.py`). What is lost is predicted choice by
choice on images, in one unit: bits as ZeroQ does (`allocation/sensitivity.py`), channels by what
the others cannot make up for (`pruning/damage.py`).
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Key

from dfq_jax.allocation.allocate import POINTS
from dfq_jax.allocation.choices import Space
from dfq_jax.allocation.costs import Budget, LayerWork, bits_of, cost, work_of
from dfq_jax.allocation.sensitivity import sensitivities
from dfq_jax.errors import BudgetError, ResourceError, UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import WEIGHTED
from dfq_jax.graph.tasks import Task
from dfq_jax.numerics.affine import Grid
from dfq_jax.numerics.knapsack import (
    SECONDS,
    Knapsack,
    Picks,
    SharedCost,
    best_choice,
    lost,
    proven_front,
    spending,
    spent,
)
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.passes.select import Kept
from dfq_jax.passes.thrifty_ranges import thrifty_ranges
from dfq_jax.pruning.budget import (
    Ceiling,
    Ladder,
    at_levels,
    ladders_of,
    positions_by_level,
    rounded_up,
)
from dfq_jax.pruning.choose import Floor
from dfq_jax.pruning.criteria import SetScores
from dfq_jax.pruning.damage import channel_losses
from dfq_jax.pruning.groups import Removable, Subject
from dfq_jax.quantization.plan import Rule
from dfq_jax.recipes.mixed import offered
from dfq_jax.recipes.pipeline import Pipeline

LEVELS = 8
"""Numbers of channels that are tried for each group."""
MOST_GROUPS = 3
"""Groups of channels that one layer may read and make, so that its costs are few enough."""

Sizes = Int[np.ndarray, "..."]


class JointPoint(NamedTuple):
    """Channels and bits of a network.

    Attributes:
      counts: how many sets of each group stay.
      bits: of each kernel that could be chosen.
      cost: bytes of weights in the file, at the most.
      loss: the predicted divergence from the float network, in nats.
    """

    counts: tuple[int, ...]
    bits: tuple[int, ...]
    cost: Budget
    loss: float


class JointAllocation(NamedTuple):
    """Channels and bits, and what they were chosen from.

    Attributes:
      kept: which sets of channels stay.
      rules: give these to the quantization of what is left.
      chosen: the choice within the budget.
      uniform: all channels at the bits of the scheme.
      front: the best choices for other budgets, by rising cost.
      groups: the layers of each group, and how many sets it has.
      space: what bits could be chosen.
      notes: what was not done as asked, in sentences.
    """

    kept: Kept
    rules: tuple[Rule, ...]
    chosen: JointPoint
    uniform: JointPoint
    front: tuple[JointPoint, ...]
    groups: tuple[tuple[str, int], ...]
    space: Space
    notes: tuple[str, ...] = ()


class Choices(NamedTuple):
    """All that one knapsack decides: groups of channels, then bits of kernels.

    Attributes:
      reference: folded float network with all channels.
      subject: the network whose channels go.
      ladders: how each group may shrink.
      space: kernels that may be given bits.
    """

    reference: Model
    subject: Subject
    ladders: tuple[Ladder, ...]
    space: Space

    @property
    def bits(self) -> tuple[int, ...]:
        """Candidates of bits, the most repeated so that there are `LEVELS`."""
        few = self.space.bits
        return (*few, *(few[-1:] * (LEVELS - len(few))))

    def kernel_of(self, name: str) -> int | None:
        """The item that says the bits of a layer's kernel, if one does."""
        owners = {choice.name: i for i, choice in enumerate(self.space.choices) if choice.weight}
        return len(self.ladders) + owners[name] if name in owners else None


def choices_of(
    reference: Model,
    subject: Subject,
    groups: tuple[Removable, ...],
    scores: SetScores,
    how: Pipeline,
    floor: Floor,
) -> Choices:
    """All that can be decided about a network.

    Args:
      reference: folded float network, with the biases it will have.
      subject: the network.
      groups: what may go.
      scores: of every set.
      how: how what is left is quantized.
      floor: what every layer keeps.

    Raises:
      UsageError: for a scheme with more candidates of bits than there may be.
    """
    space = offered(reference.graph, how, "bytes")
    if len(space.bits) > LEVELS:
        raise UsageError(f"bits joint chooses among {LEVELS} numbers of bits, not {space.bits}.")
    return Choices(reference, subject, ladders_of(groups, scores, floor, LEVELS), space)


def few_enough(
    subject: Subject, groups: tuple[Removable, ...]
) -> tuple[tuple[Removable, ...], tuple[str, ...]]:
    """The groups that may go where no layer reads and makes too many of them, and what is told."""
    found, notes = list(groups), []
    for name, slots in subject.coupled.slots.items():
        if not isinstance(subject.model.graph[name].op, WEIGHTED) or "kernel" not in slots:
            continue
        numbers = np.concatenate(slots["kernel"][-2:])
        touched = [g for g in found if np.isin(np.asarray(g.sets) + 1, numbers).any()]
        for group in touched[MOST_GROUPS:]:
            found.remove(group)
            notes.append(
                f"{group.name} keeps all channels: {name} reads and makes those of "
                f"{len(touched)} groups"
            )
    return tuple(found), tuple(notes)


def joint(
    choices: Choices,
    ceiling: Ceiling,
    how: Pipeline,
    *,
    points: int = POINTS,
    task: Task | None = None,
    key: Key[Array, ""],
    watch: Watcher = SILENT,
) -> JointAllocation:
    """Chooses channels and bits of least predicted loss within bytes.

    Args:
      choices: what can be decided.
      ceiling: bytes of weights in the file; a share of those of the scheme with all channels if
        relative.
      how: how what is left is quantized.
      points: budgets tried for the front.
      task: what the network is for; None for what its graph says.
      key: for sensitivities that draw.
      watch: told what is being done.

    Raises:
      BudgetError: if the budget is out of reach; names the smallest within reach.
      ResourceError: if no optimum within it is proven in a minute.
    """
    costs = costs_of(choices)
    uniform = at_scheme(choices, how)
    whole = spent(costs, uniform)
    limit = limit_in_bytes(costs, ceiling, whole)
    problem = costs._replace(loss=losses_of(choices, how, task=task, key=key, watch=watch))
    watch.says("allocating channels and bits")
    described = lambda picks: described_by(choices, problem, picks)
    chosen = within(problem, limit)
    front, missed = proven_front(problem, points)
    kept = at_levels(choices.ladders, chosen[: len(choices.ladders)], len(choices.subject.coupled))
    point = described(chosen)
    return JointAllocation(
        kept,
        choices.space.rules_for(point.bits),
        point,
        described(uniform),
        tuple(map(described, front)),
        groups=tuple(names_of(choices)),
        space=choices.space,
        notes=tuple(map(unproven, missed)),
    )


def unproven(limit: int) -> str:
    """What is told of a point that a front has not."""
    return f"the front has no point at {limit} bytes: none was proven in time"


def names_of(choices: Choices) -> list[tuple[str, int]]:
    """What the groups are called, and how many sets each has."""
    makers = choices.subject.coupled.makers
    return [(makers[int(x.order[0])][0], len(x.order)) for x in choices.ladders]


def within(problem: Knapsack, limit: int) -> Picks:
    """The best choice that costs at most so many bytes.

    Raises:
      ResourceError: if it is not proven in time.
    """
    try:
        return best_choice(problem, limit)
    except TimeoutError:
        raise ResourceError(
            f"no proven best choice of channels and bits for {len(problem.loss)} groups and "
            f"kernels within {SECONDS:.0f} s: leave some layers untouched, or say bits and "
            "channels apart."
        ) from None


def limit_in_bytes(costs: Knapsack, ceiling: Ceiling, whole: int) -> int:
    """A budget in bytes.

    Raises:
      BudgetError: if it is out of reach.
    """
    limit = math.floor(ceiling.amount * (whole if ceiling.relative else 1) + 1e-6)
    least = spending(costs)[0]
    if limit < least:
        smallest = rounded_up(least / (whole if ceiling.relative else 1))
        raise BudgetError(
            f"budget {ceiling} is out of reach: with the fewest channels and bits there may be, "
            f"the network takes {ceiling._replace(amount=smallest)}; allow that much."
        )
    return limit


def at_scheme(choices: Choices, how: Pipeline) -> Picks:
    """All channels, at the bits of the scheme."""
    groups, kernels = len(choices.ladders), len(choices.space.choices)
    level = choices.bits.index(how.scheme.weight_bits)
    return np.array([LEVELS - 1] * groups + [level] * kernels)


def described_by(choices: Choices, problem: Knapsack, picks: Picks) -> JointPoint:
    """An answer to the knapsack in terms of the network."""
    levels = picks[: len(choices.ladders)]
    counts = [int(x.counts[level]) for x, level in zip(choices.ladders, levels, strict=True)]
    bits = tuple(choices.bits[level] for level in picks[len(choices.ladders) :])
    amount = Budget(float(spent(problem, picks)), "bytes")
    return JointPoint(tuple(counts), bits, amount, lost(problem, picks))


def losses_of(
    choices: Choices,
    how: Pipeline,
    *,
    task: Task | None,
    key: Key[Array, ""],
    watch: Watcher,
) -> Float[np.ndarray, "items levels"]:
    """What every level of channels and of bits is predicted to lose, each alone."""
    watch.says(f"predicting what channels cost {len(choices.ladders)} groups of layers")
    channels = channel_losses(choices.subject, choices.ladders, task=task)
    watch.says(f"predicting what bits cost {len(choices.space.choices)} kernels")
    bits = sensitivities(
        choices.reference,
        choices.space,
        choices.subject.seen,
        method=how.sensitivity,
        key=key,
        expected=thrifty_ranges(choices.reference),
        widen=how.observers is None,
        task=task,
    )
    wide = np.pad(bits, ((0, 0), (0, LEVELS - bits.shape[1])), mode="edge")
    return np.concatenate([channels, wide])


def costs_of(choices: Choices) -> Knapsack:
    """Bytes of every choice: all layers, pinned ones too; no losses yet.

    A layer never gets cheaper with more channels: where packing begins to save, what fewer take
    counts.
    """
    items = len(choices.ladders) + len(choices.space.choices)
    singles, fixed, shared = np.zeros((items, LEVELS), np.int64), 0, []
    for work in work_of(choices.reference, choices.space.rest):
        if work.elements == 0:
            continue
        owners, table = table_of(choices, work)
        if not owners:
            fixed += int(table)
        elif len(owners) == 1:
            singles[owners[0]] += table
        else:
            shared.append(SharedCost(owners, table))
    return Knapsack(np.zeros((items, LEVELS)), singles, tuple(shared), fixed)


def table_of(choices: Choices, work: LayerWork) -> tuple[tuple[int, ...], Sizes]:
    """Which items say what a layer takes, and its bytes for each combination of their levels."""
    kernel, tensor = work.operands
    rest, name = choices.space.rest, kernel.node
    axes = choices.subject.coupled.slots[name]["kernel"][-2:]
    (still, read), (kept, made) = (positions_by_level(axis, choices.ladders) for axis in axes)
    owners = tuple(sorted({*read, *made}))
    item = choices.kernel_of(name)
    candidates = (bits_of(rest, kernel),) if item is None else choices.bits
    window = work.elements // (len(axes[0]) * len(axes[1]))
    sizes = np.zeros([LEVELS] * len(owners) + [len(candidates)], np.int64)
    for levels in itertools.product(range(LEVELS), repeat=len(owners)):
        at = dict(zip(owners, levels, strict=True))
        inputs = still + sum(int(counts[at[g]]) for g, counts in read.items())
        outputs = kept + sum(int(counts[at[g]]) for g, counts in made.items())
        left = narrowed(work, rest.table.get(kernel), window, inputs, outputs)
        sizes[levels] = [
            cost(left, bits, bits_of(rest, tensor), "bytes", rest.store) for bits in candidates
        ]
    for axis in range(len(owners)):
        sizes = np.maximum.accumulate(sizes, axis)
    return ((*owners, item), sizes) if item is not None else (owners, sizes[..., 0])


def narrowed(work: LayerWork, spec: object, window: int, inputs: int, outputs: int) -> LayerWork:
    """What a layer of fewer channels takes."""
    levels = getattr(spec, "levels", None)
    blocks = -(-inputs // levels.group) if isinstance(levels, Grid) and levels.group else 1
    scales = 1 if getattr(levels, "axis", 0) is None else outputs * blocks
    return work._replace(
        elements=window * inputs * outputs,
        scales=scales,
        biases=outputs if work.biases else 0,
        blocks=blocks > 1,
    )
