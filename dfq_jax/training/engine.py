"""Runs a `Training`: by the one loop, saved as everything is, and kept only where it was worth it.

The student begins as a network on its levels and ends as one. What it learned is judged on images
that it has not seen; where it says less of what the teacher says than at the start, the start is
kept.
"""

import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree, Shaped

from dfq_jax.base.parallel import HERE, Machine, at_home
from dfq_jax.errors import DivergedError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import classes_of, last_weighted
from dfq_jax.optim.attempts import RESTARTS, at_lower_rates, rate_of, retold
from dfq_jax.optim.fit import FitResult, Metrics, fit
from dfq_jax.optim.pieces import Piece, save_piece
from dfq_jax.optim.progress import SILENT, Progress, Watcher
from dfq_jax.optim.state import NOWHERE, Place
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.synthesis.run.diversity import ALIKE
from dfq_jax.synthesis.sources.pixels import to_pixels
from dfq_jax.synthesis.terms.targets import batch_norm_targets
from dfq_jax.training.distance import distance
from dfq_jax.training.generator import begun_generator
from dfq_jax.training.images import (
    GENERATOR,
    STUDENT,
    Course,
    Taught,
    rows_at_steps,
)
from dfq_jax.training.method import GeneratedImages, SoftRows, Training
from dfq_jax.training.objectives import step_of
from dfq_jax.training.on_machine import check_machine, on_devices
from dfq_jax.training.own_norms import begun_student
from dfq_jax.training.soft_tokens import generator_at_first, table_of
from dfq_jax.training.student import (
    StudentStart,
    finished,
    kernel_codes,
    share_changed,
    trained_at_first,
)
from dfq_jax.training.suits import check_classes, check_images, check_shape
from dfq_jax.training.tracking import tracked_at_first
from dfq_jax.values import described, fingerprint

CHUNK = 20
LAST_GOOD = "last_good.npz"


class TrainingReport(NamedTuple):
    """How a training went.

    Attributes:
      method: its name.
      steps: of the student.
      before: how far its outputs were from the teacher's on held-out images at the start: KL in
        nats for a classifier or the next token, else squared error in units of their power, or of
        directions.
      after: the same at the end.
      kept: whether that was better, and kept.
      changed: share of the kernels' codes that are not what they were at the start.
      seconds: spent.
      notes: what went wrong on the way.
    """

    method: str
    steps: int
    before: float
    after: float
    kept: bool
    changed: float
    seconds: float
    notes: tuple[str, ...] = ()


class TrainingSetup(NamedTuple):
    """What a student is shown, and where it learns.

    Attributes:
      images: normalised, as 8-bit pixels can tell them, or rows of ids; a generator needs none.
      held_out: others, that judge; none where nothing is judged.
      key: the only source of randomness.
      machine: its devices share every batch; its precision is that of what layers multiply.
      place: keeps the state here and resumes from it.
      watch: told how far it is.
    """

    images: Shaped[Array, "n ..."]
    held_out: Shaped[Array, "m ..."]
    key: Key[Array, ""]
    machine: Machine = HERE
    place: Place = NOWHERE
    watch: Watcher = SILENT

    @property
    def terms_key(self) -> Key[Array, ""]:
        """The key of what a generator's terms draw once."""
        return jax.random.fold_in(self.key, 2)


def trained(
    quantized: QuantizedModel,
    teacher: Model,
    method: Training,
    setup: TrainingSetup,
    *,
    unfolded: Model | None = None,
) -> tuple[QuantizedModel, TrainingReport]:
    """Trains a network on its levels, without labels and without data.

    Args:
      quantized: where the student begins.
      teacher: the float network, node for node the same.
      method: who learns what from whom.
      setup: what it is shown, and where it learns.
      unfolded: the float network with its batch norms: for generators, which match their
        statistics, and students whose norms are live.

    Returns:
      The trained network, or the one it began as where that is nearer to the teacher; and how it
      went.

    Raises:
      UsageError: if there are fewer images than a step takes, a term needs classes that the network
        has not, or `place` belongs to another run.
      UnsupportedModelError: if a generator finds no statistics to match.
      DivergedError: if every attempt diverged; the last state before that is kept in `place`.
    """
    began = time.perf_counter()
    check_setup(method, teacher, setup)
    start = begun_student(method.student, quantized, unfolded, setup.images)
    taught = taught_of(method, teacher, unfolded, start, setup.images, setup.terms_key)
    learned = learned_by(Course(method, quantized.plan, setup.machine), taught, setup)
    made = finished(method.student, quantized.plan, learned.x, start, learned.ranges)
    apart = partial(distance, teacher, images=setup.held_out, directions=method.directions)
    codes = partial(codes_found, method.student, quantized.plan, start=start)
    changed = float(share_changed(codes(learned.first), codes(learned.x)))
    report = report_of(method, began, (apart(quantized), apart(made)), learned.notes, changed)
    return made if report.kept else quantized, report


