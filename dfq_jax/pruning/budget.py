"""How many channels every layer keeps under a budget of work or size: least loss, exactly.

What a layer takes is a product: inputs kept times outputs kept. So a network's cost is a constant,
a part for each group of channels, and a part for each two of them that one layer joins, which is
the knapsack that bits are allocated by (`numerics/knapsack.py`).
"""

import itertools
import math
import re
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dfq_jax.errors import BudgetError, ResourceError
from dfq_jax.graph.labels import Labels
from dfq_jax.graph.ops import WEIGHTED
from dfq_jax.graph.query import macs
from dfq_jax.numerics.knapsack import SECONDS, Knapsack, SharedCost, best_choice, spending
from dfq_jax.passes.select import Kept
from dfq_jax.pruning.choose import MOST, Chosen, Floor
from dfq_jax.pruning.criteria import SetScores
from dfq_jax.pruning.groups import Removable, Subject

SizeUnit = Literal["macs", "values", "bytes"]
LEVELS = 12
"""Numbers of channels that are tried for each group."""
SUFFIXES: dict[str, tuple[SizeUnit, float]] = {
    **{f"{p}macs": ("macs", 1000**i) for i, p in enumerate(("", *"kmg"))},
    **{f"{p}params": ("values", 1000**i) for i, p in enumerate(("", *"kmg"))},
    **{f"{p}b": ("bytes", 1000**i) for i, p in enumerate(("", *"kmg"))},
    **{f"{p}ib": ("bytes", 1024**i) for i, p in enumerate("kmg", 1)},
}
"""{suffix: (unit, factor)}."""
NAMES: dict[SizeUnit, str] = {"macs": "MACs", "values": "params", "bytes": "B"}


class Ceiling(NamedTuple):
    """What a pruned network may take.

    Attributes:
      amount: positive; a share of the original's if `relative`.
      unit: multiply-accumulates of an image, numbers in layers, or bytes of them.
      relative: whether it is a share.
    """

    amount: float
    unit: SizeUnit
    relative: bool = False

    def __str__(self) -> str:
        """As `parse_ceiling` reads it."""
        if self.relative:
            return f"{100 * self.amount:.4g}% {NAMES[self.unit]}"
        power = min(int(math.log(max(self.amount, 1), 1000)), 3)
        return f"{self.amount / 1000**power:.4g}{('', 'K', 'M', 'G')[power]}{NAMES[self.unit]}"


class Deadline(NamedTuple):
    """What an image may take on this machine, batch 1.

    Attributes:
      ms: milliseconds.
    """

    ms: float

    def __str__(self) -> str:
        """As `parse_structure` reads it."""
        return f"{self.ms:g}ms"


def parse_structure(text: str) -> Ceiling | Deadline:
    """Reads `3ms` or `2.5 ms`, or what `parse_ceiling` does.

    Raises:
      BudgetError: on anything else, and on no time.
    """
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*ms", text.strip().lower())
    if match is None:
        return parse_ceiling(text)
    if float(match[1]) <= 0:
        raise BudgetError(f"budget {text!r} must be above 0.")
    return Deadline(float(match[1]))


def parse_ceiling(text: str) -> Ceiling:
    """Reads `50% MACs`, `20MMACs`, `40% params`, `300KParams`, `2MB` or `1.5MiB`.

    Raises:
      BudgetError: on anything else, and on amounts that are not positive or shares above 100 %.
    """
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*(%?)\s*([a-z]+)", text.strip().lower())
    suffix = "" if match is None else {"bytes": "b"}.get(match[3], match[3])
    relative = match is not None and match[2] == "%"
    if (
        match is None
        or suffix not in SUFFIXES
        or (relative and suffix not in ("macs", "params", "b"))
    ):
        raise BudgetError(
            f'budget {text!r} is none of a pruned network: write "50% MACs", "20MMACs", '
            '"40% params", "300Kparams", "2MB" or "3ms".'
        )
    unit, factor = SUFFIXES[suffix]
    amount = float(match[1]) * (0.01 if relative else factor)
    if amount <= 0 or (relative and amount > 1):
        raise BudgetError(f"budget {text!r} must be above 0, and a share at most 100%.")
    return Ceiling(amount, unit, relative)


