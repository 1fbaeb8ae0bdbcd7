"""What a network is to lose before it is quantized, read from words; and the network without it."""

import re
from typing import NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Int

from dfq_jax.api.joining import Together
from dfq_jax.base.words import BitsByName, RestorationName
from dfq_jax.errors import BudgetError, UsageError, check_choice
from dfq_jax.graph.graph import Model
from dfq_jax.numerics.sparsity import Pattern
from dfq_jax.passes.select import Kept, standing
from dfq_jax.pruning.budget import IN_FLOAT, Ceiling, Deadline, Price, parse_structure
from dfq_jax.pruning.choose import share_from
from dfq_jax.pruning.groups import Subject, left_alone
from dfq_jax.pruning.prune import Pruned, Pruning, check_pruning, prune, what_may_go
from dfq_jax.pruning.sparse import Sparse, parse_pattern, sparsified
from dfq_jax.quantization.plan import FLOAT, parse_scheme
from dfq_jax.training.method import Training

INTEGER_CHANNEL, FLOAT_CHANNEL = 17, 9
"""Bytes of an output channel: a scale and a zero point, a bias, and those of its bias."""
UNKNOWN = 0.5
"""A share of channels that nobody looks at."""
NO_CHANNELS = r"0+(\.0*)?\s*%?"
"""How it is said that no channel goes."""


class Demand(NamedTuple):
    """How much is to go.

    Attributes:
      channels: share of the channels that may go, or what is left may take; None if all stay.
      zeros: which weights become zero; None for none.
      bits: a budget of bits by layer, if that was meant.
      joint: bytes within which channels and bits are decided together, if they are.
    """

    channels: float | Ceiling | Deadline | None
    zeros: Pattern | None = None
    bits: str | None = None
    joint: Ceiling | None = None

    @property
    def share(self) -> float | Ceiling:
        """What of channels is known before anything is measured."""
        told = self.channels
        return UNKNOWN if told is None or isinstance(told, Deadline) else told

    def shrinking(self, how: Pruning, training: Training | None) -> "Shrinking":
        """How a network gets smaller, where channels go as told; refuses words that are none."""
        check_pruning(how)
        removed = None if self.channels is None else how
        deadline = self.channels if isinstance(self.channels, Deadline) else None
        told = Shrinking(removed, self.zeros, how.untouched, training, deadline, self.joint)
        return told._replace(restore=how.restore)


def demanded(
    prune: str | float | None,
    budget: str | None,
    sparsity: str | None = None,
    bits: BitsByName = "scheme",
) -> Demand:
    """How much is to go: without a word of channels or zeros 30 % of the channels.

    Raises:
      UsageError: if both a share and a budget of structure are given, or one means nothing.
    """
    check_choice("bits", bits, get_args(BitsByName))
    zeros = None if sparsity is None else parse_pattern(sparsity)
    joint = bits == "joint"
    if joint and (budget is None or of_bits(budget)):
        raise UsageError(
            "bits joint shares bytes between bits and channels, and no budget of bytes says how "
            'many: give budget "50% bytes" (of what the scheme takes with all channels) or 200KB.'
        )
    if budget is not None and not of_bits(budget):
        if prune is not None:
            raise UsageError(
                f"prune={prune!r} and budget={budget!r} both say how much is to go: leave one out."
            )
        found = parse_structure(budget)
        return Demand(UNKNOWN, zeros, joint=in_bytes(found)) if joint else Demand(found, zeros)
    stays = prune is None or re.fullmatch(NO_CHANNELS, str(prune).strip()) is not None
    if zeros is not None and stays:
        return Demand(None, zeros, budget)
    return Demand(share_from("30%" if prune is None else prune), zeros, budget)


def in_bytes(budget: Ceiling | Deadline) -> Ceiling:
    """What bits and channels may take together.

    Raises:
      BudgetError: if it is none of bytes.
    """
    if not isinstance(budget, Ceiling) or budget.unit != "bytes":
        raise BudgetError(
            f'budget {budget} says nothing of bits: with bits joint write "50% bytes" or 200KB.'
        )
    return budget


def of_bits(budget: str) -> bool:
    """Whether a budget is one of bits by layer."""
    return budget.strip().lower().endswith(("bit", "bits", "bops"))


def stays_float(scheme: str) -> bool:
    """Whether what is left stays in float."""
    return scheme.strip().lower() == str(FLOAT)


def price_of(scheme: str) -> Price:
    """Bytes of what a layer stores under a scheme: codes; scale, zero point and bias a channel.

    In float an element has 4 bytes, and a channel its bias.

    Raises:
      PlanError: if it is none.
    """
    if stays_float(scheme):
        return IN_FLOAT
    found = parse_scheme(scheme)
    integer = found.activation_bits is not None and found.activation_bits <= 8
    return Price(found.weight_bits, INTEGER_CHANNEL if integer else FLOAT_CHANNEL)


