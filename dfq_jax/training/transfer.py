"""Knowledge that moves without data to a network of another architecture.

The student is a float network with its norms in place; what comes back is quantized like any other.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dfq_jax.errors import UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import BatchNorm
from dfq_jax.graph.query import classes_of, weighted_nodes
from dfq_jax.graph.rewrite import with_params
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.synthesis.sources.pixels import from_natural
from dfq_jax.training.batch_norms import with_recorded_norms
from dfq_jax.training.distance import distance
from dfq_jax.training.engine import (
    TrainingReport,
    TrainingSetup,
    check_setup,
    learned_by,
    report_of,
    taught_of,
)
from dfq_jax.training.generator import generated_images
from dfq_jax.training.images import GENERATOR, Course, Taught
from dfq_jax.training.in_float import NO_LEVELS
from dfq_jax.training.method import GeneratedImages, Training
from dfq_jax.training.student import StudentKind, StudentStart, unfolded_student

RECORDED = 256
"""Images that norms are of at the end."""


def initialised(model: Model, key: Key[Array, ""]) -> Model:
    """The architecture with random weights: kernels by He, biases 0, norms that change nothing.

    Reference:
      He et al. 2015, "Delving Deep into Rectifiers".
    """
    params = {}
    for number, node in enumerate(weighted_nodes(model.graph)):
        slots = model.params[node.name]
        shape = slots["kernel"].shape
        scale = math.sqrt(2 / (math.prod(shape[:-1]) or 1))
        kernel = scale * jax.random.normal(jax.random.fold_in(key, number), shape)
        params[node.name] = {"kernel": kernel}
        if "bias" in slots:
            params[node.name]["bias"] = jnp.zeros_like(slots["bias"])
    plain = {"mean": 0.0, "var": 1.0, "scale": 1.0, "bias": 0.0}
    for node in model.graph.nodes:
        if isinstance(node.op, BatchNorm):
            own = model.params[node.name]
            params[node.name] = {slot: jnp.full_like(own[slot], plain[slot]) for slot in own}
    return dataclasses.replace(with_params(model, params), moments={})


def distilled(
    student: Model,
    teacher: Model,
    method: Training,
    setup: TrainingSetup,
) -> tuple[Model, TrainingReport]:
    """Trains a network of any architecture to say what another says, without data.

    Args:
      student: where it begins, e.g. `initialised`, with its batch norms in place; it reads and puts
        out what the teacher does.
      teacher: with its batch norms in place.
      method: e.g. `recipes.dfkd`; any whose losses compare outputs alone.
      setup: as of `trained`.

    Returns:
      The network, its norms with statistics of the last images, or the one it began as where that
      is nearer to the teacher; and how it went.

    Raises:
      UsageError: if shapes of inputs or outputs differ, or losses compare tensors that the student
        has not; else as of `trained`.
      DivergedError: as of `trained`.
    """
    began, whole = time.perf_counter(), fold_batch_norm(teacher)
    check_alike(student, teacher, method)
    check_setup(method, whole, setup)
    method = method._replace(student=StudentKind(live=True, batch_norms=True))
    start = StudentStart(student, {})
    taught = taught_of(method, whole, teacher, start, setup.images, setup.terms_key)
    learned = learned_by(Course(method, NO_LEVELS, setup.machine), taught, setup)
    made = dataclasses.replace(unfolded_student(learned.x, start), moments={})
    made = with_recorded_norms(made, last_images(method, taught, learned.players, setup))
    judged = partial(distance, whole, images=setup.held_out, directions=method.directions)
    apart = lambda m: judged(QuantizedModel(fold_batch_norm(m), NO_LEVELS, {}))
    report = report_of(method, began, (apart(student), apart(made)), learned.notes)
    return made if report.kept else student, report


def check_alike(student: Model, teacher: Model, method: Training) -> None:
    """Refuses a student that reads or puts out something else, or has not what losses compare.

    Raises:
      UsageError: naming the difference.
    """
    read, own_read = teacher.contract.shape, student.contract.shape
    says = lambda m: jax.eval_shape(evaluate, m, jnp.zeros((1, *m.contract.shape)))[0][0].shape[1:]
    said, own_said = says(teacher), says(student)
    if (read, said) != (own_read, own_said):
        raise UsageError(
            f"the student reads {own_read} and puts out {own_said}, its teacher {read} and {said}: "
            "give one of the same inputs and classes."
        )
    names = {node.name for node in student.graph.nodes}
    if missing := [name for name in method.watch(teacher.graph) if name not in names]:
        raise UsageError(
            f"{method.name} compares {', '.join(missing[:3])} of both networks, and the student "
            "has no such tensors: take a method that compares outputs alone, as `dfkd`."
        )


def last_images(
    method: Training,
    taught: Taught,
    players: Mapping[str, Any],
    setup: TrainingSetup,
) -> Float[Array, "n h w c"]:
    """Images like those that a student has seen last, for statistics of its norms."""
    source = method.images
    if not isinstance(source, GeneratedImages):
        return setup.images[:RECORDED]
    classes, key = classes_of(taught.teacher), jax.random.fold_in(setup.key, 3)
    natural, _ = generated_images(source.kind, players[GENERATOR], key, RECORDED, classes)
    return from_natural(natural, taught.teacher.contract)
