"""One optimisation, or several side by side: from initial variables to finished images."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree

from dfq_jax.errors import DivergedError
from dfq_jax.optim.fit import FitResult, Metrics, fit, fit_apart
from dfq_jax.optim.state import StateStore
from dfq_jax.optim.turns import own
from dfq_jax.parallel import at_home, everywhere, share_rows, stack
from dfq_jax.synthesis.batches import RESTARTS, Context, Job

OWN = Context._make((False, False, False, True))
"""Which parts of the context differ from batch to batch: the labels."""


class Underway(NamedTuple):
    """A batch on its way.

    Attributes:
      x: variables.
      memory: of the recipe.
      context: inputs of the objective.
      key: of its steps.
      loss: at the last step.
    """

    x: PyTree
    memory: PyTree
    context: Context
    key: Key[Array, ""]
    loss: float

    def after(self, fitted: FitResult) -> "Underway":
        """The same batch a stage later."""
        return self._replace(x=fitted.x, memory=fitted.memory, loss=fitted.loss)


def begin(job: Job, shared: PyTree, memory: PyTree, key: Key[Array, ""]) -> Underway:
    """A batch before its first step, where it is going to be made."""
    init_key, label_key, step_key = jax.random.split(key, 3)
    labels = job.recipe.condition(label_key, job.size, job.classes)
    x, context = start(job, init_key), Context(job.model, job.targets, shared, labels)
    if job.together is not None:
        fixed = everywhere(context._replace(labels=()), job.together)
        x, labels = share_rows((x, labels), job.size, job.together)
        context = fixed._replace(labels=labels)
    return Underway(x, memory, context, step_key, float("nan"))


def fit_stage(
    job: Job,
    index: int,
    batch: Underway,
    on_chunk: Callable[[int, Metrics], None],
    store: StateStore | None,
    chunk: int,
    failed: FitResult | None = None,
) -> FitResult:
    """Optimises one stage of one batch, restarting at half the learning rate when it diverges.

    Args:
      job: the static side.
      index: of the stage.
      batch: before it.
      on_chunk: told the steps done in this stage, and the last metrics.
      store: where the first attempt is kept.
      chunk: most steps between two visits of the host.
      failed: what became of the first attempt, if it has been made.

    Raises:
      DivergedError: after four attempts.
    """
    stage, failed_at = job.plans[index], 0 if failed is None else failed.steps
    for attempt in range(0 if failed is None else 1, RESTARTS + 1):
        result = fit(
            stage.objective,
            batch.x,
            batch.context,
            optimizer=stage.optimizers[attempt],
            steps=stage.steps,
            key=jax.random.fold_in(batch.key, index),
            memory=batch.memory,
            chunk=chunk,
            on_chunk=on_chunk,
            store=store if attempt == 0 else None,
        )
        if result.status != "diverged":
            return result
        failed_at = result.steps
    raise DivergedError(
        f"{job.recipe.name}: the loss became NaN or infinite at step {failed_at} in each of "
        f"{RESTARTS + 1} attempts, the last at 1/{2**RESTARTS} of the learning rate. "
        "Check the weights with `dfq inspect`, or use fewer --steps."
    )


def fit_stage_apart(
    job: Job,
    index: int,
    batches: Sequence[Underway],
    mesh: Mesh,
    on_chunk: Callable[[int, Metrics], None],
    stores: Sequence[StateStore | None],
    chunk: int,
    wanted: int,
) -> list[FitResult]:
    """Optimises one stage of several batches, one a device.

    A batch that diverges is made again alone, on one device; the others keep what they have, and
    those not wanted what they had.

    Raises:
      DivergedError: if one of those wanted diverges in four attempts.
    """
    stage, contexts = job.plans[index], [batch.context for batch in batches]
    context = everywhere(contexts[0]._replace(labels=()), mesh)
    results = fit_apart(
        stage.objective,
        [batch.x for batch in batches],
        context._replace(labels=stack([c.labels for c in contexts], mesh)),
        OWN,
        optimizer=stage.optimizers[0],
        steps=stage.steps,
        keys=[jax.random.fold_in(batch.key, index) for batch in batches],
        memory=[batch.memory for batch in batches],
        mesh=mesh,
        chunk=chunk,
        on_chunk=on_chunk,
        stores=stores,
    )
    again = partial(fit_stage, job, index, on_chunk=on_chunk, store=None, chunk=chunk)
    return [
        again(batches[i], failed=r) if r.status == "diverged" and i < wanted else r
        for i, r in enumerate(results)
    ]


class Made(NamedTuple):
    """A finished batch.

    Attributes:
      images: normalised.
      loss: at the last step.
      memory: for the next batch.
    """

    images: Float[Array, "b h w c"]
    loss: float
    memory: PyTree


Stores = Callable[[int], StateStore | None]
"""Stage -> where the state of a batch is kept."""


def make(
    job: Job,
    shared: PyTree,
    memory: PyTree,
    key: Key[Array, ""],
    on_chunk: Callable[[int, Metrics], None],
    stores: Stores,
    chunk: int,
) -> Made:
    """All stages of one optimisation.

    Args:
      job: the static side.
      shared: what the recipe prepared.
      memory: from the batch before.
      key: of this batch.
      on_chunk: told the steps done in all stages, and the last metrics.
      stores: stage -> where its state is kept.
      chunk: most steps between two visits of the host.

    Returns:
      Finished images.
    """
    batch, done = begin(job, shared, memory, key), 0
    for index, stage in enumerate(job.plans):
        report = lambda step, parts, done=done: on_chunk(done + step, parts)
        batch = batch.after(fit_stage(job, index, batch, report, stores(index), chunk))
        done += stage.steps
    return finish(job, batch)


def make_apart(
    job: Job,
    shared: PyTree,
    memory: PyTree,
    keys: Sequence[Key[Array, ""]],
    mesh: Mesh,
    on_chunk: Callable[[int, Metrics], None],
    stores: Sequence[Stores],
    chunk: int,
) -> list[Made]:
    """All stages of several optimisations at the same time, one a device.

    Args:
      job: the static side; of one turn.
      shared: what the recipe prepared.
      memory: before the first step of each.
      keys: of each; where there are fewer than devices, the last is made several times.
      mesh: the devices.
      on_chunk: told the steps done in all stages, and the last metrics averaged over the batches.
      stores: for each batch: stage -> where its state is kept.
      chunk: most steps between two visits of the host.

    Returns:
      What `make` would return for each key.
    """
    idle = mesh.size - len(keys)
    batches, done = [begin(job, shared, memory, key) for key in keys], 0
    batches += [batches[-1]] * idle
    for index, stage in enumerate(job.plans):
        report = lambda step, parts, done=done: on_chunk(done + step, parts)
        kept = [of(index) for of in stores]
        kept += [kept[-1]] * idle
        fitted = fit_stage_apart(job, index, batches, mesh, report, kept, chunk, len(keys))
        batches = [batch.after(result) for batch, result in zip(batches, fitted, strict=True)]
        done += stage.steps
    return [finish(job, batch) for batch in batches[: len(keys)]]


def start(job: Job, key: Key[Array, ""]) -> PyTree:
    """The initial variables, of all turns."""
    init = lambda key: job.recipe.source.init(key, job.shape)
    if job.turns == 1:
        return init(key)
    return jax.vmap(init)(jax.random.split(key, job.turns))


def finish(job: Job, batch: Underway) -> Made:
    """The images that variables stand for, and what to remember of them."""
    x, memory = batch.x, batch.memory
    batches = [job.render(own(x, jnp.array(i), job.turns)) for i in range(job.turns)]
    for images in batches:
        memory = job.remember(batch.context, images, memory)
    images, memory = at_home((jnp.concatenate(batches), memory))
    return Made(images, batch.loss, memory)
