"""What all batches of a run share: objectives, optimizers, and functions that compile once."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, PyTree

from dfq_jax.errors import ResourceError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import classes_of
from dfq_jax.optim.fit import Now, Objective
from dfq_jax.optim.turns import in_turn, own, taking_turns
from dfq_jax.synthesis.memory import divisors
from dfq_jax.synthesis.pixels import Images, clip_to_pixels, from_natural, to_natural
from dfq_jax.synthesis.recipe import Recipe, Stage
from dfq_jax.synthesis.targets import PLAIN, Forward, Targets, observe
from dfq_jax.synthesis.terms import Observed, weighted
from dfq_jax.types import InputContract

RESTARTS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """The static side of a run; its functions serve all batches, so they compile once.

    Attributes:
      model: the network.
      recipe: the method.
      targets: what its batch norms recorded.
      classes: how many classes the network tells apart; 0 for one that is no classifier.
      size: images of a batch.
      turns: batches that take turns in one optimisation; 1 for batches on their own.
      plans: the stages.
      render: variables of a batch -> its finished images, normalised.
      remember: (context, finished images, memory) -> memory for the next batch.
      together: the devices that share every batch, if several do.
      parts: in how many parts batches pass through the network, the last entry now; it grows by
        an entry where memory turns out not to suffice, for this batch and all that follow.
    """

    model: Model
    recipe: Recipe
    targets: Targets
    classes: int
    size: int
    turns: int
    plans: tuple["Plan", ...]
    render: Callable[[PyTree], Images]
    remember: Callable[["Context", Images, PyTree], PyTree]
    together: Mesh | None = None
    parts: list[int] = dataclasses.field(default_factory=lambda: [1])

    @property
    def rows(self) -> int:
        """Images of a batch on each device."""
        return self.size // (1 if self.together is None else self.together.size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of a batch of images."""
        return (self.size, *self.model.contract.shape)


class Plan(NamedTuple):
    """A stage with what is built of it once per run.

    Attributes:
      steps: how many, those of all turns together.
      objective: of the stage.
      optimizers: one per attempt, each at half the learning rate of the last.
      in_parts: the objective of batches that pass through the network in so many parts.
    """

    steps: int
    objective: Objective
    optimizers: tuple[optax.GradientTransformation, ...]
    in_parts: Callable[[int], Objective]


def job_for(
    model: Model,
    recipe: Recipe,
    targets: Targets,
    size: int,
    turns: int,
    how: Forward = PLAIN,
    together: Mesh | None = None,
) -> Job:
    """Builds what all batches of a run share and nothing traces twice."""
    none = jnp.zeros((), jnp.int32)

    @jax.jit
    def render(x: PyTree) -> Images:
        return from_natural(finished(recipe, x, model), model.contract)

    @jax.jit
    def remember(context: Context, images: Images, memory: PyTree) -> PyTree:
        if recipe.memory.batch is None:
            return memory
        natural, key = to_natural(images, model.contract), jax.random.key(0)
        return recipe.memory.batch(
            looked_at(recipe, context, how, natural, memory, none, none, key, None)
        )

    plans = tuple(plan(recipe, stage, turns, how) for stage in recipe.stages)
    classes = classes_of(model)
    statics = (model, recipe, targets, classes, size, turns, plans)
    return Job(*statics, render, remember, together, [how.parts])


class Context(NamedTuple):
    """The traced, not differentiated inputs of the objective."""

    model: Model
    targets: Targets
    shared: PyTree
    labels: PyTree


def plan(recipe: Recipe, stage: Stage, turns: int, how: Forward = PLAIN) -> Plan:
    """A stage's objective and optimizers; build them once per run, since they compile."""
    optimizers = (stage.optimizer(0.5**attempt) for attempt in range(RESTARTS + 1))
    if turns > 1:
        optimizers = (taking_turns(optimizer, turns) for optimizer in optimizers)
    given = partial(build_objective, recipe, stage, turns)
    in_parts = cache(lambda parts: given(dataclasses.replace(how, parts=parts)))
    return Plan(stage.steps * turns, in_parts(how.parts), tuple(optimizers), in_parts)


def lighter(job: Job, index: int) -> Objective:
    """The objective of a stage in at least twice as many parts as so far, from now on.

    Raises:
      ResourceError: if the parts are single images already.
    """
    now = job.parts[-1]
    if now >= job.rows:
        raise ResourceError(
            f"{job.recipe.name}: out of memory, though images pass through the network one at a "
            'time. Use a smaller `batch=`, `dtype="bfloat16"` on an accelerator, or a smaller '
            "`size=`."
        )
    job.parts.append(next(d for d in divisors(job.rows) if d >= 2 * now))
    return job.plans[index].in_parts(job.parts[-1])


def build_objective(
    recipe: Recipe, stage: Stage | None = None, turns: int = 1, how: Forward = PLAIN
) -> Objective:
    """The objective of a recipe's stage (by default the first) as `fit` wants it."""
    augment = (stage or recipe.stages[0]).augment

    def objective(x: PyTree, context: Context, now: Now):
        look = partial(looked_at, recipe, context, how)
        shown_key, network_key, term_key = jax.random.split(now.key, 3)
        turn, memory = in_turn(now.step, turns), now.memory
        if recipe.memory.finished:
            last = in_turn(jnp.maximum(now.step - 1, 0), turns)
            images = finished(recipe, jax.lax.stop_gradient(own(x, last, turns)), context.model)
            memory = recipe.memory.step(look(images, memory, last, now.step, term_key, None))
        natural = augment(shown_key, recipe.source.render(own(x, turn, turns)))
        natural = clipped(recipe, natural, context.model.contract)
        observed = look(natural, memory, turn, now.step, term_key, network_key)
        loss, parts = weighted(recipe.terms, observed)
        if not recipe.memory.finished:
            memory = recipe.memory.step(jax.lax.stop_gradient(observed))
        return loss, (parts, memory)

    return objective


def looked_at(
    recipe: Recipe,
    context: Context,
    how: Forward,
    natural: Images,
    memory: PyTree,
    turn: Int[Array, ""],
    step: Int[Array, ""],
    key: Key[Array, ""],
    distortion: Key[Array, ""] | None,
) -> Observed:
    """One forward pass of images in natural units, distorted if there is a key for it."""
    model, watch = context.model, dict(recipe.watch(context.model.graph))
    hook = None
    if distortion is not None and recipe.distort is not None:
        hook = recipe.distort(distortion, model.graph)
    images = from_natural(natural, model.contract)
    wanted = tuple(dict.fromkeys(watch.values()))
    seen = observe(model, context.targets, images, taps=wanted, hook=hook, how=how)
    return Observed(
        images=images,
        natural=natural,
        logits=seen.logits,
        stats=seen.stats,
        taps={name: seen.taps[node] for name, node in watch.items()},
        targets=context.targets,
        shared=context.shared,
        labels=context.labels,
        memory=memory,
        turn=turn,
        step=step,
        key=key,
    )


def clipped(recipe: Recipe, natural: Images, contract: InputContract) -> Images:
    """Images kept to possible pixels where the recipe says so."""
    return clip_to_pixels(natural, contract) if recipe.bounded else natural


def finished(recipe: Recipe, x: PyTree, model: Model) -> Images:
    """Variables to the images they stand for, in natural units and of the size asked for."""
    images = recipe.source.finish(recipe.source.render(x))
    return clipped(recipe, images, model.contract)
