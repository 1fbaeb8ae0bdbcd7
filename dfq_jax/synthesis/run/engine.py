"""Runs a recipe: batches of images, one compiled program, the one `fit` loop."""

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from dfq_jax.base.parallel import HERE, Machine, at_home, data_mesh, no_mesh
from dfq_jax.base.words import Precision
from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import classes_of, output_shapes
from dfq_jax.optim.fit import Metrics
from dfq_jax.optim.progress import SILENT, Progress, Watcher
from dfq_jax.optim.state import NOWHERE, Place
from dfq_jax.synthesis.recipe import Memory, Recipe, batch_size, nothing
from dfq_jax.synthesis.run.limits import refuse_hopeless
from dfq_jax.synthesis.run.memory import in_units, needed, parts_within
from dfq_jax.synthesis.run.objectives import job_for, rendered
from dfq_jax.synthesis.run.pending import (
    Run,
    TellBatch,
    consecutive,
    in_folder,
    in_memory,
    make_missing,
    notes_on,
    taken,
)
from dfq_jax.synthesis.run.work import BatchWork, SynthesisWork
from dfq_jax.synthesis.sources.pixels import Images
from dfq_jax.synthesis.terms.targets import Forward, Unusable, batch_norm_targets
from dfq_jax.types import InputContract
from dfq_jax.values import bound, described


class Synthesized(NamedTuple):
    """Images with what a report should say about their making.

    Attributes:
      images: normalised.
      losses: final loss of each batch; none where nothing was optimised.
      excluded: batch norms left out.
      notes: what was done differently than the recipe says, in sentences.
    """

    images: Float[Array, "n h w c"]
    losses: tuple[float, ...]
    excluded: tuple[Unusable, ...]
    notes: tuple[str, ...] = ()


def synthesize_images(
    model: Model,
    recipe: Recipe,
    n: int,
    key: Key[Array, ""],
    *,
    chunk: int = 10,
    machine: Machine = HERE,
    watch: Watcher = SILENT,
    place: Place = NOWHERE,
) -> Synthesized:
    """Synthesizes `n` images in the network's normalised input space.

    Args:
      model: network with its batch norms in place.
      recipe: the method.
      n: how many images.
      key: batch i uses `fold_in(key, i)`; equal keys give equal images.
      chunk: most steps between two progress reports.
      machine: devices, precision, and what to do about memory.
      watch: told how much memory a step will take, before it is compiled, and of every chunk.
      place: where to keep state; a run that finds its own state there resumes.

    Returns:
      Images, the final loss of each batch, and the batch norms left out.

    Raises:
      DivergedError: if a batch diverges four times, each at half the learning rate of the last.
      UsageError: if `place` belongs to a run with other facts or is being written by another
        process, there are not so many devices, the method cannot make images of this size, a
        function of its has no name (`values.bound`) and state is to be kept, or several processes
        are named: they fill a folder (`run.processes`).
      UnsupportedModelError: if the method needs batch-norm statistics and there are none.
      ResourceError: if memory does not suffice even for one image at a time.
    """
    if machine.process is not None or machine.processes is not None:
        raise UsageError("several processes fill a folder: use `synthesize_set`.")
    with no_mesh(), contextlib.ExitStack() as stack:
        model, key = at_home((model, key))
        work = measured(model, recipe, n)
        spread = spread_of(work, machine)
        stack.enter_context(place.owned())
        if not recipe.terms:
            one, keys = unfitted(model, recipe, work.size), keys_of(key, work.batches)
            return Synthesized(jnp.concatenate([one(k) for k in keys])[:n], (), ())
        if place.folder is not None:
            place = place.knowing({"recipe": described(recipe, "recipe")})
            place.store()  # refuses the batches of another run
        run = ready(model, key, work, spread, forward_on(machine), watch)
        tell = partial(report, watch, recipe.steps * run.job.turns)
        images, losses, told = make_all(run, n, tell, chunk, place)
    return Synthesized(images, losses, work.excluded, work.notes + spread.notes + told)


def make_all(
    run: Run, n: int, tell: TellBatch, chunk: int, place: Place
) -> tuple[Images, tuple[float, ...], tuple[str, ...]]:
    """The first `n` images of all optimisations, the loss of each, and notes on them."""
    shelf = in_memory()
    if place.folder is not None:
        shelf = in_folder(place.folder, run.job.together_shape, run.memory)
    make_missing(run, range(run.total), shelf, tell, chunk, place)
    made = [taken(shelf, index) for index in range(run.total)]
    notes = sum((notes_on(run.job, index, m) for index, m in enumerate(made)), ())
    return jnp.concatenate([m.images for m in made])[:n], tuple(m.loss for m in made), notes


