"""What every player descends in a round, and the round itself."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from dfq_jax.graph.evaluate import apply_tiled, evaluate
from dfq_jax.optim.chunk_data import Fed
from dfq_jax.optim.steps import Among, Now, Player, Step, descent, in_turn
from dfq_jax.quantization.plan import Plan
from dfq_jax.synthesis.terms.base import weighted
from dfq_jax.training.images import (
    GENERATOR,
    STUDENT,
    Taught,
    generator_loss,
    said,
    shown_images,
)
from dfq_jax.training.inflation import inflated
from dfq_jax.training.losses import Answers, Lesson
from dfq_jax.training.method import GeneratedImages, Training
from dfq_jax.training.student import (
    float_student,
    kernel_codes,
    share_changed,
    student_hook,
    tensors_of,
    tracked,
    with_rounded_kernels,
)
from dfq_jax.training.wrappers import Heard, LossParts, wrapped
from dfq_jax.values import bound


def step_of(method: Training, plan: Plan, factor: float) -> Step:
    """A round of all players at so much of their learning rates."""
    objective = bound(student_loss, method, plan)
    student = descent(objective, bound(method.optimizer, factor))
    if method.inflation is not None:
        student = inflated(method.student, plan, method.inflation, student)
    source = method.images
    if not isinstance(source, GeneratedImages):
        return in_turn(Player(STUDENT, student))
    generator = descent(bound(generator_loss, method, plan), bound(source.optimizer, factor))
    return in_turn(
        Player(GENERATOR, generator, source.times),
        Player(STUDENT, student, source.lessons, source.warmup),
    )


def student_loss(
    method: Training, plan: Plan, x: PyTree, context: Among, now: Now
) -> tuple[Float[Array, ""], tuple[Mapping[str, Array], PyTree]]:
    """The loss of a student at a step, and what it remembers."""
    fed: Fed = context.context
    taught: Taught = fed.context
    image_key, own_key = jax.random.split(now.key)
    generator = context.others.get(GENERATOR)
    shown = shown_images(method, taught, fed.at(now.step), generator, image_key)
    ranges = now.memory["ranges"]
    labels = said(taught, shown.images) if shown.labels is None else shown.labels
    lesson = partial(lesson_loss, method, plan, taught, ranges, labels, own_key)
    loss, heard = wrapped(method.wrappers, lesson)(x, shown.images)
    ranges = tracked(method.student, ranges, heard.extremes, now.step)
    codes = kernel_codes(method.student, plan, x, taught.start)
    fresh = now.step % method.epoch == 0
    counted = jax.tree.map(lambda new, old: jnp.where(fresh, new, old), codes, now.memory["codes"])
    memory = {"ranges": ranges, "codes": counted}
    if (share := method.average) is not None:
        mean = lambda old, new: share * old + (1 - share) * new
        memory["average"] = jax.tree.map(mean, now.memory["average"], jax.lax.stop_gradient(x))
    moved = {"changed": share_changed(counted, codes)} if codes else {}  # none in float
    return loss, ({**heard.parts, **moved}, memory)


def lesson_loss(
    method: Training,
    plan: Plan,
    taught: Taught,
    ranges: Any,
    labels: Float[Array, "b ..."],
    key: Key[Array, ""],
    x: PyTree,
    images: Float[Array, "b h w c"],
) -> LossParts:
    """The weighted terms of one lesson."""
    watched = method.watch(taught.teacher.graph)
    followed = tensors_of(ranges)
    (exact, *_), hints = evaluate(taught.teacher, images, taps=watched, apply=apply_tiled)
    hook = student_hook(method.student, plan, x, taught.start, ranges)
    model = float_student(method.student, x, taught.start)
    taps = tuple(dict.fromkeys((*watched, *followed)))
    (rough, *_), found = evaluate(model, images, taps=taps, hook=hook, apply=apply_tiled)
    hints = {k: v[..., taught.stays[k]] if k in taught.stays else v for k, v in hints.items()}
    seen = {name: found[name] for name in watched}
    rounded = with_rounded_kernels(method.student, plan, x, taught.start, model)
    answers = Answers(exact, hints, taught.teacher), Answers(rough, seen, rounded)
    lesson = Lesson(images, labels, *answers, key)
    loss, parts = weighted(method.terms, lesson)
    extremes = {name: (jnp.min(found[name]), jnp.max(found[name])) for name in followed}
    return loss, Heard(parts, jax.lax.stop_gradient(extremes))
