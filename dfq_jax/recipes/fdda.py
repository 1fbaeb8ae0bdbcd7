"""FDDA: images whose deep statistics are those of a real image of their class.

Zhong et al. 2022, "Fine-grained Data Distribution Alignment for Post-Training Quantization", and
its released code. The paper trains a generator with these terms (`recipes.fdda_qat`); here they are
those of pixels. Not free of data: `class_centres` needs an image of some classes. With the mean and
variance `c` of that image behind a deep layer, and those `s` of images of its class:

    C_BNS = mean_l mean((s - c)^2)
    D_BNS = mean_l mean((s - c - noise)^2),  noise ~ N(0, 0.5^2) for means, N(0, 1) for variances

    loss  = 0.5 CE_A + 0.5 CE_B + 0.2 BNS_A + 0.9 D_BNS_B + 0.01 C_BNS_B

where `A` is half of a batch, of random classes, and `B` the other, of one class.
"""

from dfq_jax.optim.schedules import adam_with_plateau, rated
from dfq_jax.synthesis.recipe import Recipe, Source, Stage
from dfq_jax.synthesis.sources.pixels import gaussian
from dfq_jax.synthesis.terms.base import Term, label_entropy
from dfq_jax.synthesis.terms.centres import (
    ClassCentres,
)
from dfq_jax.synthesis.terms.match import batch_var_gap, matched, squared_mean
from dfq_jax.synthesis.terms.one_class import (
    centre_gap,
    centres_for,
    digest,
    distortion,
    half_of_one_class,
    of_half,
    one_class,
    usable_classes,
)
from dfq_jax.values import bound


def fdda(
    centres: ClassCentres,
    *,
    steps: int = 500,
    batch: int = 32,
    learning_rate: float = 0.5,
    statistics: float = 0.2,
    distort: float = 0.9,
    align: float = 0.01,
    noise: tuple[float, float] = (0.5, 1.0),
    positive: bool = False,
    reliable: bool = True,
    mixed: bool = True,
) -> Recipe:
    """FDDA's terms on pixels.

    Args:
      centres: of the classes, from a few real images.
      steps: Adam steps.
      batch: images optimised together, those of both halves.
      learning_rate: of Adam, in natural units; cut to a tenth on plateaus of 100 steps (ours).
      statistics: weight of the recorded statistics.
      distort: weight of the distance to a point drawn around the centre.
      align: weight of the distance to the centre.
      noise: deviations of that draw, of means and of variances, absolute.
      positive: raise negative variances that were drawn to 0 (ours); this makes variances larger.
      reliable: only classes whose images the network gets right.
      mixed: half of the images are of random classes, and matched to recorded statistics; else all
        are of one class, and matched to both, with half the weight of labels (ours).

    Returns:
      The recipe.

    Raises:
      ValueError: if no class has such an image.
    """
    usable = usable_classes(centres, reliable=reliable)
    optimizer = rated(adam_with_plateau, learning_rate, patience=100, floor=1e-4)
    return Recipe(
        name="fdda",
        settings={
            "learning_rate": learning_rate,
            "statistics": statistics,
            "distort": distort,
            "align": align,
            "noise": list(noise),
            "positive": positive,
            "reliable": reliable,
            "mixed": mixed,
            "classes": int(usable.size),
            "centres": digest(centres),
        },
        batch=batch,
        source=Source(gaussian),
        stages=(Stage(steps, optimizer),),
        terms=terms_of((statistics, distort, align), noise, positive=positive, mixed=mixed),
        prepare=bound(centres_for, centres),
        condition=bound(half_of_one_class if mixed else one_class, usable),
    )


def terms_of(
    weights: tuple[float, float, float], noise: tuple[float, float], *, positive: bool, mixed: bool
) -> tuple[Term, ...]:
    """The objective: of recorded statistics, of the noisy centre, of the centre."""
    statistics, distort, align = weights
    recorded = matched(batch_var_gap, squared_mean, mean=True)
    drawn = bound(distortion, noise=noise, positive=positive)
    first = bound(of_half, False, recorded) if mixed else recorded
    around, at = (bound(of_half, True, fn) if mixed else fn for fn in (drawn, centre_gap))
    return (
        Term("CE", 1.0 if mixed else 0.5, label_entropy, True),
        Term("BNS", statistics, first),
        Term("D_BNS", distort, around, True),
        Term("C_BNS", align, at, True),
    )
