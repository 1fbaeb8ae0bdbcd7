"""Terms and labels of batches of which half is of one class, drawn to a real image's statistics.

Reference:
  Zhong et al. 2022, "Fine-grained Data Distribution Alignment for Post-Training Quantization".
"""

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dfq_jax.graph.graph import Model
from dfq_jax.synthesis.recipe import random_labels
from dfq_jax.synthesis.terms.base import Observed
from dfq_jax.synthesis.terms.centres import (
    Centre,
    Centres,
    ClassCentres,
    batch_distance,
    distorted,
    of_class,
)
from dfq_jax.synthesis.terms.targets import Stats, Targets


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


def centre_gap(observed: Observed) -> Float[Array, ""]:
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
