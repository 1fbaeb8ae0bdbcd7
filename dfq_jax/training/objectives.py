"""What every player descends in a round, and the round itself."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree, Shaped

from dfq_jax.optim.chunk_data import Fed
from dfq_jax.optim.steps import Among, Moving, Now, Player, Step, descent, in_turn
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.synthesis.terms.base import weighted
from dfq_jax.training.images import (
    GENERATOR,
    STUDENT,
    Course,
    StudentNow,
    Taught,
    both_answers,
    generator_loss,
    said,
    share_taken,
    shown_images,
    soft_row_loss,
)
from dfq_jax.training.inflation import Inflation, inflated
from dfq_jax.training.losses import Lesson
from dfq_jax.training.method import GeneratedImages, Projection, SoftRows
from dfq_jax.training.student import (
    kernel_codes,
    share_changed,
)
from dfq_jax.training.tracking import tensors_of, tracked
from dfq_jax.training.widths import at_width, stacked_widths
from dfq_jax.training.wrappers import Heard, LossParts, wrapped
from dfq_jax.values import bound


def step_of(course: Course, factor: float) -> Step:
    """A round of all players at so much of their learning rates."""
    method = course.method
    student = descent(bound(student_loss, course), bound(method.optimizer, factor))
    if method.inflation is not None:
        student = inflated(Inflation(method.student, course.plan, method.inflation), student)
    student = Step(student.begin, bound(paced_take, student))
    if method.project is not None:
        student = projected(method.project, student)
    source = method.images
    if isinstance(source, SoftRows):
        maker = descent(bound(soft_row_loss, course), bound(source.optimizer, factor))
        return in_turn(Player(GENERATOR, maker), Player(STUDENT, student))
    if not isinstance(source, GeneratedImages):
        return in_turn(Player(STUDENT, student))
    generator = descent(bound(generator_loss, course), bound(source.optimizer, factor))
    return in_turn(
        Player(GENERATOR, generator, source.times),
        Player(STUDENT, student, source.lessons, source.warmup),
    )


def paced_take(
    step: Step, state: Moving, context: Among, now: Now
) -> tuple[Moving, Float[Array, ""], Mapping[str, Any]]:
    """One step of a student, or the share of it that is taken."""
    after, loss, parts = step.take(state, context, now)
    pace = context.context.context.pace
    if pace is None:
        return after, loss, parts
    share = lambda old, new: old + pace * (new - old)
    return after._replace(x=jax.tree.map(share, state.x, after.x)), loss, parts


def projected(project: Projection, step: Step) -> Step:
    """A student's step, after which its variables are brought back to those that are allowed."""
    return Step(step.begin, bound(projected_take, project, step))


def projected_take(
    project: Projection, step: Step, state: Moving, context: Among, now: Now
) -> tuple[Moving, Float[Array, ""], Mapping[str, Any]]:
    """One step of `projected`."""
    after, loss, parts = step.take(state, context, now)
    return after._replace(x=project(after.x, context.context.context.start)), loss, parts


def student_loss(
    course: Course, x: PyTree, context: Among, now: Now
) -> tuple[Float[Array, ""], tuple[Mapping[str, Array], PyTree]]:
    """The loss of a student at a step, and what it remembers."""
    method, plan = course.method, course.plan
    fed: Fed = context.context
    taught: Taught = fed.context
    image_key, own_key = jax.random.split(now.key)
    generator = context.others.get(GENERATOR)
    shown = shown_images(course, taught, fed.at(now.step), generator, image_key)
    ranges = now.memory["ranges"]
    labels = said(taught, shown.images) if shown.labels is None else shown.labels
    lessons = method.images.lessons if isinstance(method.images, GeneratedImages) else 1
    taken = share_taken(method, now.step, lessons)
    at = StudentNow(ranges, taken, jax.random.fold_in(own_key, 1))
    told = ToldBeside(labels, at, own_key)
    lesson = partial(lesson_loss, course, taught, told)
    loss, heard = wrapped(method.wrappers, lesson)(x, shown.images)
    ranges = tracked(method.student.tracking, ranges, heard.extremes, now.step)
    codes = kernel_codes(method.student, plan, x, taught.start)
    fresh = now.step % method.epoch == 0
    counted = jax.tree.map(lambda new, old: jnp.where(fresh, new, old), codes, now.memory["codes"])
    memory = {"ranges": ranges, "codes": counted}
    if (share := method.average) is not None:
        mean = lambda old, new: share * old + (1 - share) * new
        memory["average"] = jax.tree.map(mean, now.memory["average"], jax.lax.stop_gradient(x))
    moved = {"changed": share_changed(counted, codes)} if codes else {}  # none in float
    more, held = weighted(method.penalties, x)
    return loss + more, ({**heard.parts, **held, **moved}, memory)


class ToldBeside(NamedTuple):
    """What a lesson is told beside its images.

    Attributes:
      labels: what the images show.
      now: where the student is.
      key: of draws.
    """

    labels: Float[Array, "b ..."]
    now: StudentNow
    key: Key[Array, ""]


def lesson_loss(
    course: Course, taught: Taught, told: ToldBeside, x: PyTree, images: Shaped[Array, "b ..."]
) -> LossParts:
    """The weighted terms of one lesson; of students of many widths those of all, added up."""
    loss, heard = one_lesson(course, taught, told, x, images)
    if not (widths := course.method.student.widths):
        return loss, heard
    begun = QuantizedModel(taught.start.model, course.plan, taught.start.qparams)

    def narrow(total: Array, width: tuple[Array, PyTree]):
        plan, own = at_width(course.plan, begun, x, width[1], width[0])
        lost, more = one_lesson(course._replace(plan=plan), taught, told, own, images)
        return total + lost, more.parts

    loss, each = jax.lax.scan(narrow, loss, stacked_widths(x, widths))
    parts = {f"{n} of {b} bits": v[i] for n, v in each.items() for i, b in enumerate(widths)}
    return loss, heard._replace(parts={**heard.parts, **parts})


def one_lesson(
    course: Course, taught: Taught, told: ToldBeside, x: PyTree, images: Shaped[Array, "b ..."]
) -> LossParts:
    """The weighted terms of one lesson of one student."""
    both = both_answers(course, taught, x, images, told.now)
    lesson = Lesson(images, told.labels, both.teacher, both.student, told.key)
    loss, parts = weighted(course.method.terms, lesson)
    least_and_most = lambda v: (jnp.min(v), jnp.max(v))
    extremes = {name: least_and_most(both.found[name]) for name in tensors_of(told.now.ranges)}
    return loss, Heard(parts, jax.lax.stop_gradient(extremes))
