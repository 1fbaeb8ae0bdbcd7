"""A network that adapts to unlabelled images, without those that it was trained on."""

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from dfq_jax.graph.graph import Model
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.optim.state import NOWHERE, Place
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.training.batch_norms import with_recorded_norms
from dfq_jax.training.engine import TrainingSetup, learned_by, taught_of
from dfq_jax.training.images import Course
from dfq_jax.training.in_float import NO_LEVELS
from dfq_jax.training.method import Training
from dfq_jax.training.pseudo_labels import classifier_of, likely_classes, pseudo_labels
from dfq_jax.training.student import StudentStart, unfolded_student
from dfq_jax.training.suits import check_classes, check_images
from dfq_jax.values import Bound, bound


class EpochTraining(NamedTuple):
    """How a network learns, epoch after epoch: by one program.

    Attributes:
      method: of each epoch.
      pace: number of an epoch, from 0 -> share of each step that is taken in it.
    """

    method: Training
    pace: Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class AdaptationReport:
    """How an adaptation went.

    Attributes:
      epochs: how many.
      moved: share of the images whose most likely class changed.
      relabelled: share of the images whose pseudo label changed from the first epoch to the last.
      seconds: spent.
      notes: what went wrong on the way.
    """

    epochs: int
    moved: float
    relabelled: float
    seconds: float
    notes: tuple[str, ...] = ()


def held_layer(name: str) -> Bound[PyTree]:
    """After every step a layer is what it was at the start."""
    return bound(with_layer_held, name)


def with_layer_held(name: str, x: PyTree, start: StudentStart) -> PyTree:
    """What `held_layer` makes of what is trained."""
    first = {slot: start.model.params[name][slot] for slot in x["weights"][name]}
    return {**x, "weights": {**x["weights"], name: first}}


def adapted(
    model: Model,
    images: Float[Array, "n h w c"],
    how: EpochTraining,
    epochs: int,
    key: Key[Array, ""],
    *,
    place: Place = NOWHERE,
    watch: Watcher = SILENT,
) -> tuple[Model, AdaptationReport]:
    """Adapts a classifier to unlabelled images; its last layer stays.

    Each epoch begins with pseudo labels of all images.

    Args:
      model: with its batch norms in place.
      images: normalised, unlabelled.
      how: it learns in each epoch, e.g. of `recipes.shot`.
      epochs: how many.
      key: the only source of randomness.
      place: keeps the state of the epochs here and resumes from it.
      watch: told how far it is.

    Returns:
      The adapted network and how it went. Nothing judges it: there are no labels.

    Raises:
      UsageError: for a network that is no classifier, or fewer images than a step takes.
      DivergedError: if an epoch diverged at every rate.
    """
    began, held = time.perf_counter(), held_layer(classifier_of(model))
    check_classes(how.method, model)
    check_images(how.method, len(images))
    method = how.method._replace(project=held)
    first = pseudo_labels(model, images)
    now, labels, notes = model, first, ()
    for number in range(epochs):
        labels = pseudo_labels(now, images) if number else first
        start = StudentStart(now, {})
        own = jax.random.fold_in(key, number)
        setup = TrainingSetup(images, images[:0], own, place=place / f"epoch_{number}", watch=watch)
        taught = taught_of(method, fold_batch_norm(model), None, start, images, own)
        pace = jnp.float32(how.pace(number))
        taught = taught._replace(labels=one_hot_of(model, labels), pace=pace)
        learned = learned_by(Course(method, NO_LEVELS), taught, setup)
        now = dataclasses.replace(unfolded_student(learned.x, start), moments={})
        if method.student.batch_norms:
            now = with_recorded_norms(now, images)
        notes += learned.notes
    changed = lambda a, b: float(jnp.mean((a != b).astype(jnp.float32)))
    moved = changed(likely_classes(now, images), likely_classes(model, images))
    told = (epochs, moved, changed(labels, first), time.perf_counter() - began, notes)
    return now, AdaptationReport(*told)


def one_hot_of(model: Model, labels: Int[Array, " n"]) -> Float[Array, "n classes"]:
    """Labels as rows of a classifier's outputs."""
    return jax.nn.one_hot(labels, model.params[classifier_of(model)]["kernel"].shape[-1])
