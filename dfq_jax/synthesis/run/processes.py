"""One set of images from several processes: each makes its share, whoever is last finishes it."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from dfq_jax.base.files import owned
from dfq_jax.base.parallel import HERE, Machine, at_home, no_mesh
from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.optim.state import Place
from dfq_jax.synthesis.recipe import Recipe
from dfq_jax.synthesis.run.attempts import Made
from dfq_jax.synthesis.run.engine import (
    forward_on,
    measured,
    ready,
    report,
    spread_of,
    unfitted,
)
from dfq_jax.synthesis.run.pending import (
    Run,
    Shelf,
    consecutive,
    in_folder,
    make_missing,
)
from dfq_jax.synthesis.run.shards import ShardSet, begin_set, finish_set, is_whole, write_shard
from dfq_jax.synthesis.run.work import SynthesisWork
from dfq_jax.synthesis.terms.targets import Unusable
from dfq_jax.values import described


class ProcessShare(NamedTuple):
    """What one process contributed to a set of images.

    Attributes:
      complete: whether the set is finished, by this process or another.
      excluded: batch norms left out.
      notes: what was done differently than the recipe says, in sentences.
    """

    complete: bool
    excluded: tuple[Unusable, ...]
    notes: tuple[str, ...] = ()


def synthesize_shards(
    model: Model,
    recipe: Recipe,
    n: int,
    key: Key[Array, ""],
    folder: str | Path,
    provenance: Mapping[str, Any],
    *,
    chunk: int = 10,
    machine: Machine = HERE,
    watch: Watcher = SILENT,
) -> ProcessShare:
    """Makes the share of this process in a set of images, and finishes the set if it can.

    Processes have nothing but the folder in common, and its bytes depend neither on how many there
    are nor on how often they were interrupted. State is kept in `.{name}.run` beside it.

    Args:
      model: network, see `synthesize_images` for what is not said here.
      recipe: the method.
      n: how many images in all.
      key: batch i uses `fold_in(key, i)`.
      folder: of the set.
      provenance: what the images depend on: plain data, without times.
      chunk: most steps between two progress reports.
      machine: devices of each process, which process this is, precision and memory.
      watch: told how much memory a step will take, and of every chunk.

    Raises:
      DfqError: as `synthesize_images`, and if the folder holds other images.
    """
    (process, processes), folder = which(machine), Path(folder).resolve()
    state = folder.with_name(f".{folder.name}.run")
    with no_mesh(), owned(state, f"process-{process}"):
        model, key = at_home((model, key))
        work = measured(model, recipe, n)
        spread = spread_of(work, machine, processes)
        made = described(recipe, "recipe")
        shards = ShardSet(folder, n, work.size, model.contract, provenance, made)
        complete, told = begin_set(shards, state), ()
        if recipe.terms and not complete:
            run = ready(model, key, work, spread, forward_on(machine), watch)
            told = make_share(run, shards, state, watch, chunk, (process, processes))
        elif not complete:
            make_noise(model, recipe, key, shards, process, processes)
        complete = complete or finish_set(shards)
    notes = work.notes + spread.notes + idle(work, processes) + told
    return ProcessShare(complete, work.excluded, notes)


def which(machine: Machine) -> tuple[int, int]:
    """Which process this is, of how many; by default as `jax.distributed` says.

    Raises:
      UsageError: if there is none of this index.
    """
    process, processes = machine.process, machine.processes
    process = jax.process_index() if process is None else process
    processes = jax.process_count() if processes is None else processes
    if not 0 <= process < processes:
        raise UsageError(f"process {process} of {processes}: give 0..{processes - 1}.")
    return process, processes


def make_share(
    run: Run,
    shards: ShardSet,
    state: Path,
    watch: Watcher,
    chunk: int,
    seat: tuple[int, int],
) -> tuple[str, ...]:
    """Makes those shards that fall to this process and are not there yet; returns notes on them."""
    (process, processes), tell = seat, partial(report, watch, run.job.recipe.steps * run.job.turns)
    beside = None
    if consecutive(run.job.recipe):
        beside = in_folder(state, run.job.together_shape, run.memory)
    shelf = on_shards(shards, run.job.turns, process, beside)
    mine = share_of(run, process, processes)
    return make_missing(run, mine, shelf, tell, chunk, Place(state, shards.facts))


def make_noise(
    model: Model,
    recipe: Recipe,
    key: Key[Array, ""],
    shards: ShardSet,
    process: int,
    processes: int,
) -> None:
    """Makes every `processes`-th shard of a recipe without an objective."""
    shelf, image = on_shards(shards, 1, process), unfitted(model, recipe, shards.size)
    for index in range(process, shards.count, processes):
        if shelf.get(index) is None:
            images = image(jax.random.fold_in(key, index))
            shelf.put(index, Made(images, float("nan"), ()))


def idle(work: SynthesisWork, processes: int) -> tuple[str, ...]:
    """A note where all processes but one have nothing to do."""
    goes_on, turns = consecutive(work.recipe), work.recipe.turns
    if processes == 1 or not (goes_on or turns):
        return ()
    why = "its batches take turns" if turns else "each batch goes on from the one before"
    return (f"{work.recipe.name} used one of {processes} processes: {why}",)


def share_of(run: Run, process: int, processes: int) -> list[int]:
    """The optimisations of one process: every `processes`-th round, or all where they go on."""
    width = 1 if run.apart is None else run.apart.size
    if consecutive(run.job.recipe):
        return list(range(run.total)) if process == 0 else []
    return [i for i in range(run.total) if i // width % processes == process]


def on_shards(shards: ShardSet, turns: int, process: int, beside: Shelf | None = None) -> Shelf:
    """A shelf of shards.

    Args:
      shards: the set.
      turns: shards of an optimisation.
      process: which process this is.
      beside: keeps what a shard does not: what batches hand over.
    """
    parts = lambda index: range(index * turns, (index + 1) * turns)
    nothing = Made(jnp.zeros((0, *shards.contract.shape)), float("nan"), ())
    other = beside or Shelf(lambda index: nothing, lambda index, made: None)
    get = lambda i: other.get(i) if all(is_whole(shards, part) for part in parts(i)) else None

    def put(index: int, made: Made) -> None:
        other.put(index, made)
        for row, part in enumerate(parts(index)):
            write_shard(shards, part, made.images[row * shards.size :])

    return Shelf(get, put)
