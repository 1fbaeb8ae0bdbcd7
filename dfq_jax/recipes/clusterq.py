"""ClusterQ: images of a class gather around a centre of their own in the deep layers.

Gao et al. 2022, "Towards Feature Distribution Alignment and Diversity Enhancement for Data-Free
Quantization". The paper trains a generator with these terms; here they are those of pixels. The
statistics are of single samples, so that classes can share a batch; those of the samples that the
network misclassifies are left out. With the centre `c` of the class of an image, which follows the
images, and the statistics `s` of the image, both at the deep half of the batch norms:

    SFDA = mean (s - c)^2
    ICV  = mean (s - c - noise)^2,  noise ~ N(0, 0.5^2) for means, N(0, 1) for deviations

    loss = CE + 0.1 BNS + 0.9 SFDA + 0.6 ICV
"""

from dfq_jax.optim.schedules import adam_with_plateau, rated
from dfq_jax.synthesis.recipe import Recipe, Source, Stage, grouped_labels, recorded
from dfq_jax.synthesis.sources.pixels import gaussian
from dfq_jax.synthesis.terms.base import Term, label_entropy
from dfq_jax.synthesis.terms.clusters import after, alignment, followers, variation
from dfq_jax.synthesis.terms.match import batch_var_gap, matched, squared_mean
from dfq_jax.values import bound


@recorded
def clusterq(
    *,
    steps: int = 500,
    batch: int = 64,
    learning_rate: float = 0.5,
    per_class: int = 8,
    warmup: float = 1 / 8,
    statistics: float = 0.1,
    align: float = 0.9,
    diversify: float = 0.6,
    rate: float = 0.2,
    noise: tuple[float, float] = (0.5, 1.0),
    relative_noise: bool = False,
) -> Recipe:
    """ClusterQ's terms on pixels.

    Args:
      steps: Adam steps.
      batch: images optimised together.
      learning_rate: of Adam, in natural units; cut to a tenth on plateaus of 100 steps (ours).
      per_class: images of a class in a batch, fewer where classes do not suffice (ours).
      warmup: share of the steps before centres count.
      statistics: a1, weight of the batch statistics.
      align: a2, weight of the distance to the centre of the class.
      diversify: a3, weight of the distance to a point drawn around it.
      rate: beta, by which centres follow the images.
      noise: deviations of that draw, of means and of deviations, absolute.
      relative_noise: in units of each channel's recorded deviation instead (ours).

    Returns:
      The recipe.
    """
    quiet = round(warmup * steps)
    optimizer = rated(adam_with_plateau, learning_rate, patience=100, floor=1e-4)
    varied = bound(variation, noise=noise, relative=relative_noise)
    return Recipe(
        name="clusterq",
        batch=batch,
        source=Source(gaussian),
        stages=(Stage(steps, optimizer),),
        terms=(
            Term("CE", 1.0, label_entropy, True),
            Term("BNS", statistics, matched(batch_var_gap, squared_mean, mean=True)),
            Term("SFDA", align, bound(after, quiet, alignment), True),
            Term("ICV", diversify, bound(after, quiet, varied), True),
        ),
        condition=bound(grouped_labels, per_class=per_class),
        memory=followers(quiet, rate),
    )
