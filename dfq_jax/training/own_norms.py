"""Live norms of a student that begins far from its teacher: statistics of its own tensors.

Rounding to one bit moves what norms read so far that the recorded statistics say nothing of it.
Papers train norms on each batch; here they stand still, so they are found anew before the first
step, norm after norm on what the ones before it leave:

    var + eps <- (var + eps) r,   mean <- m_student - sqrt(r) (m_teacher - mean),
    r = v_student / v_teacher

of images: then every norm makes of a channel the mean and variance that it has in the teacher, also
on images that do not match what was recorded. Scales and biases stay, and learn.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from dfq_jax.graph.evaluate import chained, evaluate
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import BatchNorm
from dfq_jax.graph.query import batch_norms
from dfq_jax.graph.rewrite import with_params
from dfq_jax.graph.semantics import Slots, Tensor
from dfq_jax.quantization.plan import Plan
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.training.student import (
    StudentKind,
    StudentStart,
    student_hook,
    student_start,
    trained_at_first,
    unfolded_student,
    viewed,
)

LOOKED_AT = 256
"""Images that statistics are of, at most."""
SMALLEST_VARIANCE = 1e-12
MOST_RATIO = 1e4
"""Of variances: beyond, rounding has left nothing of a channel."""


def begun_student(
    kind: StudentKind,
    quantized: QuantizedModel,
    unfolded: Model | None,
    images: Shaped[Array, "n ..."],
) -> StudentStart:
    """What of a student is not trained, with norms of its own where its kind says so.

    Raises:
      ValueError: if norms are live and there are none that fold into this network.
    """
    start = student_start(kind, quantized, unfolded)
    if not (kind.live and kind.own_norms) or unfolded is None or not len(images):
        return start
    return with_own_norms(kind, quantized.plan, start, unfolded, images)


def with_own_norms(
    kind: StudentKind,
    plan: Plan,
    start: StudentStart,
    teacher: Model,
    images: Float[Array, "n h w c"],
) -> StudentStart:
    """A start whose norms have statistics of the student.

    Args:
      kind: of student, its norms live.
      plan: what is quantized; activations are put on their levels, kernels as far as `kind.signs`
        does it.
      start: with the norms of the float network.
      teacher: the float network with its batch norms, node for node the same.
      images: normalised; no more than the first 256 are looked at.
    """
    new = own_statistics(kind, plan, start, teacher, images[:LOOKED_AT])
    return start._replace(model=with_params(start.model, new))


@partial(jax.jit, static_argnums=(0, 1))
def own_statistics(
    kind: StudentKind,
    plan: Plan,
    start: StudentStart,
    teacher: Model,
    images: Float[Array, "n h w c"],
) -> dict[str, Slots]:
    """{norm: its new mean and variance}."""
    read = tuple(dict.fromkeys(norm.inputs[0] for norm in batch_norms(teacher.graph)))
    _, taps = evaluate(teacher, images, taps=read)
    found: dict[str, Slots] = {}

    def renormed(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        if isinstance(node.op, BatchNorm):
            was, now = (moments_of_channels(x) for x in (taps[node.inputs[0]], args[0]))
            found[node.name] = matched_slots(slots, node.op.eps, was, now)
            slots = {**slots, **found[node.name]}
        return slots, args

    x = trained_at_first(kind, plan, start)
    edges = tuple((site, spec) for site, spec in plan.entries if site.argument is not None)
    rounded = student_hook(kind, dataclasses.replace(plan, entries=edges), x, start, {})
    model = viewed(kind, unfolded_student(x, start), start)
    evaluate(model, images, hook=chained(rounded, renormed))
    return found


def moments_of_channels(x: Tensor) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Mean and variance of each channel over images and positions."""
    axes = tuple(range(x.ndim - 1))
    return jnp.mean(x, axes), jnp.var(x, axes)


def matched_slots(
    slots: Slots, eps: float, was: tuple[Array, Array], now: tuple[Array, Array]
) -> dict[str, Array]:
    """Statistics by which `now` becomes what `was` became; a channel without variance stays."""
    alive = (was[1] > SMALLEST_VARIANCE) & (now[1] > SMALLEST_VARIANCE)
    ratio = jnp.clip(now[1] / jnp.maximum(was[1], SMALLEST_VARIANCE), 1 / MOST_RATIO, MOST_RATIO)
    ratio = jnp.where(alive, ratio, 1.0)
    mean = now[0] - jnp.sqrt(ratio) * (was[0] - slots["mean"])
    return {
        "mean": jnp.where(alive, mean, slots["mean"]),
        "var": jnp.maximum((slots["var"] + eps) * ratio - eps, 0.0),
    }
