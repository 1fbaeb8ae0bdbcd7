"""`dfq.adapt`, `dfq.distill`: a network learns in float from what there is, then is quantized."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import jax
import numpy as np
from jaxtyping import Array, Float

from dfq_jax.api.delivered import calibrating, split_probes
from dfq_jax.api.given import MOST_PICTURES, GivenImages, image_set
from dfq_jax.api.quantize import check_bits, making_for, quantized_on, seen_for
from dfq_jax.api.request import (
    Asked,
    Follow,
    Settings,
    check_synthesis,
    following,
    resolved,
    training_key,
)
from dfq_jax.api.result import Result
from dfq_jax.data.accuracy import pick
from dfq_jax.errors import UsageError
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import classes_of
from dfq_jax.io.artifacts.artifact import weights_sha256
from dfq_jax.io.load import load
from dfq_jax.io.zoo.known import names
from dfq_jax.io.zoo.untrained import untrained
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.recipes.dfkd import dfkd
from dfq_jax.recipes.foresight import training_foreseen
from dfq_jax.recipes.shot import shot
from dfq_jax.recipes.trainings import check_positive
from dfq_jax.training.adaptation import AdaptationReport, adapted
from dfq_jax.training.engine import TrainingReport, TrainingSetup
from dfq_jax.training.method import Training
from dfq_jax.training.suits import check_images, check_suits
from dfq_jax.training.transfer import check_alike, distilled, initialised

HELD = 2**31
"""Bytes of images that are held to learn from."""


def adapt(
    model: Model,
    images: GivenImages,
    *,
    epochs: int = 15,
    batch: int = 64,
    watch: Watcher = SILENT,
    state_folder: str | Path | None = None,
    **settings: Unpack[Settings],
) -> Result:
    """Adapts a classifier to pictures that nobody labelled, then quantizes it (SHOT).

    For a network whose users have other pictures than it was trained on. The data it was trained on
    are not needed; its last layer stays.

    Args:
      model: with its batch norms in place.
      images: of where it will work, as many as there are; up to 256 of them calibrate, and a
        quarter of those judges and is never learned from.
      epochs: how often each is shown.
      batch: images of a step.
      watch: told what is being done.
      state_folder: keeps state here and resumes from it.
      **settings: of `quantize`.

    Returns:
      What `quantize` does; losses are those against the adapted network.

    Raises:
      UsageError: for a bad argument; images that were made from a network; fewer than a batch; a
        network that is no classifier of images.
      PlanError, BudgetError: for bits that the network cannot have.
      UnsupportedModelError: for a network with several last layers.
      DivergedError: if an epoch diverged at every rate.
    """
    for name, value in (("epochs", epochs), ("batch", batch)):
        check_positive(name, value)
    how = shot(count=batch, batch=batch, epochs=epochs)
    check_suits(how.method, model)
    check_synthesis(model, settings, given=True)
    asked, follow = resolved(model, settings), following(watch, state_folder)
    check_bits(model, asked)
    most = max(MOST_PICTURES, HELD // (4 * int(np.prod(model.contract.shape))))
    brought = image_set(images, model.input, follow.watch.says, most)
    check_real(brought)
    few, learned = set_apart(brought)
    check_images(how.method, len(learned))
    how = shot(count=len(learned), batch=batch, epochs=epochs)
    looked_at, follow = seen_for(model, few, making_for(model, asked), asked, follow)
    follow = with_foresight(model, epochs * len(learned), follow)
    follow.begins("training")
    follow.watch.says(f"adapting to {len(learned)} images: {epochs} epochs in steps of {batch}")
    key, kept = training_key(asked.seed), {"place": follow.place, "watch": follow.watch}
    made, report = adapted(model, learned, how, epochs, key, **kept)
    told = {"adapted": f"{epochs} epochs of {len(learned)} images, {batch} a step"}
    result = quantized_on(made, looked_at._replace(fitted=True), asked, follow)
    return with_origin(result, model, told, (*report.notes, told_of_adaptation(report)), follow)


def check_real(images: Examples) -> None:
    """Refuses images that a network was asked for: they show what it has seen already.

    Raises:
      UsageError: saying what to give.
    """
    if not images.given:
        raise UsageError(
            "these images were made from a network, and adapting is to pictures of where it will "
            "work: give a folder or a zip of pictures, or an array of them."
        )


def set_apart(images: Examples) -> tuple[Examples, Float[Array, "n h w c"]]:
    """Images that calibrate and judge, and those that are learned from: all but the judges."""
    at = np.array(pick(len(images), MOST_PICTURES))
    few = dataclasses.replace(images, arrays=(images.images[at],))
    judges = at[calibrating(len(at)) :]
    return few, images.images[np.setdiff1d(np.arange(len(images)), judges)]


def told_of_adaptation(report: AdaptationReport) -> str:
    """How it went, in a sentence."""
    return (
        f"adapted in {report.epochs} epochs: {100 * report.moved:.1f} % of the images are of "
        f"another class now, and {100 * report.relabelled:.1f} % of the labels it learned from "
        "changed on the way; nothing here knows which are right"
    )


def with_foresight(model: Model, shown: int, follow: Follow) -> Follow:
    """Those who follow, with how long learning from so many images is foreseen to take."""
    expected = training_foreseen(model, shown)
    return dataclasses.replace(follow, foreseen={**follow.foreseen, **expected})


def with_origin(
    result: Result, model: Model, told: dict[str, str], notes: tuple[str, ...], follow: Follow
) -> Result:
    """A result that says what it was made of, and how."""
    for note in notes:
        follow.watch.says(note)
    report = dataclasses.replace(result.report, notes=(*result.report.notes, *notes))
    more: dict[str, Any] = {"settings": {**result.settings, **told}, "report": report}
    return dataclasses.replace(result, original=weights_sha256(model), **more)


class Pupil(NamedTuple):
    """A network that learns from another.

    Attributes:
      model: where it begins.
      name: as it was asked for.
      random: whether its weights were drawn.
    """

    model: Model
    name: str
    random: bool


def distill(
    model: Model,
    student: Model | str | Path,
    images: GivenImages | None = None,
    *,
    train: int | None = None,
    batch: int | None = None,
    watch: Watcher = SILENT,
    state_folder: str | Path | None = None,
    **settings: Unpack[Settings],
) -> Result:
    """Teaches a network of another architecture what one says, without data, and quantizes it.

    A generator makes what both are shown (DFKD). It takes hours on a CPU: the student learns all it
    knows.

    Args:
      model: the teacher, with its batch norms in place.
      student: a network that begins at its weights, or the path of one with its graph; or the name
        of an architecture (`dfq.load`), whose weights are drawn.
      images: to calibrate and to judge with, which the student is not shown; None to make them.
      train: steps of the student; 80,000 as published.
      batch: images of a step, likewise 256.
      watch: told what is being done.
      state_folder: keeps state here and resumes from it.
      **settings: of `quantize`.

    Returns:
      What `quantize` does, of the student; losses are those against `model`.

    Raises:
      UsageError: for a bad argument; a student of other inputs or another number of classes; a
        teacher that is no classifier of images.
      PlanError, BudgetError: for bits that the student cannot have.
      UnsupportedModelError: for an unknown architecture, and a teacher without statistics.
      DivergedError: if training diverged at every rate.
    """
    method = distillation_for(train, batch)
    check_suits(method, model)
    check_synthesis(model, settings, given=images is not None)
    asked, follow = resolved(model, settings), following(watch, state_folder)
    pupil = pupil_of(student, model, training_key(asked.seed))
    check_alike(pupil.model, model, method)
    check_bits(pupil.model, resolved(pupil.model, settings))
    making, of_images = making_for(model, asked), without_budget(asked)
    looked_at, follow = seen_for(model, images, making, of_images, follow)
    made, report = taught(pupil, model, looked_at.images, method, asked, follow)
    begun = "drawn weights" if pupil.random else "its weights"
    shown = f"{method.steps} steps of {method.batch} images, from {begun}"
    told = {"distilled": f"{pupil.name}, {shown}{'' if report.kept else ', not kept'}"}
    result = quantized_on(made, looked_at, resolved(made, settings), follow, original=model)
    return with_origin(result, model, told, (*report.notes, told_of_distillation(report)), follow)


def without_budget(asked: Asked) -> Asked:
    """The same for a teacher that makes images: a budget is the student's."""
    return dataclasses.replace(asked, pipeline=dataclasses.replace(asked.pipeline, budget=None))


