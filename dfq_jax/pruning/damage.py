"""What it costs to lose so many channels of one group, all else as it was: measured on images.

In the units in which `allocation/sensitivity.py` says what fewer bits cost, so that one choice can
weigh them against each other.
"""

from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float, Shaped

from dfq_jax.graph.channels import groups_of
from dfq_jax.graph.graph import Model
from dfq_jax.graph.heads import Part
from dfq_jax.graph.rewrite import with_params
from dfq_jax.graph.tasks import Task, parts_of
from dfq_jax.numerics.substitution import Coefficients, Places
from dfq_jax.passes.moments import mean_output
from dfq_jax.passes.select import Kept, standing
from dfq_jax.pruning.budget import Ladder
from dfq_jax.pruning.criteria import ChannelMoments, channel_moments, reading_columns
from dfq_jax.pruning.groups import Subject
from dfq_jax.pruning.restore import shifted, taken_over
from dfq_jax.quantization.outputs import PartValues, output_cost, parts_outputs

DAMPING = 0.01
"""Of covariances of channels, in units of their mean variance."""
MOST_IMAGES = 64
"""Images that are looked at: of each group every level is tried on all of them."""


def channel_losses(
    subject: Subject, ladders: tuple[Ladder, ...], *, task: Task | None = None
) -> Float[np.ndarray, "groups levels"]:
    """How far the outputs move if a group of channels stands at a level.

    Channels that go are not read any more, and the others take over what least squares on images
    say of them: what layers fitted anew do at the least.

    Args:
      subject: the network, with images.
      ladders: how each group may shrink, all with as many levels, the last without a loss.
      task: what the network is for; None for what its graph says.

    Returns:
      Costs as `quantization.outputs.output_cost` has them, of classes in nats; never negative, and
      never rising with the number of channels.
    """
    images, model = subject.seen[:MOST_IMAGES], subject.folded
    parts = parts_of(model, task)
    names = tuple(sorted({node.inputs[0] for node, _, _ in reading_columns(subject)}))
    known = channel_moments(model, names, images)
    exact = part_values(model, images, parts)
    losses = np.zeros((len(ladders), len(ladders[0].counts)))
    for losses_of_group, (order, counts) in zip(losses, ladders, strict=True):
        for level, count in enumerate(counts):
            if count == len(order):
                continue
            kept = np.ones(len(subject.coupled), bool)
            kept[order[count:]] = False
            found = moved(without(subject, kept, known), images, exact, parts, task)
            losses_of_group[level] = max(float(found), 0.0)
    return np.minimum.accumulate(losses, axis=1)


def without(subject: Subject, kept: Kept, known: dict[str, ChannelMoments]) -> Model:
    """The folded network in which nothing reads some channels, and others stand in for them.

    Args:
      subject: the network.
      kept: which sets stay.
      known: of every tensor that a layer reads.
    """
    stays, made = standing(subject.coupled, kept), subject.folded
    for node, numbers, _ in reading_columns(subject):
        left = stays[numbers]
        if left.all() or groups_of(node.op) > 1:
            continue
        kernel = np.asarray(made.params[node.name]["kernel"], np.float64)
        mean, spread = known[node.inputs[0]]
        by = partial(explained, spread)
        replaced = taken_over(kernel, left, len(mean), by)
        made = with_params(made, {node.name: {"kernel": jax.device_put(np.float32(replaced))}})
        gap = jax.device_put(np.float32(kernel - replaced))
        missing = mean_output(node, gap, jax.device_put(np.float32(np.resize(mean, len(left)))))
        made = shifted(made, node.name, np.asarray(missing, np.float64))
    return made


def explained(spread: Float[np.ndarray, "..."], gone: Places, left: Places) -> Coefficients:
    """Channels by those left, in the sense of least squares; by none where variances alone are
    known."""
    if spread.ndim == 1:
        return np.zeros((len(gone), len(left)))
    inner = spread[np.ix_(left, left)]
    pull = DAMPING * max(float(np.trace(inner)) / len(inner), 1e-30)
    return np.linalg.solve(inner + pull * np.eye(len(inner)), spread[np.ix_(left, gone)]).T


@partial(jax.jit, static_argnames="parts")
def part_values(model: Model, images: Shaped[Array, "n ..."], parts: tuple[Part, ...]):
    """The outputs of a network by parts."""
    return parts_outputs(model, images, parts)


@partial(jax.jit, static_argnames=("parts", "task"))
def moved(
    model: Model,
    images: Shaped[Array, "n ..."],
    exact: PartValues,
    parts: tuple[Part, ...],
    task: Task | None,
) -> Float[Array, ""]:
    """How far the outputs of a network are from others."""
    return output_cost(parts, exact, parts_outputs(model, images, parts), task)
