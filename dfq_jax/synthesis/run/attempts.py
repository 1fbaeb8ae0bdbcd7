"""One optimisation, or several side by side: from initial variables to finished images."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree

from dfq_jax.base.parallel import at_home, everywhere, share_rows, stack
from dfq_jax.errors import DivergedError
from dfq_jax.optim.alternating import own
from dfq_jax.optim.attempts import RESTARTS, at_lower_rates, retold
from dfq_jax.optim.fit import Apart, FitResult, Metrics, RunStart, fit, fit_apart
from dfq_jax.optim.state import StateStore
from dfq_jax.synthesis.run.diversity import fault_of
from dfq_jax.synthesis.run.objectives import Context, Job, lighter

OWN = Context._make((False, False, False, True))
"""Which parts of the context differ from batch to batch: the labels."""
ATTEMPTS = 3
"""How often a batch is made whose images are all alike or blank."""


class Underway(NamedTuple):
    """A batch on its way.

    Attributes:
      x: variables.
      memory: of the recipe.
      context: inputs of the objective.
      key: of its steps.
      loss: at the last step.
      notes: what went wrong so far, in words that follow "batch 3".
    """

    x: PyTree
    memory: PyTree
    context: Context
    key: Key[Array, ""]
    loss: float
    notes: tuple[str, ...] = ()

    def after(self, fitted: FitResult, *notes: str) -> "Underway":
        """The same batch a stage later, with more notes."""
        fields = {"x": fitted.x, "memory": fitted.memory, "loss": fitted.loss}
        return self._replace(**fields, notes=self.notes + notes)


class BatchStart(NamedTuple):
    """What one optimisation begins with.

    Attributes:
      shared: what the recipe prepared.
      memory: from the batch before.
      key: of this batch.
    """

    shared: PyTree
    memory: PyTree
    key: Key[Array, ""]


class Visits(NamedTuple):
    """When the host looks at an optimisation, and what it does then.

    Attributes:
      chunk: most steps between two visits.
      on_chunk: told the steps done, and the last metrics.
    """

    chunk: int
    on_chunk: Callable[[int, Metrics], None]

    def behind(self, done: int) -> "Visits":
        """The same for a stage behind so many steps of earlier ones."""
        return self._replace(on_chunk=lambda step, parts: self.on_chunk(done + step, parts))


def begin(job: Job, given: BatchStart) -> Underway:
    """A batch before its first step, where it is going to be made."""
    shared, memory, key = given
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
    visits: Visits,
    store: StateStore | None,
    failed: FitResult | None = None,
) -> Underway:
    """Optimises one stage of one batch, restarting at half the learning rate when it diverges.

    Args:
      job: the static side.
      index: of the stage.
      batch: before it.
      visits: of the host, told the steps done in this stage.
      store: where the first attempt is kept.
      failed: what became of the first attempt, if it has been made.

    Returns:
      The batch after the stage.

    Raises:
      DivergedError: after four attempts.
    """
    done, before = sum(plan.steps for plan in job.plans[:index]), job.parts[-1]
    attempt = partial(fit_once, job, index, batch, visits, store)
    result, steps = at_lower_rates(attempt, failed)
    steps = tuple(done + step for step in steps)
    if result.status != "diverged":
        return batch.after(result, *retold(steps), *parted(job, before))
    raise DivergedError(
        f"{job.recipe.name}: the loss became NaN or infinite at step {steps[-1]} in each of "
        f"{len(steps)} attempts, the last at 1/{2**RESTARTS} of the learning rate. "
        "Check the weights with `dfq inspect`, or use fewer `steps=`."
    )


def fit_once(
    job: Job, index: int, batch: Underway, visits: Visits, store: StateStore | None, attempt: int
) -> FitResult:
    """One attempt at `fit_stage`, whatever comes of it; the first is kept."""
    stage = job.plans[index]
    return fit(
        stage.step(job.parts[-1], attempt),
        batch.x,
        batch.context,
        steps=stage.steps,
        key=jax.random.fold_in(batch.key, index),
        memory=batch.memory,
        chunk=visits.chunk,
        on_chunk=visits.on_chunk,
        store=store if attempt == 0 else None,
        lighter=partial(lighter, job, index, attempt),
    )


def parted(job: Job, before: int) -> tuple[str, ...]:
    """What to say where memory did not suffice for a batch in as many parts as before."""
    now = job.parts[-1]
    return (f"did not fit into memory: done in {now} parts",) if now > before else ()


def fit_stage_apart(
    job: Job,
    index: int,
    batches: Sequence[Underway],
    mesh: Mesh,
    visits: Visits,
    stores: Sequence[StateStore | None],
) -> list[Underway]:
    """Optimises one stage of several batches, one a device.

    As many are wanted as there are stores; devices beyond them make the last once more. A batch
    that diverges is made again alone, on one device; the others keep what they have, and those not
    wanted what they had.

    Raises:
      DivergedError: if one of those wanted diverges in four attempts.
    """
    stage, contexts = job.plans[index], [batch.context for batch in batches]
    context, before = everywhere(contexts[0]._replace(labels=()), mesh), job.parts[-1]
    wanted = len(stores)
    stores = [*stores, *[stores[-1]] * (mesh.size - wanted)]
    starts = [
        RunStart(batch.x, jax.random.fold_in(batch.key, index), batch.memory, store)
        for batch, store in zip(batches, stores, strict=True)
    ]
    results = fit_apart(
        stage.step(before),
        starts,
        context._replace(labels=stack([c.labels for c in contexts], mesh)),
        Apart(mesh, OWN),
        steps=stage.steps,
        chunk=visits.chunk,
        on_chunk=visits.on_chunk,
        lighter=partial(lighter, job, index, 0),
    )
    batches = [batch._replace(notes=batch.notes + parted(job, before)) for batch in batches]
    again = partial(fit_stage, job, index, visits=visits, store=None)
    return [
        again(batch, failed=r) if r.status == "diverged" and i < wanted else batch.after(r)
        for i, (batch, r) in enumerate(zip(batches, results, strict=True))
    ]


class Made(NamedTuple):
    """A finished batch.

    Attributes:
      images: normalised.
      loss: at the last step.
      memory: for the next batch.
      notes: what went wrong on the way, in words that follow "batch 3".
    """

    images: Float[Array, "b h w c"]
    loss: float
    memory: PyTree
    notes: tuple[str, ...] = ()


Stores = Callable[[int, int], StateStore | None]
"""(stage, attempt) -> where the state of a batch is kept."""


def make(job: Job, given: BatchStart, visits: Visits, stores: Stores) -> Made:
    """All stages of one optimisation; another time where its images are all alike or blank.

    Args:
      job: the static side.
      given: what it begins with.
      visits: of the host, told the steps done in all stages.
      stores: (stage, attempt) -> where its state is kept.

    Returns:
      Finished images.
    """
    attempt = partial(make_once, job, given, visits, stores)
    return sound(job, attempt(0), attempt)


def make_once(job: Job, given: BatchStart, visits: Visits, stores: Stores, attempt: int) -> Made:
    """One attempt at `make`, whatever comes of it."""
    batch, done = begin(job, given._replace(key=key_of(given.key, attempt))), 0
    for index, stage in enumerate(job.plans):
        batch = fit_stage(job, index, batch, visits.behind(done), stores(index, attempt))
        done += stage.steps
    return finish(job, batch)


def key_of(key: Key[Array, ""], attempt: int) -> Key[Array, ""]:
    """The key of an attempt; far from those the first splits off, which are `fold_in(key, i)`."""
    return key if attempt == 0 else jax.random.fold_in(jax.random.fold_in(key, 2**31 - 1), attempt)


def sound(job: Job, made: Made, attempt: Callable[[int], Made]) -> Made:
    """The first of several attempts whose images are neither all alike nor blank.

    Args:
      job: the static side.
      made: the first.
      attempt: number -> another one.

    Returns:
      It, or the last one if all are; the notes tell of every attempt.
    """
    for number in range(1, ATTEMPTS + 1):
        fault = first_fault(job, made.images)
        if fault is None:
            break
        if number == ATTEMPTS:
            left = f"{fault}, as did all of {ATTEMPTS} attempts: kept, though it tells little"
            return made._replace(notes=(*made.notes, left))
        again, told = attempt(number), f"{fault}: made again from another seed"
        made = again._replace(notes=(*made.notes, told, *again.notes))
    return made


def first_fault(job: Job, images: Float[Array, "n h w c"]) -> str | None:
    """What is wrong with one of the batches that were optimised together, if anything is."""
    batches = [images] if job.turns == 1 else jnp.split(images, job.turns)
    return next(filter(None, (fault_of(v, job.model.contract) for v in batches)), None)


def make_apart(
    job: Job, given: Sequence[BatchStart], mesh: Mesh, visits: Visits, stores: Sequence[Stores]
) -> list[Made]:
    """All stages of several optimisations at the same time, one a device.

    Args:
      job: the static side; of one turn.
      given: what each begins with; where there are fewer than devices, the last is made several
        times.
      mesh: the devices.
      visits: of the host, told the steps done in all stages, and metrics averaged over the batches.
      stores: for each batch: (stage, attempt) -> where its state is kept.

    Returns:
      What `make` would return for each.
    """
    batches, done = [begin(job, each) for each in given], 0
    batches += [batches[-1]] * (mesh.size - len(given))
    for index, stage in enumerate(job.plans):
        kept = [of(index, 0) for of in stores]
        batches = fit_stage_apart(job, index, batches, mesh, visits.behind(done), kept)
        done += stage.steps
    made = [finish(job, batch) for batch in batches[: len(given)]]
    pairs = zip(given, stores, strict=True)
    again = [partial(make_once, job, each, visits, of) for each, of in pairs]
    return [sound(job, each, attempt) for each, attempt in zip(made, again, strict=True)]


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
    return Made(images, batch.loss, memory, batch.notes)
