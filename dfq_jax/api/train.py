"""`dfq.train`: images, a start, training, and the verdict, in this order."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

from dfq_jax.api.delivered import deliverable
from dfq_jax.api.given import GivenImages, image_set
from dfq_jax.api.grids import calibrated
from dfq_jax.api.quantize import learned, made_images, resolved_settings
from dfq_jax.api.request import Asked, Follow, following, training_key
from dfq_jax.api.result import Result
from dfq_jax.api.start import begun_in
from dfq_jax.api.synthesize import check_seed
from dfq_jax.api.verdict import expected, judged, judges_of, qualified, with_costs
from dfq_jax.base.parallel import HERE, Machine
from dfq_jax.base.words import DEFAULT_STORE, LayerPreset, Store
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.graph.tasks import Task, said_task
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.plan import Plan, Rule, resolve
from dfq_jax.quantization.shared_grids import shared_grids
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.vertical import VerticalNetwork, check_nested
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
from dfq_jax.recipes.trainings import check_kernels, pipeline_of_start, scheme_for, training_for
from dfq_jax.report.analyze import analyze
from dfq_jax.report.trust import judges_classes
from dfq_jax.training.engine import TrainingReport, trained
from dfq_jax.training.method import GeneratedImages, Training, begun_on_levels, on_gradient_grid
from dfq_jax.training.on_machine import check_machine
from dfq_jax.training.suits import check_images, check_suits
from dfq_jax.training.vertical import trained_vertically

LAYERS = "qdrop_8bit_ends"
HELD_OUT, MOST_HELD_OUT = 4, 256
"""One image in so many judges, and no more than that."""
STARTED_FROM = 192
"""Images that a start is learned from: a preset's."""


class TrainSettings(TypedDict, total=False):
    """What `train` can be told, by name; `train` says what each means."""

    start: str | Path | None
    scheme: str | None
    layers: LayerPreset | None
    rules: Iterable[Rule]
    steps: int | None
    batch: int | None
    gradient_bits: int | None
    n: int | None
    task: Task | str | None
    accuracy: float | None
    probes: Examples | None
    store: Store | None
    seed: int
    memory: int | None
    machine: Machine


def train(
    model: Model,
    images: GivenImages | None = None,
    method: str | Training = "best",
    *,
    watch: Watcher = SILENT,
    state_folder: str | Path | None = None,
    **settings: Unpack[TrainSettings],
) -> Result:
    """Trains a quantized network without data: a student learns from the float network.

    Args:
      model: network with its batch norms in place.
      images: to learn from, a quarter held out (see `given.image_set`); None to make them.
      method: a `Training`, e.g. of `dfq.methods`, or its name (`recipes.trainings.TRAININGS`).
      watch: told what is being done and how it advances.
      state_folder: keeps state here and resumes from it.
      **settings: any of
        start: output folder of `quantize` or `train` to begin from, instead of where the method
          begins. Scales that a method finds anew stay as they are there, and batch norms folded;
          the report says so.
        scheme: `w{1..8}a{2..8}`; by default that of the start, or the method's: w4a4 of most, w1a8
          of binary kernels, w6a6 of `quantface`, w8a8 of `vertical_layered`.
        layers: which layers stay at 8 bits; likewise, or qdrop_8bit_ends.
        rules: bits of particular layers; those of a start stay.
        steps: of the student, instead of the method's.
        gradient_bits: 2..8, of the gradients that layers multiply; float unless given.
        batch, n: images of a step, and how many are made, likewise.
        task: what the network is for, instead of what its graph says.
        accuracy: top-1 of the float network in (0, 1], if known: narrows its expected loss.
        probes: of `recipes.probes.probes_of`, if they are made; tell the expected loss.
        store: form of kernels below 8 bits in the file: `packed`, `int8` or ONNX's `int4`.
        seed: of everything random but the probes.
        memory: bytes that a step of synthesis or of the start may take.
        machine: its `devices` share every batch; layers of the student multiply in its `dtype`.

    Returns:
      As of `quantize`. Where training made the outputs worse on images that it had not seen, the
      start, and the report says so.

    Raises:
      UsageError: for a bad argument; a start of another network or plan; what a method needs and
        there is not: classes, kernels of 1 bit, real images, as many images as a batch takes.
      UnsupportedModelError: if the network has not what a method looks at.
      DivergedError: if training diverged at every rate.
    """
    given = Given(**settings)
    check_seed(given.seed)
    brought = None if images is None else image_set(images, model.input, watch.says)
    how = method_asked(method, model, brought, given)
    check_suits(how, model)
    check_machine(given.machine, how.batch)
    follow = following(watch, state_folder)
    begun = None
    if given.start is not None:
        asked = (given.scheme, given.layers, tuple(given.rules))
        begun = in_store(begun_in(Path(given.start), model, *asked), given.store)
    asked = asked_of(model, how, scheme_for(method), given)
    check_plan(how, model, asked, begun)
    return carried_out(TrainingJob(model, how, asked, follow, given.machine), brought, begun)


