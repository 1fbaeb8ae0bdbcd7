"""Bits and channels of a network decided together, on its grids, within bytes."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from dfq_jax.allocation.costs import with_biases_of
from dfq_jax.api.grids import made_on_grids
from dfq_jax.api.request import Asked
from dfq_jax.errors import UsageError
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.numerics.knapsack import spent
from dfq_jax.optim.progress import Watcher
from dfq_jax.pruning.budget import Ceiling
from dfq_jax.pruning.criteria import CRITERIA, SetScores
from dfq_jax.pruning.groups import Subject
from dfq_jax.pruning.prune import Pruning, what_may_go
from dfq_jax.recipes.joint import (
    Choices,
    JointAllocation,
    at_scheme,
    choices_of,
    costs_of,
    few_enough,
    joint,
    limit_in_bytes,
)


class Together(NamedTuple):
    """What is asked of bits and channels together.

    Attributes:
      channels: which may go, how they are judged, and what makes up for them.
      ceiling: bytes that weights may take.
    """

    channels: Pruning
    ceiling: Ceiling


def require_joint_reach(subject: Subject, how: Together, asked: Asked) -> None:
    """Refuses bytes out of reach before images are made; biases that come later do not count.

    Raises:
      BudgetError: naming the smallest budget within reach.
      UsageError: for layers that are split, whose channels are others.
    """
    if asked.pipeline.surgery.split or asked.pipeline.surgery.value_aware:
        raise UsageError(
            "bits joint decides on the layers of the network, and split or value_aware makes "
            "others of them: leave one of the two out."
        )
    choices, _ = to_choose(subject.folded, subject, how, asked, np.ones(len(subject.coupled)))
    costs = costs_of(choices)
    limit_in_bytes(costs, how.ceiling, spent(costs, at_scheme(choices, asked.pipeline)))


def joined(
    subject: Subject, seen: Examples, how: Together, asked: Asked, watch: Watcher
) -> JointAllocation:
    """Bits and channels within bytes.

    Args:
      subject: the network, with images.
      seen: the same images.
      how: what is asked.
      asked: how what is left is quantized.
      watch: told what is being done.
    """
    made = made_on_grids(
        subject.model, seen, asked.pipeline, rules=asked.pipeline.rules, watch=watch
    )
    reference = with_biases_of(made.reference, made.quantized.model)
    scores = CRITERIA[how.channels.criterion].score(subject)
    choices, notes = to_choose(reference, subject, how, asked, scores)
    key = jax.random.key(asked.seed)
    more = {"task": asked.task, "key": key, "watch": watch}
    found = joint(choices, how.ceiling, asked.pipeline, **more)
    return found._replace(notes=(*notes, *found.notes))


def to_choose(
    reference: Model, subject: Subject, how: Together, asked: Asked, scores: SetScores
) -> tuple[Choices, tuple[str, ...]]:
    """All that can be decided, and what cannot, in words."""
    groups, notes = few_enough(subject, what_may_go(subject, how.channels).groups)
    floor = how.channels.floor
    return choices_of(reference, subject, groups, scores, asked.pipeline, floor), notes


def with_bits(asked: Asked, found: JointAllocation) -> Asked:
    """The same with the bits that were chosen."""
    return dataclasses.replace(
        asked, pipeline=dataclasses.replace(asked.pipeline, rules=found.rules)
    )