def check_setup(method: Training, teacher: Model, setup: TrainingSetup) -> None:
    """Refuses what a method cannot learn from.

    Raises:
      UsageError: if there are fewer images than a step takes, devices that cannot share a batch,
        or no classes where a term needs them.
    """
    check_images(method, len(setup.images))
    check_classes(method, teacher)
    check_machine(setup.machine, method.batch)


def report_of(
    method: Training,
    began: float,
    gaps: tuple[float, float],
    notes: tuple[str, ...],
    changed: float = 0.0,
) -> TrainingReport:
    """How a training went; what ended nearer to the teacher is kept.

    Args:
      method: of training.
      began: when, by `time.perf_counter`.
      gaps: how far outputs are from the teacher's before and after, as `TrainingReport` has them.
      notes: what went wrong on the way.
      changed: share of the codes that are others.
    """
    before, after = gaps
    return TrainingReport(
        method=method.name,
        steps=method.steps,
        before=before,
        after=after,
        kept=math.isfinite(after) and after <= before,
        changed=changed,
        seconds=time.perf_counter() - began,
        notes=notes,
    )


class RunOutcome(NamedTuple):
    """What a run came to.

    Attributes:
      first: what the student trains, before the first step.
      x: after the last, or the average over steps.
      ranges: of activations that were tracked.
      notes: what went wrong on the way.
      players: {player: its variables} after the last step, the generator's among them.
    """

    first: PyTree
    x: PyTree
    ranges: Any
    notes: tuple[str, ...]
    players: Mapping[str, PyTree]


def learned_by(course: Course, taught: Taught, setup: TrainingSetup) -> RunOutcome:
    """Takes all steps, at lower rates where they diverge.

    Raises:
      DivergedError: if every attempt diverged; the last state before that is kept in `place`.
    """
    method, plan, key = course.method, course.plan, setup.key
    x = {STUDENT: trained_at_first(method.student, plan, taught.start)}
    x |= generators(method, taught, jax.random.fold_in(key, 0))
    inside = (setup.place / "training").knowing(facts_of(course, x, taught, key))
    with inside.owned():
        attempt = partial(attempted, TrainingRun(course, x, taught, setup._replace(place=inside)))
        result, failed = at_lower_rates(attempt)
        if result.status == "diverged":
            raise DivergedError(given_up(method, failed, inside, result))
    result = result._replace(x=at_home(result.x), memory=at_home(result.memory))
    notes = tuple(f"training {note}" for note in retold(failed)) + collapsed(result)
    return RunOutcome(x[STUDENT], *brought_back(method, result), notes, result.x)


def taught_of(
    method: Training,
    teacher: Model,
    unfolded: Model | None,
    start: StudentStart,
    images: Shaped[Array, "n ..."],
    key: Key[Array, ""],
) -> Taught:
    """What all players are given."""
    if method.rows:
        return Taught(teacher, None, {}, start, jnp.asarray(images))
    contract = teacher.contract
    if not isinstance(method.images, GeneratedImages):
        pixels = jnp.asarray(to_pixels(images, contract))
        return Taught(teacher, None, {}, start, pixels)
    if unfolded is None:
        raise ValueError("a generator needs the network with its batch norms: `unfolded`.")
    check_shape(method.images, teacher)
    targets, _ = batch_norm_targets(unfolded)
    shared = method.images.prepare(unfolded, targets, key)
    pixels = jnp.zeros((0,), jnp.uint8)
    if method.images.real:
        pixels = jnp.asarray(to_pixels(images, contract))
    return Taught(teacher, unfolded, targets, start, pixels, shared=shared)


def remembered_at_first(method: Training, taught: Taught) -> dict[str, PyTree]:
    """What the generator's terms remember before the first step, if there is one."""
    if isinstance(method.images, SoftRows):
        return {GENERATOR: ()}
    if not isinstance(method.images, GeneratedImages):
        return {}
    classes = classes_of(taught.teacher)
    return {GENERATOR: method.images.memory.start(taught.targets, 1, classes, {})}


def generators(method: Training, taught: Taught, key: Key[Array, ""]) -> dict[str, PyTree]:
    """The generator before its first step, if there is one."""
    if isinstance(method.images, SoftRows):
        return {GENERATOR: generator_at_first(taught.teacher, table_of(taught.teacher))}
    if not isinstance(method.images, GeneratedImages):
        return {}
    teacher, classes = taught.teacher, classes_of(taught.teacher)
    kind, rows = method.images.kind, rows_of_classes(teacher, classes)
    return {GENERATOR: begun_generator(kind, key, teacher.contract.shape, classes, rows)}