def measured(model: Model, recipe: Recipe, n: int) -> SynthesisWork:
    """How many batches of how many images a request comes to.

    Raises:
      ValueError: if n < 1.
      UsageError: if the method cannot make images of this size.
      UnsupportedModelError: if the network lacks the statistics the method needs.
      ResourceError: if the machine cannot hold a batch.
    """
    if n < 1:
        raise ValueError(f"synthesize_images() needs n >= 1, got {n}.")
    if reason := recipe.source.refusal((1, *model.contract.shape)):
        raise UsageError(f"{recipe.name}: {reason}")
    targets, excluded = {}, ()
    if recipe.terms and recipe.statistics:
        targets, excluded = batch_norm_targets(model)
    fitted, notes = suited(recipe, model)
    size = batch_size(fitted, n, len(targets))
    batches = -(-n // size)
    refuse_hopeless(fitted, (size, *model.contract.shape), batches if fitted.turns else 1)
    return SynthesisWork(fitted, targets, size, batches, excluded, notes)


def forward_on(machine: Machine) -> Forward:
    """How a machine computes a forward pass."""
    return Forward(cast(Precision, machine.dtype), machine.parts, machine.remat, machine.memory)


class Spread(NamedTuple):
    """Who makes the batches.

    Attributes:
      apart: the devices that make one each, at the same time.
      together: the devices that share each.
      notes: why they are fewer than asked for.
    """

    apart: Mesh | None = None
    together: Mesh | None = None
    notes: tuple[str, ...] = ()


def spread_of(work: SynthesisWork, machine: Machine, processes: int = 1) -> Spread:
    """As many devices as there is work for.

    Raises:
      UsageError: if there are not so many.
    """
    devices = machine.devices
    data_mesh(devices)  # refuses more than there are
    recipe, used, why = work.recipe, 1, ""
    if not recipe.terms or devices == 1:
        return Spread()
    if recipe.turns:
        why = "its batches take turns in one optimisation"
    elif machine.together:
        used = max(d for d in range(1, devices + 1) if work.size % d == 0)
        why = f"a batch of {work.size} images does not divide evenly among more"
    elif consecutive(recipe):
        why = "each batch goes on from what the one before remembered"
    else:
        used = min(devices, -(-work.batches // processes))
        why = f"there are {work.batches} batches of {work.size} images"
    notes = (f"{recipe.name} used {used} of {devices} devices: {why}",) if used < devices else ()
    mesh = data_mesh(used) if used > 1 else None
    return Spread(None, mesh, notes) if machine.together else Spread(mesh, None, notes)


def ready(
    model: Model,
    key: Key[Array, ""],
    work: SynthesisWork,
    spread: Spread,
    how: Forward,
    watch: Watcher = SILENT,
) -> Run:
    """Prepares what all batches share."""
    once = work.at_a_time
    recipe, targets, turns = once.recipe, once.targets, once.turns
    if how.memory is not None or watch.stage is not None:
        how = foretold(model, once, spread, how, watch)
    job = job_for(model, once, how, spread.together)
    shared = recipe.prepare(model, targets, jax.random.fold_in(key, 2**31 - 1))
    memory = recipe.memory.start(targets, turns, job.classes, watched(recipe, model))
    return Run(job, shared, memory, key, work.batches // turns, spread.apart)


def foretold(
    model: Model, work: BatchWork, spread: Spread, how: Forward, watch: Watcher
) -> Forward:
    """In as many parts as it takes to stay within the memory allowed; tells what a step will take.

    Raises:
      ResourceError: if one image at a time is too much.
    """
    platform = jax.default_backend()
    rows = work.size // (1 if spread.together is None else spread.together.size)
    devices = (spread.together or spread.apart or data_mesh(1)).size
    sharers = devices if platform == "cpu" else 1  # the devices of a CPU have one memory
    need = needed(model, work._replace(size=rows), how, platform)
    parts = how.parts
    if how.memory is not None:
        parts = parts_within(need, rows, how.memory // sharers, parts)
    each = " on each device" if devices > sharers else ""
    split = f" in {parts} parts" if parts > 1 else ""
    size = in_units(sharers * need.total(parts))
    watch.says(f"a step takes about {size}{each}, batches of {work.size}{split}")
    return dataclasses.replace(how, parts=parts)


def keys_of(key: Key[Array, ""], batches: int) -> list[Key[Array, ""]]:
    """The key of every batch."""
    return [jax.random.fold_in(key, index) for index in range(batches)]


def unfitted(
    model: Model, recipe: Recipe, size: int
) -> Callable[[Key[Array, ""]], Float[Array, "b h w c"]]:
    """The initial images of a recipe without an objective, batch by batch as ever."""
    return jax.jit(bound(initial, recipe, size, model.contract))


def initial(recipe: Recipe, size: int, contract: InputContract, key: Key[Array, ""]) -> Images:
    """The images that the initial variables of a batch stand for, normalised."""
    return rendered(recipe, contract, recipe.source.init(key, (size, *contract.shape)))


def suited(recipe: Recipe, model: Model) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe less the terms that need classes, where a network does not tell classes apart."""
    without = [t.name for t in recipe.terms if t.classes]
    if not without or classes_of(model) > 1:
        return recipe, ()
    shapes = output_shapes(model)
    outputs = ", ".join("x".join(map(str, shapes[o][1:])) for o in model.graph.outputs)
    note = f"no class labels: the network's output is {outputs}; without {', '.join(without)}"
    terms = tuple(t for t in recipe.terms if not t.classes)
    return recipe._replace(terms=terms, condition=nothing, memory=Memory()), (note,)


def watched(recipe: Recipe, model: Model) -> dict[str, int]:
    """{name of a watched tensor: width of its last axis}."""
    shapes, readers = output_shapes(model), {n.name: n for n in model.graph.nodes}
    shapes |= dict.fromkeys(model.graph.inputs, (1, *model.contract.shape))
    nodes = recipe.watch(model.graph)
    return {name: shapes[readers[node].inputs[0]][-1] for name, node in nodes.items()}


def report(watch: Watcher, steps: int, batch: int, batches: int, step: int, parts: Metrics) -> None:
    """Passes the state of a run on to whoever shows it."""
    watch.advances(Progress(batch, batches, step, steps, parts))
