"""A synthesis method as a value: what is optimised, what it should match, and how."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from types import MappingProxyType
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Integer, Key, PyTree

from dfq_jax.examples import Evidence
from dfq_jax.graph.evaluate import Hook
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.synthesis.sources.augment import Augment, unchanged
from dfq_jax.synthesis.sources.pixels import Images
from dfq_jax.synthesis.terms.base import Observed, Term
from dfq_jax.synthesis.terms.targets import Targets
from dfq_jax.values import key_of

Arguments = ParamSpec("Arguments")


def itself(x: PyTree) -> PyTree:
    """Variables that are images already; images that are finished."""
    return x


def none_refused(shape: tuple[int, ...]) -> None:
    """A source that makes images of any shape."""
    del shape


def nothing(*given: Any) -> tuple[()]:
    """What nobody asked for: a `prepare`, a `condition` or the start of a memory."""
    del given
    return ()


def unwatched(graph: Graph) -> Mapping[str, str]:
    """A `watch` of nothing."""
    del graph
    return {}


def as_it_was(observed: Observed) -> PyTree:
    """A memory that stays as it is."""
    return observed.memory


class Stage(NamedTuple):
    """A part of an optimisation; its optimizer starts afresh.

    Attributes:
      steps: how many.
      optimizer: learning-rate factor -> optax transform; the factor is halved after divergence.
      augment: what becomes of the images before the network sees them; may change their size.
    """

    steps: int
    optimizer: Callable[[float], optax.GradientTransformation]
    augment: Augment = unchanged


class Source(NamedTuple):
    """What is optimised, and how it becomes images.

    Attributes:
      init: (key, shape of the images) -> variables.
      render: variables -> images in natural units, at least as large as asked for.
      finish: images -> the result, without randomness, e.g. a crop to the size asked for.
      refusal: shape of the images -> why they cannot be made, or None.
    """

    init: Callable[[Key[Array, ""], tuple[int, ...]], PyTree]
    render: Callable[[PyTree], Images] = itself
    finish: Callable[[Images], Images] = itself
    refusal: Callable[[tuple[int, ...]], str | None] = none_refused


class Memory(NamedTuple):
    """What a method remembers from step to step, and from batch to batch.

    Attributes:
      start: (targets, turns, classes, features) -> memory before the first step; `features` is the
        width of each watched tensor.
      step: observed -> memory after a step.
      batch: observed -> memory handed to the next batch, from finished images.
      finished: `step` looks at last step's images as they would be finished, which takes one more
        forward pass, instead of at what the network was shown.
    """

    start: Callable[[Targets, int, int, Mapping[str, int]], PyTree] = nothing
    step: Callable[[Observed], PyTree] = as_it_was
    batch: Callable[[Observed], PyTree] | None = None
    finished: bool = False


class Recipe(NamedTuple):
    """Everything a paper on image synthesis decides: a value, equal to any that says the same.

    Functions are those of modules, with `values.bound` where they take arguments; others serve as
    well, but are equal to themselves alone, and leave nothing on disk to resume from.

    Attributes:
      name: of the method.
      batch: images optimised together.
      source: what is optimised: pixels, or latents and a generator.
      settings: hyper-parameters as plain JSON data; recorded in the images' provenance, beside
        steps and batch.
      stages: the optimisation; none: the initial variables are the images.
      terms: the objective.
      prepare: (model, targets, key) -> what all batches share, e.g. tolerances; run once.
      condition: (key, batch, classes) -> what one batch is conditioned on, e.g. labels.
      watch: graph -> {name: node whose first argument the terms look at}.
      distort: (key, graph) -> hook of the network, drawn anew at every step.
      memory: what it remembers.
      turns: all batches are one optimisation, in which they take turns.
      per_layer: round the batch to a multiple of the number of batch norms.
      bounded: show the network only pixels in 0..255; the clip passes gradients unchanged.
      statistics: it needs a network with batch-norm statistics; without, `targets` are empty.
      sees: network -> the one that the method looks at, which computes the same, and a note that
        says so; None for the network itself.
      evidence: what its images show; decisions rest on it.
    """

    name: str
    batch: int
    source: Source
    settings: Mapping[str, Any] = MappingProxyType({})
    stages: tuple[Stage, ...] = ()
    terms: tuple[Term, ...] = ()
    prepare: Callable[[Model, Targets, Key[Array, ""]], PyTree] = nothing
    condition: Callable[[Key[Array, ""], int, int], PyTree] = nothing
    watch: Callable[[Graph], Mapping[str, str]] = unwatched
    distort: Callable[[Key[Array, ""], Graph], Hook] | None = None
    memory: Memory = Memory()
    turns: bool = False
    per_layer: bool = False
    bounded: bool = False
    statistics: bool = True
    sees: Callable[[Model], tuple[Model, str]] | None = None
    evidence: Evidence = "statistics"

    def __hash__(self) -> int:
        """Equal for equal recipes."""
        return hash(key_of(self))

    @property
    def steps(self) -> int:
        """Optimisation steps of a batch in all stages."""
        return sum(stage.steps for stage in self.stages)


class Offer(NamedTuple):
    """A method as its name offers it: a recipe is made when it is known for which network.

    Attributes:
      make: the factory, with the values of the paper.
      suited: (network, steps and batch if they are asked for) -> the recipe that suits it; None if
        the paper's values do for all.
      images: how many the paper calibrates with; None for one batch.
      ours: it has no paper; presets make fewer images by it, in fewer steps, where nobody names it.
      optimised: takes steps; others are given none, whatever is asked for.
    """

    make: Callable[..., Recipe]
    suited: Callable[[Model, Mapping[str, Any]], Recipe] | None = None
    images: int | None = None
    ours: bool = False
    optimised: bool = True

    def recipe(self, model: Model | None, steps: int | None, batch: int | None) -> Recipe:
        """The recipe for a network, or as published if that is None.

        Args:
          model: the network.
          steps: of a batch, instead of the method's own.
          batch: images optimised together, likewise.
        """
        asked = {"steps": steps if self.optimised else None, "batch": batch}
        given = {k: v for k, v in asked.items() if v is not None}
        if model is None or self.suited is None:
            return self.make(**given)
        return self.suited(model, given)


def batch_size(recipe: Recipe, n: int, layers: int) -> int:
    """Images per batch: no more than asked for, whole rounds of layers where the recipe says so."""
    if recipe.per_layer:
        return layers * max(1, round(min(recipe.batch, n) / layers))
    return min(recipe.batch, n)


def recorded(factory: Callable[Arguments, Recipe]) -> Callable[Arguments, Recipe]:
    """A factory whose arguments, but for steps and batch, are the settings of its recipes."""
    signature = inspect.signature(factory)

    @wraps(factory)
    def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Recipe:
        recipe, given = factory(*args, **kwargs), signature.bind(*args, **kwargs)
        given.apply_defaults()
        own = {k: v for k, v in given.arguments.items() if k not in ("steps", "batch")}
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()}
        return recipe._replace(settings=settings)

    return made


def random_labels(key: Key[Array, ""], size: int, classes: int) -> Float[Array, "b classes"]:
    """One-hot labels, uniform over classes: a `condition` for class-conditional recipes."""
    return drawn_labels(key, size, classes, every=1)


@partial(jax.jit, static_argnames=("size", "classes"))
def drawn_labels(
    key: Key[Array, ""], size: int, classes: int, *, every: int | Integer[Array, ""]
) -> Float[Array, "b classes"]:
    """One-hot labels, uniform over classes, of every so many images; zeros between them."""
    labels = jax.nn.one_hot(jax.random.randint(key, (size,), 0, classes), classes)
    return jnp.where((jnp.arange(size) % every == 0)[:, None], labels, 0.0)


def balanced_labels(key: Key[Array, ""], size: int, classes: int) -> Float[Array, "b classes"]:
    """One-hot labels in random order, every class as often as any other, give or take one."""
    return jax.nn.one_hot(jax.random.permutation(key, size) % classes, classes)


def grouped_labels(
    key: Key[Array, ""], size: int, classes: int, per_class: int
) -> Float[Array, "b classes"]:
    """One-hot labels of groups of one class each, the classes in random order."""
    order = jax.random.permutation(key, classes)
    return jax.nn.one_hot(order[jnp.arange(size) // per_class % classes], classes)


def half_labelled(key: Key[Array, ""], size: int, classes: int) -> Float[Array, "b classes"]:
    """One-hot labels of every other image of a batch; zeros, which no loss looks at, between."""
    return drawn_labels(key, size, classes, every=2)