def distillation_for(train: int | None, batch: int | None) -> Training:
    """DFKD with the steps and the batch that were asked for.

    Raises:
      UsageError: for one below 1.
    """
    said = {"steps": train, "batch": batch}
    for name, value in (("train", train), ("batch", batch)):
        check_positive(name, value)
    told = {name: value for name, value in said.items() if value is not None}
    if train is not None:  # the generator alone for no more rounds than with the student
        told["warmup"] = min(400, -(-train // 10))
    return dfkd(**told)


def pupil_of(student: Model | str | Path, teacher: Model, key: jax.Array) -> Pupil:
    """The student, reading images as its teacher does."""
    if isinstance(student, Model):
        found = Pupil(student, "a network", False)
    elif str(student) in names():
        made = untrained(str(student), teacher.contract, classes_of(teacher))
        drawn = initialised(made, jax.random.fold_in(key, 1))
        found = Pupil(drawn, str(student), True)
    else:
        loaded = load(student)
        found = Pupil(loaded.model, loaded.source, False)
    return found._replace(model=reading_alike(found.model, teacher))


def reading_alike(student: Model, teacher: Model) -> Model:
    """A student whose images are normalised as its teacher's, where shapes are the same."""
    same = [i.shape for i in student.inputs] == [i.shape for i in teacher.inputs]
    return dataclasses.replace(student, inputs=teacher.inputs) if same else student


def taught(
    pupil: Pupil, teacher: Model, images: Examples, method: Training, asked: Asked, follow: Follow
) -> tuple[Model, TrainingReport]:
    """The student after all steps, and how that went."""
    seen, held_out = split_probes(images)
    follow = with_foresight(teacher, method.steps * method.batch, follow)
    follow.begins("training")
    steps = f"{method.steps} steps of {method.batch} images"
    follow.watch.says(f"teaching {pupil.name} without data: {steps}")
    kept = {"place": follow.place, "watch": follow.watch}
    setup = TrainingSetup(seen.images, held_out.images, training_key(asked.seed), **kept)
    return distilled(pupil.model, teacher, method, setup)


def told_of_distillation(report: TrainingReport) -> str:
    """How it went, in a sentence."""
    gap = f"on held-out images outputs went from {report.before:.4g} to {report.after:.4g} apart"
    if report.kept:
        return f"the student was taught {report.steps} steps: {gap}"
    return f"the student stays as it began, since {report.steps} steps made it worse ({gap})"
