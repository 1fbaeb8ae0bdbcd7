"""What `dfq.train` carries out: images, a start, training, and the verdict, in this order."""

import dataclasses
from typing import Any, NamedTuple

from dfq_jax.api.delivered import deliverable
from dfq_jax.api.grids import calibrated
from dfq_jax.api.quantize import learned, made_images, resolved_settings
from dfq_jax.api.request import Asked, Follow, training_key
from dfq_jax.api.result import Result
from dfq_jax.api.verdict import expected, judged, judges_of, qualified, with_costs
from dfq_jax.base.parallel import HERE, Machine
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.quantization.shared_grids import shared_grids
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.vertical import VerticalNetwork
from dfq_jax.recipes.expense import manner
from dfq_jax.recipes.foresight import foreseen
from dfq_jax.recipes.presets import (
    ImageBudget,
    budget_of_method,
    image_budget,
    makes_noise,
    noise_budget,
    offer_of,
)
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.recipes.rows import ROWS, makes_rows, method_of
from dfq_jax.report.analyze import analyze
from dfq_jax.report.trust import judges_classes
from dfq_jax.training.engine import TrainingReport, TrainingSetup, trained
from dfq_jax.training.method import GeneratedImages, Training, begun_on_levels
from dfq_jax.training.suits import check_images
from dfq_jax.training.vertical import trained_vertically

HELD_OUT, MOST_HELD_OUT = 4, 256
"""One image in so many judges, and no more than that."""
STARTED_FROM = 192
"""Images that a start is learned from: a preset's."""


class ImagesApart(NamedTuple):
    """Images to learn from, and those that judge."""

    seen: Examples
    held_out: Examples


class TrainingJob(NamedTuple):
    """What is trained, by what, with all that comes before and after.

    Attributes:
      model: the float network with its batch norms.
      method: of training.
      asked: what comes before and after.
      follow: who is told, and where state lies.
      machine: where the student learns.
    """

    model: Model
    method: Training
    asked: Asked
    follow: Follow
    machine: Machine


def carried_out(job: TrainingJob, brought: Examples | None, begun: Quantized | None) -> Result:
    """The network as asked for."""
    model, method, asked = job.model, job.method, job.asked
    making = making_for(model, method, asked)
    if brought is None:
        check_images(method, kept_of(making.n))
    there = None if brought is None else len(brought)
    follow = with_foresight(job, making, there, learns=begun is None)
    job = job._replace(follow=follow)
    images = made_images(model, making, asked, follow) if brought is None else brought
    images = deliverable(images, model.input)
    seen, held_out = apart(images)
    check_images(method, len(seen))
    steps = f"{method.steps} steps of {method.batch} {method.examples}"
    follow.watch.says(f"training ({method.name}): {steps}")
    made, cut = (begun, ()) if begun else started(model, seen, asked, follow)
    follow.begins("training")
    learned_levels = begun is not None or method.start == "post_training"
    method, otherwise = begun_on_levels(method) if learned_levels else (method, ())
    job = job._replace(method=method)
    network, report = taught_by(job, made, ImagesApart(seen, held_out))
    vertical = network if isinstance(network, VerticalNetwork) else None
    network = network.top if isinstance(network, VerticalNetwork) else network
    made = made._replace(quantized=network, used_images=True)
    notes = (*otherwise, *report.notes, told_of(report, method.examples))
    for note in notes:
        follow.watch.says(note)
    result = verdict(job, made, images, held_out, (*cut, *notes))
    settings = {**result.settings, **settings_of_training(job, report, images, held_out)}
    if brought is None and making.steps:
        settings["synthesis"] = manner(model, making.method, making, "best")
    return dataclasses.replace(result, settings=settings, vertical=vertical)


def taught_by(
    job: TrainingJob, made: Quantized, images: ImagesApart
) -> tuple[QuantizedModel | VerticalNetwork, TrainingReport]:
    """The student, or all of them where a method teaches many widths; and how that went."""
    seen, judges, told = images.seen.array, images.held_out.array, job.follow
    key = training_key(job.asked.seed)
    setup = TrainingSetup(seen, judges, key, job.machine, told.place, told.watch)
    if job.method.student.widths:
        return trained_vertically(made.quantized, made.reference, job.method, setup)
    return trained(made.quantized, made.reference, job.method, setup, unfolded=job.model)


