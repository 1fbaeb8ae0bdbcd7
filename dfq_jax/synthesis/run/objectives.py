"""What all batches of a run share: how steps are taken, and functions that compile once."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree

from dfq_jax.errors import ResourceError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import classes_of
from dfq_jax.optim.alternating import of_each, own, whose_turn
from dfq_jax.optim.attempts import rate_of
from dfq_jax.optim.steps import Now, Step, descent
from dfq_jax.synthesis.recipe import Recipe, Stage
from dfq_jax.synthesis.run.memory import divisors
from dfq_jax.synthesis.run.work import BatchWork
from dfq_jax.synthesis.sources.augment import Augment
from dfq_jax.synthesis.sources.pixels import Images, clip_to_pixels, from_natural, to_natural
from dfq_jax.synthesis.terms.base import Observed, weighted
from dfq_jax.synthesis.terms.targets import PLAIN, Forward, Targets, observe
from dfq_jax.types import InputContract
from dfq_jax.values import Bound, bound


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
      plans: the stages as optimisations.
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
    plans: tuple["StagePlan", ...]
    render: Callable[[PyTree], Images]
    remember: Callable[["Context", Images, PyTree], PyTree]
    together: Mesh | None = None
    parts: list[int] = dataclasses.field(default_factory=lambda: [1])

    @property
    def rows(self) -> int:
        """Images of a batch on each device."""
        return self.size // (1 if self.together is None else self.together.size)

    @property
    def together_shape(self) -> tuple[int, int, int, int]:
        """Shape of the images of all turns."""
        return (self.size * self.turns, *self.model.contract.shape)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of a batch of images."""
        return (self.size, *self.model.contract.shape)


class StagePlan(NamedTuple):
    """A stage as an optimisation.

    Attributes:
      recipe: the method.
      stage: the stage.
      turns: batches that take turns in it.
      how: the forward pass, but for its parts.
    """

    recipe: Recipe
    stage: Stage
    turns: int
    how: Forward

    @property
    def steps(self) -> int:
        """How many, those of all turns together."""
        return self.stage.steps * self.turns

    def step(self, parts: int, attempt: int = 0) -> Step:
        """How to take one, with batches in so many parts, in an attempt at its learning rate."""
        how = dataclasses.replace(self.how, parts=parts)
        optimizer = bound(self.stage.optimizer, rate_of(attempt))
        if self.turns > 1:
            optimizer = bound(of_each, optimizer, self.turns)
        return descent(build_objective(self.recipe, self.stage, self.turns, how), optimizer)


def job_for(
    model: Model, work: BatchWork, how: Forward = PLAIN, together: Mesh | None = None
) -> Job:
    """Builds what all batches of a run share and nothing traces twice."""
    recipe, targets, size, turns = work
    seen = traced(recipe)
    render = jax.jit(bound(rendered, seen, model.contract))
    remember = jax.jit(bound(remembered, seen, how))
    plans = tuple(StagePlan(recipe, stage, turns, how) for stage in recipe.stages)
    classes = classes_of(model)
    statics = (model, recipe, targets, classes, size, turns, plans)
    return Job(*statics, render, remember, together, [how.parts])


def traced(recipe: Recipe) -> Recipe:
    """What programs are made of: recipes that differ in the rest, as in labels, share them."""
    return Recipe(
        name="",
        batch=0,
        source=recipe.source,
        terms=recipe.terms,
        watch=recipe.watch,
        distort=recipe.distort,
        memory=recipe.memory,
        bounded=recipe.bounded,
    )


def rendered(recipe: Recipe, contract: InputContract, x: PyTree) -> Images:
    """Variables to the images they stand for, normalised."""
    return from_natural(finished(recipe, x, contract), contract)


class Context(NamedTuple):
    """The traced, not differentiated inputs of the objective."""

    model: Model
    targets: Targets
    shared: PyTree
    labels: PyTree


def remembered(
    recipe: Recipe, how: Forward, context: Context, images: Images, memory: PyTree
) -> PyTree:
    """What a batch hands over to the next, from its finished images."""
    if recipe.memory.batch is None:
        return memory
    natural, key = to_natural(images, context.model.contract), jax.random.key(0)
    none = jnp.zeros((), jnp.int32)
    at = SynthesisStep(memory, none, none, key)
    return recipe.memory.batch(looked_at(recipe, how, context, natural, at))


def lighter(job: Job, index: int, attempt: int) -> Step:
    """The step of a stage in at least twice as many parts as so far, from now on.

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
    return job.plans[index].step(job.parts[-1], attempt)


def build_objective(
    recipe: Recipe, stage: Stage | None = None, turns: int = 1, how: Forward = PLAIN
) -> Bound[tuple[Float[Array, ""], tuple[Mapping[str, Any], PyTree]]]:
    """The objective of a recipe's stage (by default the first), as a value."""
    augment = (stage or recipe.stages[0]).augment
    return bound(recipe_loss, StageObjective(traced(recipe), augment, turns, how))


class StageObjective(NamedTuple):
    """The static side of the objective of a stage; hashable.

    Attributes:
      recipe: the method, as of `traced`.
      augment: what becomes of images before the network sees them.
      turns: batches that take turns.
      how: the forward pass.
    """

    recipe: Recipe
    augment: Augment
    turns: int
    how: Forward


def recipe_loss(
    objective: StageObjective, x: PyTree, context: Context, now: Now
) -> tuple[Float[Array, ""], tuple[Mapping[str, Any], PyTree]]:
    """The weighted terms of a recipe, and what it remembers."""
    recipe, augment, turns, how = objective
    look = partial(looked_at, recipe, how, context)
    contract = context.model.contract
    shown_key, network_key, term_key = jax.random.split(now.key, 3)
    at = SynthesisStep(now.memory, whose_turn(now.step, turns), now.step, term_key)
    if recipe.memory.finished:
        last = whose_turn(jnp.maximum(now.step - 1, 0), turns)
        images = finished(recipe, jax.lax.stop_gradient(own(x, last, turns)), contract)
        at = at._replace(memory=recipe.memory.step(look(images, at._replace(turn=last))))
    natural = augment(shown_key, recipe.source.render(own(x, at.turn, turns)))
    natural = clipped(recipe, natural, contract)
    observed = look(natural, at, network_key)
    loss, parts = weighted(recipe.terms, observed)
    memory = at.memory
    if not recipe.memory.finished:
        memory = recipe.memory.step(jax.lax.stop_gradient(observed))
    return loss, (parts, memory)


class SynthesisStep(NamedTuple):
    """Where a run is when images are looked at.

    Attributes:
      memory: of the recipe.
      turn: whose it is.
      step: number, from 0.
      key: for the terms.
    """

    memory: PyTree
    turn: Int[Array, ""]
    step: Int[Array, ""]
    key: Key[Array, ""]


def looked_at(
    recipe: Recipe,
    how: Forward,
    context: Context,
    natural: Images,
    at: SynthesisStep,
    distortion: Key[Array, ""] | None = None,
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
        memory=at.memory,
        turn=at.turn,
        step=at.step,
        key=at.key,
    )


def clipped(recipe: Recipe, natural: Images, contract: InputContract) -> Images:
    """Images kept to possible pixels where the recipe says so."""
    return clip_to_pixels(natural, contract) if recipe.bounded else natural


def finished(recipe: Recipe, x: PyTree, contract: InputContract) -> Images:
    """Variables to the images they stand for, in natural units and of the size asked for."""
    images = recipe.source.finish(recipe.source.render(x))
    return clipped(recipe, images, contract)
