"""Images by the name of a method: `dfq.synthesize` and `dfq.synthesize_set`."""

import dataclasses
import importlib.metadata
import time
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import jax
from jaxtyping import Array, Key

from dfq_jax.base.parallel import HERE, Machine, MachineFields
from dfq_jax.errors import UsageError
from dfq_jax.examples import Examples, evidence_in
from dfq_jax.graph.graph import Model
from dfq_jax.graph.tasks import Task
from dfq_jax.io.artifacts.artifact import weights_sha256
from dfq_jax.optim.compiling import compile_clock
from dfq_jax.optim.progress import SILENT, Progress, Watcher
from dfq_jax.optim.state import Place
from dfq_jax.recipes.presets import budget_of_method, choice_for
from dfq_jax.recipes.rows import ROW_METHODS, ROWS, makes_rows, rows_of
from dfq_jax.synthesis.recipe import Recipe
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.processes import synthesize_shards
from dfq_jax.types import in_words


def synthesize(
    model: Model,
    method: str | Recipe = "best",
    n: int | None = None,
    *,
    seed: int = 0,
    steps: int | None = None,
    batch: int | None = None,
    machine: Machine = HERE,
    watch: Watcher = SILENT,
    state_folder: str | Path | None = None,
    task: Task | None = None,
    **fields: Unpack[MachineFields],
) -> Examples:
    """Makes images from the network alone, or text if it is a language model.

    Args:
      model: network with its batch norms in place.
      method: a recipe, e.g. of `dfq.methods`, or its name, one of `recipes.presets.METHODS`, which
        suits itself to the network; `best` is ours. A network without usable batch-norm statistics
        gets noise, unless `gzsq`, which estimates them from the weights, or `psaq_vit` or `sardfq`,
        which need none, is asked for; the provenance notes it. Networks that read no images have
        `recipes.rows.ROW_METHODS`: text that they sample, or random rows.
      n: how many images; None for as many as are the method's own (`dfq.quantize` makes as many).
      seed: equal seeds give equal images on one kind of device.
      steps: of a batch; None for the method's own, as always where a recipe is given.
      batch: images optimised together; likewise.
      machine: devices, precision and memory.
      watch: told how much memory a step will take, how long compiling took, and how far it is.
      state_folder: keeps state here and resumes from it.
      task: what the network is for, instead of what its graph says.
      **fields: of `machine`, by name: devices, together, dtype, remat, memory.

    Returns:
      Images in the network's normalised input space, with provenance.

    Raises:
      DfqError: UsageError for bad arguments or a state folder of another run or in use;
        DivergedError; ResourceError; UnsupportedModelError where the method cannot use the network.
    """
    if makes_rows(model):
        return made_rows(model, method, n, seed, task)
    order = ordered(model, method, n, seed, steps, batch, dataclasses.replace(machine, **fields))
    start, folder = time.perf_counter(), None if state_folder is None else Path(state_folder)
    with compile_clock() as compiled:
        made = synthesize_images(
            *order.what,
            machine=order.machine,
            watch=announcing(watch, compiled),
            place=Place(folder, order.facts),
        )
    facts = {**order.facts, "final_losses": list(made.losses)}
    facts |= {"excluded": [str(u) for u in made.excluded], **durations(start, compiled)}
    if notes := [*order.notes, *made.notes]:
        facts["notes"] = notes
    return Examples((made.images,), model.inputs, facts, evidence_in(facts))


def made_rows(
    model: Model, method: str | Recipe, n: int | None, seed: int, task: Task | None
) -> Examples:
    """Rows of a network that reads no images.

    Raises:
      UsageError: for a recipe, which makes images, a bad name, number or seed.
    """
    if isinstance(method, Recipe):
        raise UsageError(
            f"recipe {method.name!r} makes images; this network reads {in_words(model.inputs)}: "
            f"say a name, one of {', '.join(ROW_METHODS)}."
        )
    n = ROWS["best"] if n is None else n
    check_count(n)
    check_seed(seed)
    start = time.perf_counter()
    with compile_clock() as compiled:
        made = rows_of(model, method, n, jax.random.key(seed), task)
        jax.block_until_ready(made.arrays)
    facts = run_facts(model, n, seed) | {"size": [list(x.shape) for x in model.inputs]}
    facts = {**facts, **made.provenance, **durations(start, compiled)}
    return dataclasses.replace(made, provenance=facts)


class Contribution(NamedTuple):
    """What one process did for a set of images.

    Attributes:
      complete: whether the set is finished, by this process or another.
      method: how its images are made.
      excluded: batch norms left out, in words.
      notes: what was done differently than asked for, in sentences.
      seconds: it took.
      compile_seconds: of them, spent compiling.
    """

    complete: bool
    method: str
    excluded: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    compile_seconds: float


