"""A float network that learns from another: what is left of a pruned one, from the whole.

The student is the network itself with its batch norms in place; norms keep their statistics while
it learns, and are given new ones afterwards that leave its function as it is, so that everything
which reads them (ranges, equalization, synthesis) sees the network that there is.
"""

import dataclasses
import time
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import BatchNorm
from dfq_jax.graph.rewrite import with_params
from dfq_jax.graph.semantics import Slots
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.pruning.refit import HostMoments, in_whole_batches, moved_as
from dfq_jax.quantization.plan import FLOAT, Plan
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.training.distance import distance
from dfq_jax.training.engine import (
    TrainingReport,
    TrainingSetup,
    check_setup,
    learned_by,
    report_of,
    taught_of,
)
from dfq_jax.training.images import Course
from dfq_jax.training.method import Training
from dfq_jax.training.student import StudentKind, StudentStart, unfolded_student

NO_LEVELS = Plan((), (), FLOAT, "zsq_all_low")
"""Everything stays in float."""


def trained_in_float(
    model: Model,
    teacher: Model,
    method: Training,
    setup: TrainingSetup,
    *,
    stays: Mapping[str, Int[np.ndarray, " _"]] | None = None,
    masks: Mapping[str, Bool[np.ndarray, "..."]] | None = None,
) -> tuple[Model, TrainingReport]:
    """Trains a network without data to do what another does.

    Args:
      model: where the student begins, with its batch norms in place.
      teacher: the network it learns from, with the same nodes, whose layers may be wider.
      method: by which losses and steps it learns; its kind of student is of networks on levels, and
        is not looked at.
      setup: as of `trained`; there are images or rows.
      stays: {tensor: positions along the teacher's last axis that the student has}, where fewer.
      masks: {layer: which of its weights may differ from zero}, where some may not.

    Returns:
      The trained network, or the one it began as where that is nearer to the teacher; and how it
      went: distances as of `trained`, no codes. Moments of layers without norms are forgotten.

    Raises:
      UsageError: as of `trained`.
      DivergedError: likewise.
    """
    began, method = time.perf_counter(), method._replace(student=StudentKind(live=True))
    whole = fold_batch_norm(teacher)
    check_setup(method, whole, setup)
    start = StudentStart(model, {}, jax.tree.map(jnp.asarray, dict(masks or {})))
    taught = taught_of(method, whole, None, start, setup.images, setup.key)
    taught = taught._replace(stays=jax.tree.map(jnp.asarray, dict(stays or {})))
    learned = learned_by(Course(method, NO_LEVELS, setup.machine), taught, setup)
    made = dataclasses.replace(unfolded_student(learned.x, start), moments={})
    judged = partial(distance, whole, images=setup.held_out, directions=method.directions)
    apart = lambda m: judged(QuantizedModel(fold_batch_norm(m), NO_LEVELS, {}))
    report = report_of(method, began, (apart(model), apart(made)), learned.notes)
    return norms_following(model, made, setup.images) if report.kept else model, report


def norms_following(before: Model, after: Model, images: Shaped[Array, "n ..."]) -> Model:
    """A network whose norms have the statistics that they now meet, and compute what they did.

        (x - m) / sqrt(v + e) g + b = (x - m') / sqrt(v' + e) g' + b'

    `m'` has moved from the recorded mean as the means of images did between the networks, `v'` by
    the ratio of their variances: images that do not match what was recorded do no harm.

    Args:
      before: whose norms have statistics that are true of it.
      after: the same shapes and norms, other weights.
      images: that show both.
    """
    norms = {
        node.name: (node.inputs[0], node.op.eps)
        for node in after.graph.nodes
        if isinstance(node.op, BatchNorm)
    }
    if not norms:
        return after
    read = tuple(dict.fromkeys(name for name, _ in norms.values()))
    was, now = (moments_of_tensors(model, read, images) for model in (before, after))
    slots = {
        norm: restated(after.params[norm], eps, was[name], now[name])
        for norm, (name, eps) in norms.items()
    }
    return with_params(after, slots)


def restated(slots: Slots, eps: float, was: HostMoments, now: HostMoments) -> Slots:
    """A norm with statistics that have moved from `was` to `now`; see `norms_following`."""
    old = HostMoments(*(np.asarray(slots[name], np.float64) for name in ("mean", "var")))
    new = moved_as(old, was, now)
    gain = np.asarray(slots.get("scale", 1.0)) / np.sqrt(old.var + eps)
    bias = np.asarray(slots.get("bias", 0.0)) + gain * (new.mean - old.mean)
    made = {"mean": new.mean, "var": new.var, "scale": gain * np.sqrt(new.var + eps), "bias": bias}
    return {**slots, **{name: jnp.asarray(v, jnp.float32) for name, v in made.items()}}


def moments_of_tensors(
    model: Model, names: tuple[str, ...], images: Shaped[Array, "n ..."]
) -> dict[str, HostMoments]:
    """{tensor: mean and variance of its channels over images and positions}."""
    sums = [means_of(model, names, batch) for batch in in_whole_batches(images)]
    mean = lambda name, at: np.mean([np.asarray(s[name][at], np.float64) for s in sums], axis=0)
    about = lambda name: np.maximum(mean(name, 1) - mean(name, 0) ** 2, 0.0)
    return {name: HostMoments(mean(name, 0), about(name)) for name in names}


@partial(jax.jit, static_argnums=1)
def means_of(
    model: Model, names: tuple[str, ...], images: Shaped[Array, "n ..."]
) -> dict[str, tuple[Array, Array]]:
    """{tensor: means of each channel and of its square}."""
    _, taps = evaluate(model, images, taps=names)
    over = lambda x: jnp.mean(x.reshape(-1, x.shape[-1]), 0)
    return {name: (over(x), over(x**2)) for name, x in taps.items()}
