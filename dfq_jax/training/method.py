"""A method of training as a value: who learns, from which images, by which losses."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import optax
from jaxtyping import Array, Key, PyTree

from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.optim.schedules import Make, in_own_units
from dfq_jax.synthesis.recipe import Memory, nothing
from dfq_jax.synthesis.sources.augment import Augment, unchanged
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.synthesis.terms.targets import Targets
from dfq_jax.training.generator import Drawn, GeneratorKind
from dfq_jax.training.losses import Watch, nothing_watched
from dfq_jax.training.student import StudentKind, StudentStart, on_learned_levels
from dfq_jax.training.wrappers import Wrapper
from dfq_jax.values import Bound, bound, key_of

AtFactor = Callable[[float], optax.GradientTransformation]
"""Factor of the learning rate, halved after divergence -> an optimizer."""


Projection = Callable[[PyTree, StudentStart], PyTree]
"""(what is trained, what is not) -> the nearest variables that are allowed."""


class FixedImages(NamedTuple):
    """A set of images, of which each is shown once an epoch.

    Attributes:
      augment: what becomes of them first, in natural units, drawn anew at every step.
    """

    augment: Augment = unchanged


class GeneratedImages(NamedTuple):
    """Images of a generator that plays in turn with the student.

    Attributes:
      kind: of generator.
      terms: its objective, of the teacher's view of its images; terms of synthesis.
      optimizer: of the generator.
      warmup: rounds in which it plays alone, and ranges of activations are tracked.
      times: steps of the generator in a round.
      lessons: steps of the student in a round.
      against: its terms look at the student's answers too: a `Lesson`, which they find in
        `Observed.shared`; the student's ranges are not tracked then.
      prepare: (network, statistics, key) -> what its terms find in `Observed.shared` otherwise,
        e.g. tolerances; run once.
      memory: what its terms remember from step to step.
      second: draws the codes of a second batch of its images, which its terms find behind the
        first and the student is never shown; each is normalised by its own statistics. None for
        one batch.
      real: images of a fixed set that every step of the student is shown before those made: at most
        so many, all if there are fewer; with one lesson a round.
      augment: what becomes of all that the student is shown, in natural units.
    """

    kind: GeneratorKind
    terms: tuple[Term, ...]
    optimizer: AtFactor
    warmup: int = 0
    times: int = 1
    lessons: int = 1
    against: bool = False
    prepare: Callable[[Model, Targets, Key[Array, ""]], PyTree] = nothing
    memory: Memory = Memory()
    second: Callable[[PyTree, Key[Array, ""], int, int], Drawn] | None = None
    real: int = 0
    augment: Augment = unchanged


class FixedRows(NamedTuple):
    """Rows of ids of a fixed set, each shown once an epoch as it is: for networks of tokens."""


class SoftRows(NamedTuple):
    """Rows that a copy of the teacher makes of rows of ids, one step of it for each of the student.

    It climbs what the student descends; see `training.soft_tokens`.

    Attributes:
      optimizer: of the copy and of its table.
    """

    optimizer: AtFactor


ImageSource = FixedImages | GeneratedImages | FixedRows | SoftRows
"""Where what players are shown comes from."""


class Training(NamedTuple):
    """Everything a paper on training without data decides: equal to any that says the same.

    Attributes:
      name: of the method.
      steps: of the student.
      batch: images of a step.
      student: what it is.
      images: where images come from.
      terms: its objective; functions of a `Lesson`.
      optimizer: of the student.
      watch: graph -> tensors that the terms compare.
      wrappers: what is done to the loss, the first innermost.
      average: weight of the past in an average over steps, which the result is; None for the last
        step.
      epoch: steps over which changes of codes are counted.
      start: where the student begins: `float`, rounded to nearest; `post_training`, as our own
        learned rounding leaves it.
      recipe: how fixed images are made where none are given, by its name, and how many; for a
        generator those that ranges begin at, and that judge.
      n: how many; None for as many as its paper makes, or a preset.
      reestimate: the student begins with norms estimated anew behind rounding (`recipes.aac_abn`).
      penalties: terms of what is trained itself, added to the objective.
      project: what becomes of variables after every step; None where all are allowed.
      inflation: round -> share of each kernel's codes that updates are made large enough to change
        (`training.inflation`); None for updates as they are.
      directions: outputs are directions: the student is judged by these alone on images that it has
        not seen, not by scores or values.
      gradient_bits: of the gradients that layers of the student multiply
        (`training.gradient_levels`); None for float.
    """

    name: str
    steps: int
    batch: int
    student: StudentKind
    images: ImageSource
    terms: tuple[Term, ...]
    optimizer: AtFactor
    watch: Watch = nothing_watched
    wrappers: tuple[Wrapper, ...] = ()
    average: float | None = None
    epoch: int = 200
    start: Literal["float", "post_training"] = "float"
    recipe: str = "best"
    n: int | None = None
    reestimate: bool = False
    penalties: tuple[Term, ...] = ()
    project: Projection | None = None
    inflation: Bound[Array] | None = None
    directions: bool = False
    gradient_bits: int | None = None

    def __hash__(self) -> int:
        """Equal for equal methods."""
        return hash(key_of(self))

    @property
    def classes(self) -> tuple[str, ...]:
        """Its terms that need a classifier."""
        own = self.images.terms if isinstance(self.images, GeneratedImages) else ()
        return tuple(term.name for term in (*self.terms, *own) if term.classes)

    @property
    def rows(self) -> bool:
        """Whether it shows rows of ids, not images."""
        return isinstance(self.images, FixedRows | SoftRows)

    @property
    def examples(self) -> str:
        """What it shows, as messages call it."""
        return "rows" if self.rows else "images"

    @property
    def rounds(self) -> int:
        """Rounds of the whole run, those in which the student stands still included."""
        if not isinstance(self.images, GeneratedImages):
            return self.steps
        return self.images.warmup + -(-self.steps // self.images.lessons)


def generating(method: Training, name: str, **changes: Any) -> Training:
    """A method under another name whose generator differs in some fields of `GeneratedImages`.

    Raises:
      ValueError: if it has no generator.
    """
    if not isinstance(method.images, GeneratedImages):
        raise ValueError(f"{method.name} has no generator that could be told otherwise.")
    return method._replace(name=name, images=method.images._replace(**changes))


def on_gradient_grid(method: Training, bits: int) -> Training:
    """A method whose layers multiply gradients of so many bits.

    Raises:
      UsageError: for bits that no grid has.
    """
    if not 2 <= bits <= 8:
        raise UsageError(
            f"gradients have 2..8 bits, got {bits}: take `gradient_bits=8`, or none for float."
        )
    return method._replace(gradient_bits=bits)


def begun_on_levels(method: Training) -> tuple[Training, tuple[str, ...]]:
    """A method from a network whose levels were learned, and in words what it does otherwise."""
    student, kept = on_learned_levels(method.student)
    told = (f"{method.name} from a start: {', '.join(kept)}",) if kept else ()
    return method._replace(student=student), told


def rates_apart(
    weights: AtFactor, steps: AtFactor | None = None, edges: AtFactor | None = None
) -> Bound[optax.GradientTransformation]:
    """factor -> an optimizer for each kind of variable.

    Args:
      weights: of kernels, biases and norms.
      steps: of scales of kernels; None for that of weights.
      edges: of scales of activations, likewise.
    """
    return bound(optimizers_apart, weights, steps or weights, edges or weights)


def optimizers_apart(
    weights: AtFactor, steps: AtFactor, edges: AtFactor, factor: float
) -> optax.GradientTransformation:
    """What `rates_apart` gives for a factor."""
    kinds: Mapping[Any, optax.GradientTransformation] = {
        **{"weights": weights(factor), "steps": steps(factor), "edges": edges(factor)}
    }
    label = lambda path, leaf: path[0].key
    return optax.multi_transform(kinds, lambda x: jax.tree.map_with_path(label, x))


def to_zero(
    make: Make, rate: float, steps: int, *, relative: bool = False, **settings: Any
) -> AtFactor:
    """factor -> an optimizer whose rate falls to 0 along a cosine.

    Args:
      make: a factory of a module, e.g. `optax.adam`.
      rate: the first.
      steps: after which it is 0.
      relative: in units of what is changed, so that a scale never changes its sign.
      **settings: of the factory.
    """
    return bound(falling_to_zero, make, rate, steps, relative, tuple(sorted(settings.items())))


def falling_to_zero(
    make: Make,
    rate: float,
    steps: int,
    relative: bool,
    settings: tuple[tuple[str, Any], ...],
    factor: float,
) -> optax.GradientTransformation:
    """What `to_zero` gives for a factor."""
    optimizer = make(optax.cosine_decay_schedule(rate * factor, steps), **dict(settings))
    return optax.chain(optimizer, in_own_units()) if relative else optimizer


def nesterov(
    rate: float, *, decay: float = 0.0, drops: tuple[int, ...] = (), factor: float = 0.1
) -> Bound[optax.GradientTransformation]:
    """factor -> SGD with Nesterov's momentum of 0.9, whose rate falls at some steps.

    Args:
      rate: the first.
      decay: weight decay, added to slopes as in PyTorch.
      drops: steps at which the rate is multiplied by `factor`.
      factor: see there.
    """
    return bound(sgd_at, True, rate, decay, tuple(drops), factor)


def momentum(
    rate: float, *, decay: float = 0.0, drops: tuple[int, ...] = (), factor: float = 0.1
) -> Bound[optax.GradientTransformation]:
    """`nesterov` with plain momentum of 0.9."""
    return bound(sgd_at, False, rate, decay, tuple(drops), factor)


def sgd_at(
    nesterov: bool, rate: float, decay: float, drops: tuple[int, ...], drop: float, factor: float
) -> optax.GradientTransformation:
    """What `nesterov` and `momentum` give for a factor."""
    moving = optax.sgd(falling(rate * factor, drops, drop), momentum=0.9, nesterov=nesterov)
    return optax.chain(optax.add_decayed_weights(decay), moving) if decay else moving


def cosine_sgd(
    rate: float, steps: int, *, decay: float = 0.0, nesterov: bool = True
) -> Bound[optax.GradientTransformation]:
    """factor -> SGD with a momentum of 0.9 whose rate falls to 0 along a cosine.

    Args:
      rate: the first.
      steps: after which it is 0.
      decay: weight decay, added to slopes as in PyTorch.
      nesterov: whether the momentum is Nesterov's.
    """
    return bound(cosine_sgd_at, rate, steps, decay, nesterov)


def cosine_sgd_at(
    rate: float, steps: int, decay: float, nesterov: bool, factor: float
) -> optax.GradientTransformation:
    """What `cosine_sgd` gives for a factor."""
    falling_rate = optax.cosine_decay_schedule(rate * factor, steps)
    moving = optax.sgd(falling_rate, momentum=0.9, nesterov=nesterov)
    return optax.chain(optax.add_decayed_weights(decay), moving)


def milestones(make: Make, rate: float, drops: tuple[int, ...], **settings: Any) -> AtFactor:
    """factor -> an optimizer whose rate falls to a tenth at some steps."""
    return bound(dropping_at, make, rate, tuple(drops), tuple(sorted(settings.items())))


def dropping_at(
    make: Make,
    rate: float,
    drops: tuple[int, ...],
    settings: tuple[tuple[str, Any], ...],
    factor: float,
) -> optax.GradientTransformation:
    """What `milestones` gives for a factor."""
    return make(falling(rate * factor, drops, 0.1), **dict(settings))


def falling(rate: float, drops: tuple[int, ...], factor: float) -> optax.Schedule:
    """step -> a rate that is multiplied by a factor at some steps, for each time one is named."""
    return optax.piecewise_constant_schedule(rate, {k: factor ** drops.count(k) for k in drops})