def synthesize_set(
    model: Model,
    n: int | None,
    folder: str | Path,
    *,
    method: str | Recipe = "best",
    seed: int = 0,
    steps: int | None = None,
    batch: int | None = None,
    machine: Machine = HERE,
    watch: Watcher = SILENT,
    **fields: Unpack[MachineFields],
) -> Contribution:
    """Makes a set of images in a folder, or the part of one process in it; again, goes on with it.

    Args:
      model: as in `synthesize`, where more is said.
      n: how many images in all; None for as many as are the method's own.
      folder: of the set; its parent exists.
      method: as in `synthesize`.
      seed: as in `synthesize`.
      steps: of a batch.
      batch: images of a shard, optimised together.
      machine: devices of each process, precision and memory.
      watch: told of memory, compilation and steps.
      **fields: of `machine`, by name; also `process`, the index of this process, and `processes`,
        how many there are: by default as `jax.distributed` says.

    Returns:
      Whether the set is finished; `dfq_jax.synthesis.run.shards.ImageShards` reads it.

    Raises:
      DfqError: as `synthesize`; UsageError also if the folder holds other images.
    """
    order = ordered(model, method, n, seed, steps, batch, dataclasses.replace(machine, **fields))
    start = time.perf_counter()
    with compile_clock() as compiled:
        made = synthesize_shards(
            *order.what,
            folder,
            order.facts | ({"notes": list(order.notes)} if order.notes else {}),
            machine=order.machine,
            watch=announcing(watch, compiled),
        )
    told = tuple(map(str, made.excluded)), (*order.notes, *made.notes)
    return Contribution(made.complete, order.what[1].name, *told, **durations(start, compiled))


class ImageOrder(NamedTuple):
    """What is to be made.

    Attributes:
      what: model, recipe, number of images, key.
      machine: where they are made.
      facts: what the images depend on.
      notes: what is different from what was asked for, in sentences.
    """

    what: tuple[Model, Recipe, int, Key[Array, ""]]
    machine: Machine
    facts: dict[str, Any]
    notes: tuple[str, ...]


def ordered(
    model: Model,
    method: str | Recipe,
    n: int | None,
    seed: int,
    steps: int | None,
    batch: int | None,
    machine: Machine,
) -> ImageOrder:
    """Checks what was asked for, and says what the images depend on.

    Raises:
      UsageError: for a bad name, number or seed.
    """
    choice = choice_for(model, method, steps, batch)
    n = budget_of_method(method, model).n if n is None else n
    check_count(n)
    check_seed(seed)
    sharers = machine.devices if machine.together else 1
    facts = provenance(model, choice.recipe, n, seed)
    facts |= {"dtype": machine.dtype, "together": sharers}
    what = (choice.model, choice.recipe, n, jax.random.key(seed))
    return ImageOrder(what, machine, facts, choice.notes)


def check_count(n: int) -> None:
    """Raises UsageError unless something is to be made."""
    if n < 1:
        raise UsageError(f"synthesize() needs n >= 1, got {n}.")


def check_seed(seed: int) -> None:
    """Refuses seeds that would not fit, and so repeat those of others.

    Raises:
      UsageError: unless it is a whole number of 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise UsageError(f"a seed must be 0..{2**32 - 1}, got {seed}.")


def provenance(model: Model, recipe: Recipe, n: int, seed: int) -> dict[str, Any]:
    """What images depend on; a saved state is usable only if all of it is equal."""
    named = evidence_in({"method": recipe.name})
    return ({} if recipe.evidence == named else {"evidence": recipe.evidence}) | {
        "method": recipe.name,
        "settings": dict(recipe.settings),
        "steps": recipe.steps,
        "batch": recipe.batch,
        "size": list(model.contract.shape),
        "natural": [list(part) for part in model.contract.photographs],
        **run_facts(model, n, seed),
    }


def run_facts(model: Model, n: int, seed: int) -> dict[str, Any]:
    """What examples of any kind depend on."""
    return {
        "n": n,
        "seed": seed,
        "weights_sha256": weights_sha256(model),
        "versions": {name: importlib.metadata.version(name) for name in ("dfq-jax", "jax")},
        "device": jax.devices()[0].platform,
    }


def announcing(watch: Watcher, compiled: list[float]) -> Watcher:
    """The same watcher, first told how long the compiler took."""
    said: list[str] = []

    def listen(at: Progress) -> None:
        if not said:
            said.append(f"compiled in {sum(compiled):.1f} s")
            watch.says(said[0])
        watch.advances(at)

    return dataclasses.replace(watch, progress=listen)


def durations(start: float, compiled: list[float]) -> dict[str, float]:
    """Seconds since the start, and those of them spent compiling."""
    seconds = round(time.perf_counter() - start, 2)
    return {"seconds": seconds, "compile_seconds": round(sum(compiled), 2)}
