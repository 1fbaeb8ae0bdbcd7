"""Runs a recipe: batches of images, one compiled program, the one `fit` loop."""

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from dfq_jax.errors import UsageError
from dfq_jax.files import write_atomically
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import classes_of, output_shapes
from dfq_jax.optim.fit import Metrics
from dfq_jax.optim.state import StateStore
from dfq_jax.synthesis.batches import Made, finished, job_for, make
from dfq_jax.synthesis.pixels import from_natural
from dfq_jax.synthesis.recipe import Memory, Recipe
from dfq_jax.synthesis.targets import PLAIN, Forward, Unusable, batch_norm_targets


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run is, for whoever shows it.

    Attributes:
      batch: index of the batch, from 0.
      batches: number of batches.
      step: steps done in this batch.
      steps: steps of a batch.
      parts: last values of the loss and its parts.
    """

    batch: int
    batches: int
    step: int
    steps: int
    parts: Metrics


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
    how: Forward = PLAIN,
    on_progress: Callable[[Progress], None] | None = None,
    state_folder: Path | None = None,
    fingerprint: dict | None = None,
) -> Synthesized:
    """Synthesizes `n` images in the network's normalised input space.

    Args:
      model: network with its batch norms in place.
      recipe: the method.
      n: how many images.
      key: batch i uses `fold_in(key, i)`; equal keys give equal images.
      chunk: most steps between two progress reports.
      how: precision, and what to do about memory.
      on_progress: called on the host after every chunk.
      state_folder: where to keep state; a run that finds its own state there resumes.
      fingerprint: what the state depends on; see `StateStore`.

    Returns:
      Images, the final loss of each batch, and the batch norms left out.

    Raises:
      ValueError: if n < 1.
      DivergedError: if a batch diverges four times, each at half the learning rate of the last.
      UsageError: if `state_folder` belongs to a run with another fingerprint, or the method cannot
        make images of this size.
      UnsupportedModelError: if the network has no usable batch-norm statistics.
    """
    if n < 1:
        raise ValueError(f"synthesize_images() needs n >= 1, got {n}.")
    if reason := recipe.source.refusal((1, *model.contract.shape)):
        raise UsageError(f"{recipe.name}: {reason}")
    if not recipe.terms:
        return Synthesized(unfitted_images(model, recipe, n, key), (), ())
    targets, excluded = batch_norm_targets(model)
    recipe, notes = suited(recipe, model)
    size = batch_size(recipe, n, len(targets))
    count = -(-n // size)
    job = job_for(model, recipe, targets, size, count if recipe.turns else 1, how)
    if state_folder is not None:
        StateStore(state_folder, fingerprint or {})  # refuses the batches of another run
    shared = recipe.prepare(model, targets, jax.random.fold_in(key, 2**31 - 1))
    memory = recipe.memory.start(targets, job.turns, job.classes, watched(recipe, model))
    images, losses = [], []
    for index in range(count // job.turns):
        report = partial(report_batch, on_progress, index, count // job.turns, recipe.steps)
        folder = None if state_folder is None else state_folder / f"batch_{index}"
        begin = partial(make, job, shared, memory, jax.random.fold_in(key, index), report)
        made = kept(begin, memory, folder, fingerprint or {}, chunk)
        images.append(made.images)
        losses.append(made.loss)
        memory = made.memory
    return Synthesized(jnp.concatenate(images)[:n], tuple(losses), excluded, notes)


def unfitted_images(
    model: Model, recipe: Recipe, n: int, key: Key[Array, ""]
) -> Float[Array, "n h w c"]:
    """The initial images of a recipe without an objective, batch by batch as ever."""
    size = min(recipe.batch, n)

    @jax.jit
    def one(key: Key[Array, ""]) -> Float[Array, "b h w c"]:
        x = recipe.source.init(key, (size, *model.contract.shape))
        return from_natural(finished(recipe, x, model), model.contract)

    keys = (jax.random.fold_in(key, index) for index in range(-(-n // size)))
    return jnp.concatenate([one(k) for k in keys])[:n]


def suited(recipe: Recipe, model: Model) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe less the terms that need classes, where a network does not tell classes apart."""
    without = [t.name for t in recipe.terms if t.classes]
    if not without or classes_of(model) > 1:
        return recipe, ()
    shapes = output_shapes(model)
    outputs = ", ".join("x".join(map(str, shapes[o][1:])) for o in model.graph.outputs)
    note = f"no class labels: the network's output is {outputs}; without {', '.join(without)}"
    terms = tuple(t for t in recipe.terms if not t.classes)
    return recipe._replace(terms=terms, condition=lambda *_: (), memory=Memory()), (note,)


def watched(recipe: Recipe, model: Model) -> dict[str, int]:
    """{name of a watched tensor: width of its last axis}."""
    shapes, readers = output_shapes(model), {n.name: n for n in model.graph.nodes}
    shapes |= dict.fromkeys(model.graph.inputs, (1, *model.contract.shape))
    nodes = recipe.watch(model.graph)
    return {name: shapes[readers[node].inputs[0]][-1] for name, node in nodes.items()}


def kept(
    begin: Callable[..., Made], memory: PyTree, folder: Path | None, fingerprint: dict, chunk: int
) -> Made:
    """A batch: read back if finished earlier, resumed if begun earlier.

    Args:
      begin: `make`, given all but where to keep its state and the chunk.
      memory: what the batch before handed over; of the same structure as what this one does.
      folder: where to keep state, or None.
      fingerprint: what it depends on.
      chunk: most steps between two visits of the host.

    Returns:
      The batch.
    """
    if folder is None:
        return begin(lambda stage: None, chunk)
    stores = lambda stage: StateStore(folder / f"stage_{stage}", fingerprint)
    done = folder.with_suffix(".npz")
    if not done.exists():
        save_batch(done, begin(stores, chunk))
        shutil.rmtree(folder, ignore_errors=True)
    with np.load(done, allow_pickle=False) as saved:
        leaves, structure = jax.tree.flatten(memory)
        read = [jnp.asarray(saved[f"memory_{i}"]) for i in range(len(leaves))]
        return Made(
            jnp.asarray(saved["images"]), float(saved["loss"]), jax.tree.unflatten(structure, read)
        )


def report_batch(
    on_progress: Callable[[Progress], None] | None,
    batch: int,
    batches: int,
    steps: int,
    step: int,
    parts: Metrics,
) -> None:
    """Passes the state of one batch on to whoever shows it."""
    if on_progress is not None:
        on_progress(Progress(batch, batches, step, steps, parts))


def save_batch(path: Path, made: Made) -> None:
    """Keeps a finished batch, so that a resumed run need not make it again."""
    arrays = {"images": np.asarray(made.images), "loss": np.float32(made.loss)}
    arrays |= {f"memory_{i}": np.asarray(v) for i, v in enumerate(jax.tree.leaves(made.memory))}
    write_atomically(path, lambda file: np.savez(file, **arrays))


def batch_size(recipe: Recipe, n: int, layers: int) -> int:
    """Images per batch: no more than asked for, whole rounds of layers where the recipe says so."""
    if recipe.per_layer:
        return layers * max(1, round(min(recipe.batch, n) / layers))
    return min(recipe.batch, n)