def check_plan(method: Training, model: Model, asked: Asked, begun: Quantized | None) -> None:
    """Refuses grids that a method cannot train, before images are made.

    Raises:
      UsageError: naming those that it can.
    """
    graph, how = fold_batch_norm(model).graph, asked.pipeline
    plan = (
        resolve(graph, how.scheme, how.layers, how.rules) if begun is None else begun.quantized.plan
    )
    check_kernels(method, bits_of(plan))
    if method.student.widths:
        check_nested(plan, graph)


def bits_of(plan: Plan) -> set[int]:
    """Bits of the kernels of a plan."""
    return {spec.levels.bits for site, spec in plan.entries if site.argument is None}


@dataclasses.dataclass(frozen=True)
class Given:
    """The settings of `train`, with what was left out."""

    start: str | Path | None = None
    scheme: str | None = None
    layers: LayerPreset | None = None
    rules: Iterable[Rule] = ()
    steps: int | None = None
    batch: int | None = None
    gradient_bits: int | None = None
    n: int | None = None
    task: Task | str | None = None
    accuracy: float | None = None
    probes: Examples | None = None
    store: Store | None = None
    seed: int = 0
    memory: int | None = None
    machine: Machine = HERE

    @property
    def purpose(self) -> Task | None:
        """What the network is for, if somebody said."""
        return said_task(self.task)


def method_asked(
    method: str | Training, model: Model, images: Examples | None, given: Given
) -> Training:
    """The method of training, suited to the network and to what it is for."""
    known = {"model": model, "images": images, "task": given.purpose}
    how = training_for(method, given.steps, given.batch, **known)
    return how if given.gradient_bits is None else on_gradient_grid(how, given.gradient_bits)


def asked_of(model: Model, method: Training, scheme: str, given: Given) -> Asked:
    """What comes before and after training, as `quantize` has it."""
    names = {"scheme": given.scheme or scheme, "layers": given.layers or LAYERS}
    store = given.store or DEFAULT_STORE
    how = pipeline_of_start(method, model, **names, rules=tuple(given.rules), store=store)
    told = (given.n, None, given.accuracy, given.probes, given.purpose, given.seed, given.memory)
    return Asked(how, None, None, *told)


def in_store(begun: Quantized, store: Store | None) -> Quantized:
    """A start with its kernels in another form in the file, if one was asked for."""
    if store is None:
        return begun
    plan = dataclasses.replace(begun.quantized.plan, store=store)
    return begun._replace(quantized=dataclasses.replace(begun.quantized, plan=plan))


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
    shown = (made.quantized, made.reference, images.seen.array, images.held_out.array)
    key, told = training_key(job.asked.seed), job.follow
    kept = {"machine": job.machine, "place": told.place, "watch": told.watch}
    if job.method.student.widths:
        return trained_vertically(*shown, job.method, key, **kept)
    return trained(*shown, job.method, key, unfolded=job.model, **kept)


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