def rows_of_classes(teacher: Model, classes: int) -> Float[Array, "classes features"] | None:
    """What a classifier multiplies features by for each class; None if it is of another kind."""
    last = last_weighted(teacher.graph)
    kernel = teacher.params[last[0]]["kernel"] if last else jnp.zeros((0, 0))
    alone = kernel.reshape(-1, kernel.shape[-1])
    return alone.T if alone.shape == (kernel.shape[-2], classes) else None


def facts_of(course: Course, x: PyTree, taught: Taught, key: Key[Array, ""]) -> Mapping[str, Any]:
    """What the state of a run depends on."""
    return {
        "recipe": described(course.method),
        "dtype": course.machine.dtype,
        "network": fingerprint((x[STUDENT], taught.start.qparams)),
        "teacher": fingerprint(taught.teacher.params),
        "images": fingerprint((taught.pixels, taught.labels, taught.pace)),
        "key": fingerprint(key),
    }


class TrainingRun(NamedTuple):
    """What every attempt at a training begins with.

    Attributes:
      course: what is taught.
      x: what all players train, before the first step.
      taught: what they are given.
      setup: who is told, and where the state is kept.
    """

    course: Course
    x: Mapping[str, PyTree]
    taught: Taught
    setup: TrainingSetup


def attempted(run: TrainingRun, number: int) -> FitResult:
    """One attempt, at so much of the learning rate."""
    course, x, taught, setup = run
    method, plan, machine = course
    key, watch = setup.key, setup.watch
    if number:
        watch.says(f"training diverged; again at 1/{2**number} of the learning rate")
    start, tracking = taught.start, method.student.tracking
    ranges = tracked_at_first(tracking, plan, start.qparams, start.model.graph.inputs)
    heard: dict[str, PyTree] = {"ranges": ranges}
    heard["codes"] = codes_found(method.student, plan, x[STUDENT], taught.start)
    if method.average is not None:
        heard["average"] = x[STUDENT]
    return fit(
        step_of(course, rate_of(number)),
        on_devices(x, machine),
        taught,
        steps=method.rounds,
        key=jax.random.fold_in(key, 1),
        memory={STUDENT: heard, **remembered_at_first(method, taught)},
        chunk=CHUNK,
        on_chunk=partial(report, method, watch),
        store=(setup.place / f"attempt_{number}").store(),
        feed=partial(fed, method, len(taught.pixels), seed_of(key)),
    )


def seed_of(key: Key[Array, ""]) -> tuple[int, ...]:
    """A key as the seed of a generator of NumPy."""
    return tuple(int(v) for v in np.asarray(jax.random.key_data(key)).reshape(-1))


def fed(method: Training, count: int, seed: tuple[int, ...], first: int, steps: int) -> PyTree:
    """What some rounds read: rows of a fixed set; nothing where all images are generated."""
    source = method.images
    batch = min(source.real, count) if isinstance(source, GeneratedImages) else method.batch
    if not batch:
        return ()
    return jnp.asarray(rows_at_steps(seed, count, batch, first, steps))


def report(method: Training, watch: Watcher, step: int, metrics: Metrics) -> None:
    """Tells how far it is."""
    parts = {name.removeprefix(f"{STUDENT}/"): value for name, value in metrics.items()}
    watch.advances(Progress(0, 1, step, method.rounds, parts, "training"))


def brought_back(method: Training, result: FitResult) -> tuple[PyTree, Any]:
    """What a finished run learned, where it got to or the average over its steps, and ranges."""
    memory = result.memory[STUDENT]
    return result.x[STUDENT] if method.average is None else memory["average"], memory["ranges"]


codes_found = jax.jit(kernel_codes, static_argnums=(0, 1))


def collapsed(result: FitResult) -> tuple[str, ...]:
    """What to say of a generator whose images are all alike."""
    alike = result.history.get(f"{GENERATOR}/alike")
    if alike is None or not len(alike) or not float(alike[-1]) > ALIKE:
        return ()
    first = int(np.argmax(np.asarray(alike) > ALIKE))
    return (
        f"the generator collapsed: its images are alike (similarity {float(alike[-1]):.3f}, above "
        f"{ALIKE} first at step {first} of this process)",
    )


def given_up(method: Training, failed: tuple[int, ...], place: Place, result: FitResult) -> str:
    """What to say where every attempt diverged, after keeping the last good state."""
    kept = ""
    if place.folder is not None:
        path = place.folder / LAST_GOOD
        save_piece(path, Piece(result.x, {"steps": result.steps}))
        kept = f" The last state before is kept in {path}."
    return (
        f"training by {method.name} diverged at steps {', '.join(map(str, failed))}, the last time "
        f"at 1/{2**RESTARTS} of its learning rate.{kept} Use more bits, or begin from a network "
        "that has learned its rounding (`start=`)."
    )
