"""`dfq.train`: what was asked for, checked before any work (`training_job` carries it out)."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict, Unpack

from dfq_jax.api.given import GivenImages, image_set
from dfq_jax.api.request import Asked, following
from dfq_jax.api.result import Result
from dfq_jax.api.start import begun_in
from dfq_jax.api.synthesize import check_seed
from dfq_jax.api.training_job import TrainingJob, carried_out
from dfq_jax.base.parallel import HERE, Machine
from dfq_jax.base.words import DEFAULT_STORE, LayerPreset, Store
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.graph.tasks import Task, said_task
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.plan import Plan, Rule, resolve
from dfq_jax.quantization.vertical import check_nested
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.recipes.trainings import check_kernels, pipeline_of_start, scheme_for, training_for
from dfq_jax.training.method import Training, on_gradient_grid
from dfq_jax.training.on_machine import check_machine
from dfq_jax.training.suits import check_suits

LAYERS = "qdrop_8bit_ends"


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
    return Asked(
        how,
        preset=None,
        n=given.n,
        accuracy=given.accuracy,
        probes=given.probes,
        task=given.purpose,
        seed=given.seed,
        memory=given.memory,
    )


def in_store(begun: Quantized, store: Store | None) -> Quantized:
    """A start with its kernels in another form in the file, if one was asked for."""
    if store is None:
        return begun
    plan = dataclasses.replace(begun.quantized.plan, store=store)
    return begun._replace(quantized=dataclasses.replace(begun.quantized, plan=plan))
