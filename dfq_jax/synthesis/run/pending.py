"""A run: which batches are missing, who makes them, and where finished ones are kept."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from dfq_jax.errors import DataError
from dfq_jax.optim.fit import Metrics
from dfq_jax.optim.pieces import Piece, load_piece, save_piece
from dfq_jax.optim.state import NOWHERE, Place, StateStore
from dfq_jax.synthesis.recipe import Memory, Recipe
from dfq_jax.synthesis.run.attempts import BatchStart, Made, Visits, make, make_apart
from dfq_jax.synthesis.run.objectives import Job


class Run(NamedTuple):
    """A run that is ready to begin.

    Attributes:
      job: the static side.
      shared: what the recipe prepared.
      memory: before the first batch.
      key: batch i uses `fold_in(key, i)`.
      total: optimisations in all, each of `job.turns` batches.
      apart: the devices that make batches at the same time, one each; None for one at a time.
    """

    job: Job
    shared: PyTree
    memory: PyTree
    key: Key[Array, ""]
    total: int
    apart: Mesh | None


class Shelf(NamedTuple):
    """Where finished optimisations are kept.

    Attributes:
      get: one, or None if it is not there whole.
      put: keeps one.
    """

    get: Callable[[int], Made | None]
    put: Callable[[int, Made], None]


TellBatch = Callable[[int, int, int, Metrics], None]
"""Told (round, rounds, steps done in it, last metrics) after every chunk."""


def consecutive(recipe: Recipe) -> bool:
    """Whether a batch depends on the one before, by what the recipe remembers."""
    return recipe.memory.batch is not None or recipe.memory.step != Memory().step


def make_missing(
    run: Run,
    wanted: Sequence[int],
    shelf: Shelf,
    tell: TellBatch,
    chunk: int,
    place: Place = NOWHERE,
) -> tuple[str, ...]:
    """Makes those of the wanted optimisations that are not on the shelf, and puts them there.

    Args:
      run: what they belong to.
      wanted: their indices, ascending; from 0 where they are consecutive.
      shelf: where finished ones are.
      tell: told of the progress.
      chunk: most steps between two visits of the host.
      place: where to keep the state of unfinished ones.

    Returns:
      Notes on those made here, in sentences.
    """
    missing = [index for index in wanted if shelf.get(index) is None]
    width = 1 if run.apart is None else run.apart.size
    rounds = [missing[i : i + width] for i in range(0, len(missing), width)]
    before, notes = (len(wanted) - len(missing)) // width, ()
    for number, indices in enumerate(rounds, before):
        report = partial(tell, number, before + len(rounds))
        places = [place / f"batch_{i}" for i in indices]
        stores = [partial(store_of, each) for each in places]
        memory, visits = memory_before(run, indices[0], shelf), Visits(chunk, report)
        keys = [jax.random.fold_in(run.key, index) for index in indices]
        given = [BatchStart(run.shared, memory, key) for key in keys]
        if run.apart is None:
            finished = [make(run.job, given[0], visits, stores[0])]
        else:
            finished = make_apart(run.job, given, run.apart, visits, stores)
        for index, each, made in zip(indices, places, finished, strict=True):
            shelf.put(index, made)
            notes += notes_on(run.job, index, made)
            each.remove()
    return notes


def notes_on(job: Job, index: int, made: Made) -> tuple[str, ...]:
    """What to say of an optimisation, in sentences."""
    subject = f"batch {index}" if job.turns == 1 else f"the optimisation of {job.turns} batches"
    return tuple(f"{subject} {note}" for note in made.notes)


def memory_before(run: Run, index: int, shelf: Shelf) -> PyTree:
    """What an optimisation begins with: from the one before where they are consecutive."""
    if index == 0 or not consecutive(run.job.recipe):
        return run.memory
    return taken(shelf, index - 1).memory


def taken(shelf: Shelf, index: int) -> Made:
    """An optimisation that was made.

    Raises:
      DataError: if it is gone meanwhile.
    """
    made = shelf.get(index)
    if made is None:
        raise DataError(
            f"Batch {index} of this run is gone or damaged, though it was made; "
            "run the same command again, which makes it anew."
        )
    return made


def store_of(place: Place, stage: int, attempt: int) -> StateStore | None:
    """Where a batch keeps the state of a stage, if it does; every attempt has its own.

    Under `jax.distributed` it keeps none, since Orbax saves what all processes have in common, and
    batches have nothing: a process that is killed there begins its unfinished batch anew.
    """
    name = f"stage_{stage}" if attempt == 0 else f"stage_{stage}_again_{attempt}"
    return (place / name).store() if jax.process_count() == 1 else None


def in_memory() -> Shelf:
    """A shelf that lasts as long as the process."""
    finished: dict[int, Made] = {}
    return Shelf(finished.get, finished.__setitem__)


def in_folder(folder: Path, images: tuple[int, ...], memory: PyTree) -> Shelf:
    """A shelf of `batch_{i}.npz`, which a resumed run finds again.

    Args:
      folder: where they are.
      images: shape of the images of one.
      memory: what one hands over, or anything of the same structure and shapes.
    """
    like = (jax.ShapeDtypeStruct(images, jnp.float32), memory)
    path = lambda index: folder / f"batch_{index}.npz"
    return Shelf(lambda i: load_batch(path(i), like), lambda i, made: save_batch(path(i), made))


def save_batch(path: Path, made: Made) -> None:
    """Keeps a finished batch, so that a resumed run need not make it again."""
    save_piece(path, Piece((made.images, made.memory), (made.loss, made.notes)))


def load_batch(path: Path, like: tuple[Any, PyTree]) -> Made | None:
    """What `save_batch` wrote, or None; `like` says what images and memory are like."""
    found = load_piece(path, like)
    if found is None:
        return None
    (images, memory), (loss, notes) = found
    return Made(images, loss, memory, tuple(notes))
