"""DeepInversion: images a network is sure about, with smoothness and batch statistics as priors.

Yin et al. 2020, "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion". With a
student it becomes adaptive: images on which the two networks agree cost more.

    R_feature = sum_l r_l (|m - mu|_2 + |v - sigma^2|_2)     of the batch, r_1 = 10, others 1
    R_TV, R_l2: differences of neighbours, length of images
    R_compete = 1 - JS(teacher, student)

    loss = CE + 0.01 R_feature + 1e-4 R_TV + 1e-5 R_l2 (+ 0.2 R_compete)
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import optax

from dfq_jax.graph.graph import Model
from dfq_jax.optim.schedules import adam_to_zero, rated
from dfq_jax.recipes.sizes import gains_from_halves, is_small
from dfq_jax.synthesis.recipe import Offer, Recipe, Source, Stage, balanced_labels, random_labels
from dfq_jax.synthesis.sources.augment import Augment, compose, flip, halve, jitter
from dfq_jax.synthesis.sources.pixels import gaussian
from dfq_jax.synthesis.terms.base import (
    Term,
    label_entropy,
    natural_norm,
    natural_variation,
)
from dfq_jax.synthesis.terms.match import batch_var_gap, matched, norms
from dfq_jax.synthesis.terms.rival import Resolution, admitted, agreement
from dfq_jax.values import Bound, bound

Variant = Literal["paper", "code"]


class TermWeights(NamedTuple):
    """Factors of the terms, as recommended for ImageNet.

    Attributes:
      labels: cross-entropy to random labels.
      statistics: distance to recorded statistics.
      first: of the first batch norm in it, once more.
      variation: total variation.
      norm: length of images.
      compete: agreement with the student.
    """

    labels: float = 1.0
    statistics: float = 0.01
    first: float = 10.0
    variation: float = 1e-4
    norm: float = 1e-5
    compete: float = 0.2


IMAGENET_WEIGHTS = TermWeights()
CIFAR_WEIGHTS = TermWeights(statistics=10.0, first=1.0, variation=2.5e-5, norm=0.0)


def deepinversion(
    *,
    resolution: Resolution = "multi",
    steps: int = 3000,
    batch: int = 84,
    learning_rate: float = 0.25,
    betas: tuple[float, float] = (0.5, 0.9),
    reach: int = 30,
    mirror: bool = True,
    bounded: bool = True,
    weights: TermWeights = IMAGENET_WEIGHTS,
    student: Model | None = None,
    variant: Variant = "paper",
) -> Recipe:
    """DeepInversion with the values its authors recommend for ImageNet.

    The result is the last iterate; the released ImageNet script keeps the one of least loss.

    Args:
      resolution: `multi`: two thirds of the steps at half the size, the rest at full size; `full`:
        all at full size (released with 2000 steps), for networks that cannot read half the size.
      steps: Adam steps of both stages.
      batch: images whose statistics are taken together.
      learning_rate: of Adam, in natural units; rises over 100 steps, falls to 0 along a cosine.
      betas: of Adam.
      reach: images are rolled by up to so many pixels, by half of it at half the size.
      mirror: flip the batch left and right, every other time.
      bounded: only possible pixels.
      weights: of the terms.
      student: a network to disagree with (adaptive DeepInversion); same classes and image size.
      variant: divergence from the student as in the paper or the code; see `competition`.

    Returns:
      The recipe.
    """
    return Recipe(
        name="deepinversion",
        settings={
            "resolution": resolution,
            "learning_rate": learning_rate,
            "betas": list(betas),
            "reach": reach,
            "mirror": mirror,
            "bounded": bounded,
            "weights": weights._asdict(),
            "adaptive": student is not None,
            "variant": variant,
        },
        batch=batch,
        source=Source(gaussian),
        stages=stages(resolution, steps, reach, mirror, partial(adam_of, learning_rate, betas)),
        terms=terms_of(weights, student, variant),
        prepare=bound(admitted, student, resolution),
        condition=random_labels,
        bounded=bounded,
    )


def deepinversion_cifar(
    *, steps: int = 2000, batch: int = 256, learning_rate: float = 0.05, **changes: Any
) -> Recipe:
    """DeepInversion with the values its authors recommend for CIFAR-10.

    Args:
      steps: Adam steps, all at full size.
      batch: images whose statistics are taken together.
      learning_rate: as in `deepinversion`.
      **changes: other arguments of `deepinversion`.

    Returns:
      The recipe; every class is shown as often as any other, give or take once.
    """
    values: dict[str, Any] = {
        "resolution": "full",
        "betas": (0.9, 0.999),
        "reach": 2,
        "mirror": False,
        "bounded": False,
        "weights": CIFAR_WEIGHTS,
    }
    given = {"steps": steps, "batch": batch, "learning_rate": learning_rate}
    return deepinversion(**(values | given | changes))._replace(condition=balanced_labels)


def suited(model: Model, given: Mapping[str, Any]) -> Recipe:
    """DeepInversion as published for images of a network's size, if it runs at half of it."""
    if is_small(model.contract):
        return deepinversion_cifar(**given)
    return deepinversion(resolution="multi" if gains_from_halves(model) else "full", **given)


DEEPINVERSION = Offer(deepinversion, suited)


def terms_of(weights: TermWeights, student: Model | None, variant: Variant) -> tuple[Term, ...]:
    """The objective; with a student, its agreement as well."""
    statistics = matched(batch_var_gap, norms, first=weights.first)
    terms = (
        Term("CE", weights.labels, label_entropy, True),
        Term("R_feature", weights.statistics, statistics),
        Term("R_TV", weights.variation, natural_variation),
        Term("R_l2", weights.norm, natural_norm),
    )
    if student is None:
        return terms
    return (*terms, Term("R_compete", weights.compete, bound(agreement, variant == "code"), True))


def adam_of(
    learning_rate: float, betas: tuple[float, float], steps: int
) -> Bound[optax.GradientTransformation]:
    """A stage's optimizer: Adam with a warm-up and a cosine over its steps."""
    b1, b2 = betas
    return rated(adam_to_zero, learning_rate, steps=steps, b1=b1, b2=b2, warmup=100)


def stages(
    resolution: Resolution,
    steps: int,
    reach: int,
    mirror: bool,
    adam: Callable[[int], Bound[optax.GradientTransformation]],
) -> tuple[Stage, ...]:
    """One stage at full size, for `multi` after one at half the size with twice its steps."""

    def shown(reach: int) -> Augment:
        return compose(jitter(reach), flip()) if mirror else jitter(reach)

    small = steps * 2 // 3 if resolution == "multi" else 0
    full = Stage(steps - small, adam(steps - small), shown(reach))
    if not small:
        return (full,)
    return Stage(small, adam(small), compose(halve, shown(reach // 2))), full