class Price(NamedTuple):
    """Bytes of what a layer stores.

    Attributes:
      bits: of an element of a kernel.
      channel: bytes that go with every output channel: its bias, scales and zero points.
    """

    bits: int = 32
    channel: int = 4


IN_FLOAT = Price()
EIGHTHS = 8
"""Units of a byte."""


class Work(NamedTuple):
    """One product in a network's cost.

    Attributes:
      rate: of each pair of an input and an output.
      inputs: numbers of the sets along its input axis, 0 where positions stay.
      outputs: those along its output axis.
    """

    rate: int
    inputs: Labels
    outputs: Labels


ONCE = np.zeros(1, np.int64)
"""An axis of one position, which stays."""


def work_of(subject: Subject, unit: SizeUnit, price: Price) -> list[Work]:
    """Everything that a network costs, in whole units (eighths of bytes)."""
    counted, found = macs(subject.model), list[Work]()
    for node in subject.model.graph.nodes:
        if not isinstance(node.op, WEIGHTED):
            if unit == "macs" and node.name in counted:
                found.append(Work(counted[node.name], ONCE, ONCE))
            continue
        read, made = subject.coupled.slots[node.name]["kernel"][-2:]
        kernel = subject.model.params[node.name]["kernel"].shape
        window = math.prod(kernel[:-2])
        if unit == "macs":
            found.append(Work(counted[node.name] // (kernel[-2] * kernel[-1]), read, made))
        else:
            bits, channel = (1, 1) if unit == "values" else (price.bits, EIGHTHS * price.channel)
            found += [Work(window * bits, read, made), Work(channel, ONCE, made)]
    return found


def cost_of(work: list[Work], kept: Kept) -> int:
    """What a network costs with the sets that stay, in whole units."""
    stays = np.concatenate([[True], kept])
    return sum(x.rate * int(stays[x.inputs].sum()) * int(stays[x.outputs].sum()) for x in work)


class Ladder(NamedTuple):
    """How a group may shrink.

    Attributes:
      order: its sets, the best first.
      counts: how many of them may stay, rising to all.
    """

    order: Int[np.ndarray, " sets"]
    counts: Int[np.ndarray, " levels"]


def ladders_of(
    groups: tuple[Removable, ...], scores: SetScores, floor: Floor, levels: int = LEVELS
) -> tuple[Ladder, ...]:
    """How each group may shrink: by its worst, down to the floor or what `MOST` leaves."""
    shares = np.linspace(1 - MOST, 1, levels)
    found = []
    for group in groups:
        sets = np.asarray(group.sets)
        counts = [floor.kept(group, share * len(sets)) for share in shares]
        found.append(Ladder(sets[np.argsort(-scores[sets], kind="stable")], np.array(counts)))
    return tuple(found)


def at_levels(ladders: tuple[Ladder, ...], picks: Int[np.ndarray, " groups"], sets: int) -> Kept:
    """The sets that stay where each group stands at a level."""
    kept = np.ones(sets, bool)
    for ladder, pick in zip(ladders, picks, strict=True):
        kept[ladder.order[ladder.counts[pick] :]] = False
    return kept


def by_budget(
    subject: Subject,
    groups: tuple[Removable, ...],
    scores: SetScores,
    ceiling: Ceiling,
    *,
    floor: Floor,
    price: Price,
) -> Chosen:
    """The channels of least worth that a budget demands to remove.

    What is minimised is the sum over groups of the share of their worth that is lost; of each
    group the best stay.

    Args:
      subject: the network.
      groups: what may go.
      scores: of every set.
      ceiling: what the network may take.
      floor: what every layer keeps.
      price: of stored numbers, for bytes.

    Raises:
      BudgetError: if the budget is out of reach; names the smallest within reach.
      ResourceError: if no optimum is proven within a minute.
    """
    work, ladders = work_of(subject, ceiling.unit, price), ladders_of(groups, scores, floor)
    limit = limit_of(work, ladders, ceiling, len(scores))
    problem = problem_of(work, ladders, scores)
    try:
        picks = best_choice(problem, min(limit, spending(problem)[1]))
    except TimeoutError:
        raise ResourceError(
            f"no proven best choice of channels for {len(groups)} groups within {SECONDS:.0f} s: "
            "prune a share of all layers instead, or leave some untouched."
        ) from None
    return Chosen(at_levels(ladders, picks, len(scores)))


def require_reach(
    subject: Subject,
    groups: tuple[Removable, ...],
    ceiling: Ceiling,
    *,
    floor: Floor,
    price: Price,
) -> None:
    """Refuses a budget out of reach before anything is known of worth.

    Raises:
      BudgetError: naming the smallest within reach.
    """
    sets = len(subject.coupled)
    work = work_of(subject, ceiling.unit, price)
    limit_of(work, ladders_of(groups, np.ones(sets), floor), ceiling, sets)


def least_share(subject: Subject, groups: tuple[Removable, ...], *, floor: Floor) -> float:
    """The share of multiply-accumulates that the fewest channels take that may stay."""
    work, sets = work_of(subject, "macs", IN_FLOAT), len(subject.coupled)
    ladders = ladders_of(groups, np.ones(sets), floor)
    least = cost_of(work, at_levels(ladders, np.zeros(len(ladders), np.int64), sets))
    return min(least / cost_of(work, np.ones(sets, bool)) * (1 + 1e-9), 1.0)


def limit_of(work: list[Work], ladders: tuple[Ladder, ...], ceiling: Ceiling, sets: int) -> int:
    """A budget in whole units.

    Raises:
      BudgetError: if it is out of reach; names the smallest within reach.
    """
    least = cost_of(work, at_levels(ladders, np.zeros(len(ladders), np.int64), sets))
    whole = cost_of(work, np.ones(sets, bool))
    scale = whole if ceiling.relative else EIGHTHS if ceiling.unit == "bytes" else 1
    limit = math.floor(ceiling.amount * scale + 1e-6)
    if limit < least:
        smallest = ceiling._replace(amount=rounded_up(least / scale))
        raise BudgetError(
            f"budget {ceiling} is out of reach: with the fewest channels that may stay, the "
            f"network takes {smallest}; allow that much, leave fewer layers untouched, or let all "
            'channels go (`channels="all"`).'
        )
    return limit


def rounded_up(amount: float) -> float:
    """The next number of four digits, so that what is told is enough."""
    unit = 10.0 ** (math.floor(math.log10(max(amount, 1e-12))) - 3)
    return math.ceil(amount / unit - 1e-9) * unit


def problem_of(work: list[Work], ladders: tuple[Ladder, ...], scores: SetScores) -> Knapsack:
    """The knapsack of a network: products of numbers of channels, written out."""
    cost, fixed = np.zeros((len(ladders), LEVELS), np.int64), 0
    shared: dict[tuple[int, int], Int[np.ndarray, "levels levels"]] = {}
    for rate, inputs, outputs in work:
        (still, read), (kept, made) = (
            positions_by_level(axis, ladders) for axis in (inputs, outputs)
        )
        fixed += rate * still * kept
        for g, counts in read.items():
            cost[g] += rate * kept * counts
        for g, counts in made.items():
            cost[g] += rate * still * counts
        for (g, counts), (h, others) in itertools.product(read.items(), made.items()):
            if g == h:
                cost[g] += rate * counts * others
                continue
            table = rate * np.outer(counts, others)
            key, table = ((g, h), table) if g < h else ((h, g), table.T)
            shared[key] = shared[key] + table if key in shared else table
    losses = np.stack([losses_of(ladder, scores) for ladder in ladders])
    pairs = tuple(SharedCost(key, table) for key, table in shared.items())
    return Knapsack(losses, cost, pairs, fixed)


def positions_by_level(
    axis: Labels, ladders: tuple[Ladder, ...]
) -> tuple[int, dict[int, Int[np.ndarray, " levels"]]]:
    """How many positions of an axis stay whatever goes, and how many of each group by level."""
    found, rest = {}, len(axis)
    for index, (order, counts) in enumerate(ladders):
        places = np.bincount(axis, minlength=int(order.max()) + 2)[order + 1]
        if places.any():
            found[index] = np.cumsum(places)[counts - 1]
            rest -= int(places.sum())
    return rest, found


def losses_of(ladder: Ladder, scores: SetScores) -> Float[np.ndarray, " levels"]:
    """The share of a group's worth that is lost where so many of its sets stay."""
    worth = np.concatenate([[0.0], np.cumsum(scores[ladder.order])])
    return 1 - worth[ladder.counts] / max(float(worth[-1]), 1e-30)