class Shrinking(NamedTuple):
    """How a network gets smaller.

    Attributes:
      channels: how channels are removed, if some are.
      zeros: which weights become zero after that, if some do.
      untouched: patterns of layers that keep all.
      training: how what is left learns from the whole network; None where it does not.
      deadline: what an image may take; then the share of channels is still to be found.
      joint: bytes within which channels and bits are decided together, if they are.
      restore: `none`: nothing makes up for weights that become zero; with any other, what is left
        does, as images say.
    """

    channels: Pruning | None
    zeros: Pattern | None = None
    untouched: tuple[str, ...] = ()
    training: Training | None = None
    deadline: Deadline | None = None
    joint: Ceiling | None = None
    restore: RestorationName = "ridge"

    @property
    def together(self) -> Together | None:
        """What is asked of bits and channels together; None where they are apart."""
        if self.joint is None or self.channels is None:
            return None
        return Together(self.channels, self.joint)

    def within(self, ceiling: Ceiling) -> "Shrinking":
        """The same with a budget of work for channels."""
        if self.channels is None:
            return self
        return self._replace(channels=self.channels._replace(share=ceiling))

    @property
    def looks(self) -> bool:
        """Whether it looks at images."""
        channels = self.channels is not None and self.channels.looks
        zeros = self.zeros is not None and self.restore != "none"
        return channels or zeros or self.training is not None or self.joint is not None

    @property
    def told(self) -> dict[str, str]:
        """How it gets smaller, for reports."""
        found = {} if self.channels is None else {"pruned": told_of(self.channels)}
        spared = "".join(f", not {pattern}" for pattern in self.untouched)
        if self.zeros is not None:
            by = "none" if self.restore == "none" else "ridge"
            said = "" if self.restore == "ridge" else f", restored by {by}"
            found["sparse"] = f"{self.zeros}{said}{spared}"
        if self.deadline is not None and "pruned" in found:
            found["pruned"] += f", for {self.deadline}"
        if self.joint is not None and self.channels is not None:
            found["pruned"] = told_of(self.channels._replace(share=self.joint)) + ", with bits"
        if self.training is not None:
            shown = f"{self.training.batch} {self.training.examples}"
            found["trained"] = f"{self.training.steps} steps of {shown}"
        return found


def check_shrinking(subject: Subject, how: Shrinking) -> None:
    """Refuses what means nothing or cannot be done, before any work.

    Raises:
      UsageError: for a name, number or pattern of layers that is none.
      UnsupportedModelError: if no channel may go.
    """
    left_alone(subject.model, how.untouched)
    if how.channels is not None:
        what_may_go(subject, how.channels)


class Shrunk(NamedTuple):
    """A smaller network.

    Attributes:
      model: the network.
      pruned: which channels are gone, if some are.
      sparse: which weights are zero, if some were made so.
    """

    model: Model
    pruned: Pruned | None = None
    sparse: Sparse | None = None

    def stays(self, subject: Subject) -> dict[str, Int[np.ndarray, " _"]]:
        """{tensor: positions along its last axis that are left, in the order they have now}, where
        some are gone or have moved."""
        moved = {} if self.sparse is None else dict(self.sparse.order)
        if self.pruned is None:
            return moved
        left = standing(subject.coupled, self.pruned.kept)
        last = {name: left[axes[-1]] for name, axes in subject.coupled.tensors.items() if axes}
        some = {name: np.flatnonzero(there) for name, there in last.items() if not there.all()}
        return some | {name: some[name][at] if name in some else at for name, at in moved.items()}

    def with_weights(self, model: Model) -> "Shrunk":
        """The same with other weights of the same shapes."""
        pruned = None if self.pruned is None else self.pruned._replace(model=model)
        sparse = None if self.sparse is None else self.sparse._replace(model=model)
        return Shrunk(model, pruned, sparse)

    @property
    def masks(self) -> dict[str, Bool[np.ndarray, "..."]]:
        """{layer: which of its weights are not zero}, where some were made so."""
        zeros = {} if self.sparse is None else self.sparse.zeros
        kernel = lambda name: np.asarray(self.model.params[name]["kernel"])
        return {name: kernel(name) != 0 for name, share in zeros.items() if share > 0}


def shrunk(subject: Subject, how: Shrinking, kept: Kept | None = None) -> Shrunk:
    """The network without some channels, then with some weights at zero; nothing has learned yet.

    Args:
      subject: the network, with images if `how` looks at some.
      how: what it loses.
      kept: which sets of channels stay, where that is settled.
    """
    pruned = None if how.channels is None else prune(subject, how.channels, kept)
    model = subject.model if pruned is None else pruned.model
    if how.zeros is None:
        return Shrunk(model, pruned)
    more = {"untouched": how.untouched, "restore": how.restore}
    sparse = sparsified(Subject(model, subject.images), how.zeros, **more)
    return Shrunk(sparse.model, pruned, sparse)


def told_of(how: Pruning) -> str:
    """How channels were removed, for reports."""
    share = how.share if isinstance(how.share, Ceiling) else f"{100 * how.share:.4g}%"
    what = f"to {share}" if isinstance(how.share, Ceiling) else f"{share} of"
    told = f"{what} {how.channels} channels by {how.criterion}, restored by {how.restore}"
    more = "" if how.among == "layer" else f", {how.among}"
    floor = [f"{name} {v}" for name, v in how.floor._asdict().items() if v > 1]
    return ", ".join([told + more, *floor, *(f"not {pattern}" for pattern in how.untouched)])
