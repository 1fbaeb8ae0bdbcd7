"""Runs a recipe: batches of images, one compiled program, the one `fit` loop."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from dfq_jax.errors import DivergedError
from dfq_jax.files import write_atomically
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import output_shapes
from dfq_jax.optim.fit import FitResult, Metrics, Objective, fit
from dfq_jax.optim.state import StateStore
from dfq_jax.synthesis.pixels import clip_to_pixels, from_natural
from dfq_jax.synthesis.recipe import Recipe
from dfq_jax.synthesis.targets import Targets, Unusable, batch_norm_targets, observe
from dfq_jax.synthesis.terms import Observed, weighted
from dfq_jax.types import InputContract

RESTARTS = 3


class Job(NamedTuple):
    """The static side of a run; its functions serve all batches, so they compile once.

    `optimizers` holds one transform per attempt, each at half the learning rate of the last.
    """

    model: Model
    recipe: Recipe
    targets: Targets
    objective: Objective
    optimizers: tuple[optax.GradientTransformation, ...]
    size: int


class Context(NamedTuple):
    """The traced, not differentiated inputs of the objective."""

    model: Model
    targets: Targets
    shared: PyTree
    labels: PyTree


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
    chunk: int = 25,
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
      on_progress: called on the host after every chunk.
      state_folder: where to keep state; a run that finds its own state there resumes.
      fingerprint: what the state depends on; see `StateStore`.

    Returns:
      Images, the final loss of each batch, and the batch norms left out.

    Raises:
      ValueError: if n < 1.
      DivergedError: if a batch diverges four times, each at half the learning rate of the last.
      UsageError: if `state_folder` belongs to a run with another fingerprint.
      UnsupportedModelError: if the network has no usable batch-norm statistics.
    """
    if n < 1:
        raise ValueError(f"synthesize_images() needs n >= 1, got {n}.")
    if not recipe.terms:
        return Synthesized(unfitted_images(model, recipe, n, key), (), ())
    targets, excluded = batch_norm_targets(model)
    recipe, notes = suited(recipe, model)
    optimizers = tuple(recipe.optimizer(0.5**attempt) for attempt in range(RESTARTS + 1))
    size = batch_size(recipe, n, len(targets))
    job = Job(model, recipe, targets, build_objective(recipe), optimizers, size)
    if state_folder is not None:
        StateStore(state_folder, fingerprint or {})  # refuses the batches of another run
    shared = recipe.prepare(model, targets, jax.random.fold_in(key, 2**31 - 1))
    count = -(-n // job.size)
    images, losses = [], []
    for index in range(count):
        report = partial(report_batch, on_progress, index, count, recipe.steps)
        batch_key = jax.random.fold_in(key, index)
        name = None if state_folder is None else state_folder / f"batch_{index}"
        batch, loss = make_batch(job, shared, batch_key, chunk, report, name, fingerprint or {})
        images.append(batch)
        losses.append(loss)
    return Synthesized(jnp.concatenate(images)[:n], tuple(losses), excluded, notes)


def unfitted_images(
    model: Model, recipe: Recipe, n: int, key: Key[Array, ""]
) -> Float[Array, "n h w c"]:
    """The initial images of a recipe without an objective, batch by batch as ever."""
    size = min(recipe.batch, n)

    @jax.jit
    def one(key: Key[Array, ""]) -> Float[Array, "b h w c"]:
        x = recipe.init(key, (size, *model.contract.shape))
        return from_natural(render(recipe, x, model.contract), model.contract)

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
    return recipe._replace(terms=terms, condition=lambda *_: ()), (note,)


def classes_of(model: Model) -> int:
    """How many classes a network tells apart; 0 for one that is no classifier."""
    if len(model.graph.outputs) != 1:
        return 0
    shape = output_shapes(model)[model.graph.outputs[0]]
    return shape[1] if len(shape) == 2 and shape[1] > 1 else 0


def make_batch(
    job: Job,
    shared: PyTree,
    key: Key[Array, ""],
    chunk: int,
    report: Callable[[int, Metrics], None],
    name: Path | None,
    fingerprint: dict,
) -> tuple[Float[Array, "b h w c"], float]:
    """One batch and its final loss: read back if finished earlier, resumed if begun earlier."""
    if name is None:
        fitted = fit_batch(job, shared, key, chunk, report, None)
        return rendered(job, fitted.x), fitted.loss
    store = StateStore(name, fingerprint)
    done = name.with_suffix(".npz")
    if not done.exists():
        fitted = fit_batch(job, shared, key, chunk, report, store)
        save_batch(done, rendered(job, fitted.x), fitted.loss)
        store.clear()
    with np.load(done, allow_pickle=False) as saved:
        return jnp.asarray(saved["images"]), float(saved["loss"])


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


def save_batch(path: Path, images: Float[Array, "b h w c"], loss: float) -> None:
    """Keeps a finished batch, so that a resumed run need not make it again."""
    arrays = {"images": np.asarray(images), "loss": np.float32(loss)}
    write_atomically(path, lambda file: np.savez(file, **arrays))


def rendered(job: Job, x: PyTree) -> Float[Array, "b h w c"]:
    """Variables to network input."""
    return from_natural(render(job.recipe, x, job.model.contract), job.model.contract)


def render(recipe: Recipe, x: PyTree, contract: InputContract) -> Float[Array, "b h w c"]:
    """Variables to images in natural units, kept to possible pixels where the recipe says so."""
    natural = recipe.render(x)
    return clip_to_pixels(natural, contract) if recipe.bounded else natural


def batch_size(recipe: Recipe, n: int, layers: int) -> int:
    """Images per batch: no more than asked for, whole rounds of layers where the recipe says so."""
    if recipe.per_layer:
        return layers * max(1, round(min(recipe.batch, n) / layers))
    return min(recipe.batch, n)


def build_objective(recipe: Recipe) -> Objective:
    """The objective of a recipe as `fit` wants it; build it once per run."""

    def objective(x: PyTree, context: Context, key: Key[Array, ""]):
        natural = render(recipe, x, context.model.contract)
        images = from_natural(natural, context.model.contract)
        logits, stats = observe(context.model, context.targets, images)
        observed = Observed(
            images, natural, logits, stats, context.targets, context.shared, context.labels, key
        )
        return weighted(recipe.terms, observed)

    return objective


def fit_batch(
    job: Job,
    shared: PyTree,
    key: Key[Array, ""],
    chunk: int,
    on_chunk: Callable[[int, Metrics], None],
    store: StateStore | None,
) -> FitResult:
    """Optimises one batch, restarting at half the learning rate when it diverges."""
    init_key, label_key, step_key = jax.random.split(key, 3)
    model, recipe = job.model, job.recipe
    classes = output_shapes(model)[model.graph.outputs[0]][-1]
    context = Context(model, job.targets, shared, recipe.condition(label_key, job.size, classes))
    x = recipe.init(init_key, (job.size, *model.contract.shape))
    failed_at = 0
    for attempt, optimizer in enumerate(job.optimizers):
        result = fit(
            job.objective,
            x,
            context,
            optimizer=optimizer,
            steps=recipe.steps,
            key=step_key,
            chunk=chunk,
            on_chunk=on_chunk,
            store=store if attempt == 0 else None,
        )
        if result.status != "diverged":
            return result
        failed_at = result.steps
    raise DivergedError(
        f"{recipe.name}: the loss became NaN or infinite at step {failed_at} in each of "
        f"{RESTARTS + 1} attempts, the last at 1/{2**RESTARTS} of the learning rate. "
        "Check the weights with `dfq inspect`, or use fewer --steps."
    )