def with_foresight(
    job: TrainingJob, making: ImageBudget, there: int | None, *, learns: bool
) -> Follow:
    """Those who follow, with how long each part of the run is foreseen to take.

    Args:
      job: what is trained.
      making: how images are made, unless there are some.
      there: how many there are.
      learns: whether a start is learned, if the method begins at one.
    """
    model, method, asked, follow, _ = job
    if follow.watch.phase is None:
        return follow
    made, images = (making, making.n) if there is None else (None, there)
    methods = asked.pipeline.methods if learns else ()
    judges = asked.probes is None and judges_classes(model, asked.task)
    shown = method.rounds * lessons_of(method) * method.batch * (1 + len(method.wrappers))
    seconds = foreseen(model, made, images, methods=methods, judges=judges, shown=shown)
    return dataclasses.replace(follow, foreseen=seconds)


def lessons_of(method: Training) -> int:
    """Steps of the student in a round."""
    return method.images.lessons if isinstance(method.images, GeneratedImages) else 1


def making_for(model: Model, method: Training, asked: Asked) -> ImageBudget:
    """How many images are made, and how; noise for a network without statistics."""
    if makes_rows(model):
        chosen = method_of(model, "best", asked.task)
        return ImageBudget(chosen, asked.n or method.n or ROWS["best"], 0)
    found = image_budget("best", model.contract, learned=True)
    generated, ours = isinstance(method.images, GeneratedImages), offer_of(method.recipe).ours
    if generated and ours:
        found = image_budget("fast", model.contract, learned=False)
    elif makes_noise(model, method.recipe):
        found = noise_budget(found)
    elif ours:
        found = dataclasses.replace(found, method=method.recipe)
    else:
        found = budget_of_method(method.recipe, model)
    return dataclasses.replace(found, n=asked.n or method.n or found.n)


def apart(images: Examples) -> ImagesApart:
    """Images to learn from, and those that judge; fewer than 4 do both."""
    if len(images) < HELD_OUT:
        return ImagesApart(images, images)
    return ImagesApart(*images.split(len(images) - kept_of(len(images))))


def kept_of(count: int) -> int:
    """How many of so many images are learned from."""
    return count if count < HELD_OUT else count - min(count // HELD_OUT, MOST_HELD_OUT)


def started(
    model: Model, seen: Examples, asked: Asked, follow: Follow
) -> tuple[Quantized, tuple[str, ...]]:
    """Where the student begins, and which layers had to have smaller codes, in words."""
    few = seen.split(len(seen) - STARTED_FROM)[0] if len(seen) > STARTED_FROM else seen
    made, _, cut = calibrated(model, few, asked, follow)
    made, _ = learned(model, made, few, asked, follow)
    return made, cut


def told_of(report: TrainingReport, what: str) -> str:
    """How training went on images or rows, in a sentence."""
    moved = f"{100 * report.changed:.2g} % of the codes changed"
    gap = f"on held-out {what} outputs went from {report.before:.4g} to {report.after:.4g} apart"
    if report.kept:
        return f"trained {report.steps} steps ({report.method}): {gap}, {moved}"
    return f"the start is kept: training made it worse ({gap}, {moved})"


def verdict(
    job: TrainingJob,
    made: Quantized,
    images: Examples,
    probes: Examples,
    notes: tuple[str, ...],
) -> Result:
    """The network with its report."""
    model, asked, follow = job.model, job.asked, job.follow
    judges = judges_of(model, made, asked, follow)
    loss = expected(made, model, judges, asked.accuracy)
    found = analyze(made.reference, made.quantized, probes.array, task=asked.task)
    shared = shared_grids(made.quantized, probes.array)
    found = dataclasses.replace(found, shared_grids=shared, given=images.given)
    found = with_costs(judged(found, judges, loss), made, probes, asked, follow)
    report = qualified(found, images)
    report = dataclasses.replace(report, notes=(*report.notes, *notes))
    follow.begins("verifying")
    plan = made.quantized.plan
    settings = resolved_settings(asked, None)
    settings |= {"scheme": str(plan.scheme), "layers": plan.layers, "store": plan.store}
    return Result(made.quantized, model, images, probes, report, settings, None, judges.images)


def settings_of_training(
    job: TrainingJob, report: TrainingReport, images: Examples, held_out: Examples
) -> dict[str, Any]:
    """What was resolved, for reports."""
    method, precision = job.method, job.machine.dtype
    told = {"gradient bits": method.gradient_bits}
    told |= {} if precision == HERE.dtype else {"dtype": precision}
    return {
        "preset": "trained",
        "training": method.name,
        "training steps": method.steps,
        "batch": method.batch,
        "codes changed": report.changed if report.kept else 0.0,
        "gap before": report.before,
        "gap after": report.after if report.kept else report.before,
        "images": f"{len(images)} ({images.provenance.get('method', 'given')})",
        "held out": len(held_out),
        **{name: value for name, value in told.items() if value is not None},
    }
