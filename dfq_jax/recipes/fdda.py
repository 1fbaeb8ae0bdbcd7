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

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dfq_jax.graph.graph import Model
from dfq_jax.optim.schedules import adam_with_plateau, rated
from dfq_jax.synthesis.recipe import Recipe, Source, Stage, random_labels
from dfq_jax.synthesis.sources.pixels import gaussian
from dfq_jax.synthesis.terms.base import Observed, Term, label_entropy
from dfq_jax.synthesis.terms.centres import (
    Centre,
    Centres,
    ClassCentres,
    batch_distance,
    distorted,
    of_class,
)
from dfq_jax.synthesis.terms.match import batch_var_gap, matched, squared_mean
from dfq_jax.synthesis.terms.targets import Stats, Targets
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
    around, at = (bound(of_half, True, fn) if mixed else fn for fn in (drawn, centred))
    return (
        Term("CE", 1.0 if mixed else 0.5, label_entropy, True),
        Term("BNS", statistics, first),
        Term("D_BNS", distort, around, True),
        Term("C_BNS", align, at, True),
    )


def of_half(
    second: bool, fn: Callable[[Observed], Float[Array, ""]], observed: Observed
) -> Float[Array, ""]:
    """A term of one half of a batch."""
    middle = len(observed.images) // 2
    part = slice(middle, None) if second else slice(0, middle)
    stats = {k: Stats(s.mean[part], s.var[part], s.positions) for k, s in observed.stats.items()}
    seen = {k: getattr(observed, k)[part] for k in ("images", "natural", "logits", "labels")}
    return fn(observed._replace(**seen, stats=stats))


def half_of_one_class(
    usable: np.ndarray, key: Key[Array, ""], size: int, classes: int
) -> Float[Array, "b classes"]:
    """One-hot labels: random ones, then as many or one more of a single class."""
    mixed_key, own_key = jax.random.split(key)
    mixed = random_labels(mixed_key, size // 2, classes)
    return jnp.concatenate([mixed, one_class(usable, own_key, size - size // 2, classes)])


def usable_classes(centres: ClassCentres, *, reliable: bool) -> np.ndarray:
    """The classes that batches can be of.

    Raises:
      ValueError: if there are none.
    """
    usable = np.flatnonzero(np.asarray(centres.right if reliable else centres.seen))
    if not usable.size:
        lack = "an image the network gets right" if reliable else "an image"
        raise ValueError(f"fdda() needs at least one class with {lack}, got none.")
    return usable


def digest(centres: ClassCentres) -> int:
    """A number that tells centres apart in the provenance of images."""
    return zlib.crc32(b"".join(np.asarray(v).tobytes() for v in jax.tree.leaves(centres)))


def centres_for(
    centres: ClassCentres, model: Model, targets: Targets, key: Key[Array, ""]
) -> Centres:
    """The centres, if they are of this network.

    Raises:
      ValueError: if they are of layers it does not have.
    """
    del key
    widths = {name: target.mean.shape[-1] for name, target in targets.items()}
    for name, centre in centres.centres.items():
        if widths.get(name) != centre.mean.shape[-1]:
            raise ValueError(
                f"fdda() got centres of {centre.mean.shape[-1]} channels in the batch norm "
                f"{name!r}, where this network of {len(model.graph.nodes)} nodes has "
                f"{widths.get(name, 0)}; measure them on it with class_centres()."
            )
    return centres.centres


def one_class(
    usable: np.ndarray, key: Key[Array, ""], size: int, classes: int
) -> Float[Array, "b classes"]:
    """One-hot labels of a single random class out of those `usable`."""
    label = jax.random.choice(key, jnp.asarray(usable, jnp.int32))
    return jax.nn.one_hot(jnp.broadcast_to(label, (size,)), classes)


def wanted(observed: Observed) -> dict[str, Centre]:
    """The centre of the class of the batch."""
    return of_class(observed.shared, jnp.argmax(observed.labels[0]))


def centred(observed: Observed) -> Float[Array, ""]:
    """C_BNS: distance of the batch to the centre of its class."""
    return batch_distance(observed, wanted(observed))


def distortion(
    observed: Observed, noise: tuple[float, float], *, positive: bool
) -> Float[Array, ""]:
    """D_BNS: distance of the batch to a point drawn around the centre of its class."""
    drawn = distorted(wanted(observed), observed.key, noise)
    if positive:
        drawn = {k: Centre(c.mean, jnp.maximum(c.spread, 0.0)) for k, c in drawn.items()}
    return batch_distance(observed, drawn)
