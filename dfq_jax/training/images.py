"""What players are shown: rows of a fixed set, or what a generator makes at the moment."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped, UInt8

from dfq_jax.base.parallel import HERE, Machine
from dfq_jax.graph.evaluate import apply_tiled, evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import classes_of
from dfq_jax.optim.steps import Among, Now
from dfq_jax.quantization.plan import Plan
from dfq_jax.synthesis.run.diversity import similarity
from dfq_jax.synthesis.sources.pixels import from_natural, to_natural
from dfq_jax.synthesis.terms.base import Observed, weighted
from dfq_jax.synthesis.terms.targets import Targets, observe
from dfq_jax.training.generator import GeneratorKind, generated_images
from dfq_jax.training.gradient_levels import with_gradients_on
from dfq_jax.training.level_rules import DONE, Share
from dfq_jax.training.losses import Answers, Lesson
from dfq_jax.training.method import (
    FixedImages,
    FixedRows,
    GeneratedImages,
    SoftRows,
    Training,
)
from dfq_jax.training.on_machine import layers_on, over_devices
from dfq_jax.training.soft_tokens import behind_table, soft_tokens, table_of
from dfq_jax.training.student import (
    StudentStart,
    float_student,
    student_hook,
    with_rounded_kernels,
)
from dfq_jax.training.tracking import tensors_of
from dfq_jax.types import InputContract

STUDENT, GENERATOR = "student", "generator"
"""Names of the players."""


class Course(NamedTuple):
    """What is taught, and on which levels; hashable.

    Attributes:
      method: who learns what from whom.
      plan: what of the student is quantized.
      machine: where.
    """

    method: Training
    plan: Plan
    machine: Machine = HERE


class Taught(NamedTuple):
    """What all players are given, and none trains.

    Attributes:
      teacher: the float network, node for node as the student; where that lacks channels, `stays`
        says which.
      unfolded: the same with its batch norms, where a generator matches their statistics.
      targets: these statistics.
      start: what of the student is not trained.
      pixels: of a fixed set, on the device as bytes, or its rows of ids; empty where images are
        generated.
      stays: {tensor: positions along its last axis that the student has}, where it has fewer.
      shared: what a generator's terms share, found once.
      labels: of the images of a fixed set; None for what the teacher says of them.
      pace: share of each of the student's steps that is taken; None for all of it.
    """

    teacher: Model
    unfolded: Model | None
    targets: Targets
    start: StudentStart
    pixels: Shaped[Array, "..."]
    stays: Mapping[str, Int[Array, " _"]] = {}
    shared: Any = ()
    labels: Float[Array, "n classes"] | None = None
    pace: Float[Array, ""] | None = None


class ShownImages(NamedTuple):
    """A batch.

    Attributes:
      images: normalised; rows of ids, or what stands for them, as they are.
      labels: what they were made for; None where nobody said.
    """

    images: Shaped[Array, "b ..."]
    labels: Float[Array, "b classes"] | None


def shown_images(
    course: Course, taught: Taught, rows: Any, generator: Any, key: Key[Array, ""]
) -> ShownImages:
    """The images of a student's step; no slope passes to where they come from.

    Args:
      course: whose method says where they come from.
      taught: what all players are given.
      rows: of a fixed set, those of this step; else nothing.
      generator: what it has learned so far; else None.
      key: for augmentation and codes.
    """
    method = course.method
    source = method.images
    if isinstance(source, FixedRows | SoftRows):
        shown = shown_rows(source, taught, taught.pixels[rows], generator)
        return jax.lax.stop_gradient(over_devices(shown, course.machine))
    contract = taught.teacher.contract
    match source:
        case FixedImages(augment):
            natural = to_natural(normalised(taught.pixels[rows], contract), contract)
            labels = None if taught.labels is None else taught.labels[rows]
            images = augment(key, natural)
        case GeneratedImages(kind):
            classes = classes_of(taught.teacher)
            images, labels = generated_images(kind, generator, key, method.batch, classes)
            if source.real:
                given = normalised(taught.pixels[rows], contract)
                images = jnp.concatenate([to_natural(given, contract), images])
                labels = jnp.concatenate([said(taught, given), labels])
            images = source.augment(jax.random.fold_in(key, 1), images)
    shown = ShownImages(from_natural(images, contract), labels)
    return jax.lax.stop_gradient(over_devices(shown, course.machine))


def shown_rows(
    source: FixedRows | SoftRows, taught: Taught, rows: Shaped[Array, "b ..."], generator: Any
) -> ShownImages:
    """Rows as they are, or what a generator makes of them; nobody asks for their labels."""
    made = soft_tokens(generator, taught.teacher, rows) if isinstance(source, SoftRows) else rows
    return ShownImages(made, jnp.zeros((len(rows), 0)))


def said(taught: Taught, images: Float[Array, "b h w c"]) -> Float[Array, "b ..."]:
    """The classes that the teacher says, of images as they are before anything moves them."""
    (exact, *_), _ = evaluate(taught.teacher, images, apply=apply_tiled)
    return jax.nn.one_hot(jnp.argmax(exact, -1), exact.shape[-1])


def rows_at_steps(
    order: tuple[int, ...], count: int, batch: int, first: int, steps: int
) -> Int[np.ndarray, "steps batch"]:
    """Which images some steps show: in every epoch all once, but for a last incomplete batch.

    Args:
      order: seed of all orders; that of an epoch depends on its number alone, so that a resumed run
        goes on where it was.
      count: images there are, at least a batch.
      batch: images of a step.
      first: step.
      steps: how many.
    """
    length = count // batch

    def epoch(number: int) -> np.ndarray:
        drawn = np.random.default_rng((*order, number)).permutation(count)
        return drawn[: length * batch].reshape(length, batch)

    last = first + steps - 1
    rows = np.concatenate([epoch(n) for n in range(first // length, last // length + 1)])
    return rows[first % length :][:steps].astype(np.int32)


def normalised(pixels: UInt8[Array, "b h w c"], contract: InputContract) -> Float[Array, "b h w c"]:
    """8-bit pixels as network input, traceable; see `pixels.from_pixels`."""
    mean, std = np.array(contract.mean, np.float32), np.array(contract.std, np.float32)
    return (pixels.astype(jnp.float32) / np.float32(255) - mean) / std


def generator_loss(
    course: Course, x: PyTree, context: Among, now: Now
) -> tuple[Float[Array, ""], tuple[Mapping[str, Array], PyTree]]:
    """What a generator is told: terms of synthesis, of the teacher's view of its images.

    Terms of an adversary find a `Lesson` where others find what a recipe shares.
    """
    taught: Taught = context.context.context
    method = course.method
    source: Any = method.images
    model: Any = taught.unfolded
    image_key, own_key = jax.random.split(now.key)
    size, classes = method.batch, classes_of(taught.teacher)
    natural, labels = generated_images(source.kind, x, image_key, size, classes)
    if source.second is not None:
        other = source.kind._replace(draw=source.second)
        more = generated_images(other, x, jax.random.fold_in(image_key, 1), size, classes)
        natural, labels = (
            jnp.concatenate(each) for each in zip((natural, labels), more, strict=True)
        )
    images = over_devices(from_natural(natural, model.contract), course.machine)
    seen = observe(model, taught.targets, images)
    told = (images, natural, seen.logits, seen.stats, seen.taps, taught.targets)
    shared: Any = taught.shared
    if source.against:
        now_at = StudentNow({}, share_taken(method, now.step, source.times))
        both = both_answers(course, taught, context.others[STUDENT], images, now_at)
        shared = Lesson(images, labels, both.teacher, both.student, own_key)
    turn = jnp.zeros((), jnp.int32)
    observed = Observed(*told, shared, labels, now.memory, turn, now.step, own_key)
    loss, parts = weighted(source.terms, observed)
    alike = similarity(jax.lax.stop_gradient(natural))
    memory = source.memory.step(jax.lax.stop_gradient(observed))
    return loss, ({**parts, "alike": alike}, memory)


def soft_row_loss(
    course: Course, x: PyTree, context: Among, now: Now
) -> tuple[Float[Array, ""], tuple[Mapping[str, Array], PyTree]]:
    """`-D`: what makes soft tokens climbs what the student descends."""
    fed: Any = context.context
    taught: Taught = fed.context
    rows = soft_tokens(x, taught.teacher, taught.pixels[fed.at(now.step)])
    both = both_answers(course, taught, context.others[STUDENT], rows, StudentNow({}))
    lesson = Lesson(rows, jnp.zeros((len(rows), 0)), both.teacher, both.student, now.key)
    apart, _ = weighted(course.method.terms, lesson)
    return -apart, ({"apart": apart}, ())


class StudentNow(NamedTuple):
    """Where a student is.

    Attributes:
      ranges: of activations that are tracked; where there are none, levels are those of the start.
      taken: share of its steps.
      key: of draws on the way back, where gradients are rounded at random.
    """

    ranges: Any
    taken: Share = DONE
    key: Key[Array, ""] | None = None


class BothAnswers(NamedTuple):
    """What both networks make of a batch.

    Attributes:
      teacher: of the float network; of tensors where the student has fewer channels, these alone.
      student: of the network that learns.
      found: all tensors of the student that were asked for.
    """

    teacher: Answers
    student: Answers
    found: Mapping[str, Float[Array, "..."]]


def both_answers(
    course: Course, taught: Taught, x: PyTree, images: Shaped[Array, "b ..."], now: StudentNow
) -> BothAnswers:
    """What both networks make of a batch.

    Args:
      course: who learns, on which levels.
      taught: what all players are given.
      x: what the student trains.
      images: normalised, or rows of ids; of soft rows what stands for them.
      now: where the student is.
    """
    kind, plan = course.method.student, course.plan
    soft = isinstance(course.method.images, SoftRows)
    read = partial(behind_table, table=table_of(taught.teacher)) if soft else whole_network
    watched, followed = course.method.watch(taught.teacher.graph), tensors_of(now.ranges)
    apply = layers_on(course.machine)
    (exact, *_), hints = evaluate(read(taught.teacher), images, taps=watched, apply=apply)
    hook = student_hook(kind, plan, x, taught.start, now.ranges, now.taken)
    model = float_student(kind, x, taught.start, now.taken)
    taps = tuple(dict.fromkeys((*watched, *followed)))
    if (bits := course.method.gradient_bits) is not None and now.key is not None:
        apply = with_gradients_on(apply, bits, now.key)
    (rough, *_), found = evaluate(read(model), images, taps=taps, hook=hook, apply=apply)
    hints = {k: v[..., taught.stays[k]] if k in taught.stays else v for k, v in hints.items()}
    seen = {name: found[name] for name in watched}
    rounded = with_rounded_kernels(kind, plan, x, taught.start, model)
    teacher, student = Answers(exact, hints, taught.teacher), Answers(rough, seen, rounded)
    return BothAnswers(teacher, student, found)


def whole_network(model: Model) -> Model:
    """All of a network, which reads what it always does."""
    return model


def share_taken(method: Training, step: Int[Array, ""], times: int) -> Float[Array, ""]:
    """Which share of a student's steps is taken, by those of a player who takes `times` a round.

    Rounds in which the student stands still count for nothing.
    """
    warmup = method.images.warmup if isinstance(method.images, GeneratedImages) else 0
    done = step.astype(jnp.float32) / times - warmup
    return jnp.clip(done / (method.rounds - warmup), 0.0, 1.0)


def generator_refusal(kind: GeneratorKind, shape: tuple[int, int, int]) -> str:
    """Why no generator makes images of this shape; empty if it does."""
    height, width = shape[:2]
    if height % kind.scale == width % kind.scale == 0:
        return ""
    return (
        f"the generator makes images of sizes divisible by {kind.scale}, and this network reads "
        f"{height}x{width} pixels: import it with such a size, or train by a method of fixed "
        "images."
    )
