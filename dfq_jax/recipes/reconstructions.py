"""What `--reconstruction` means: ways to round kernels by name, and how they are applied.

A reconstruction is one method or several, each from what the one before left.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, Shaped

from dfq_jax.base.elsewhere import check_method
from dfq_jax.errors import UsageError
from dfq_jax.optim.progress import SILENT, UnitReport, Watcher
from dfq_jax.optim.state import NOWHERE, Place
from dfq_jax.quantization.calibrate import guard_biases
from dfq_jax.recipes.adaround import adaround
from dfq_jax.recipes.aquant import aquant
from dfq_jax.recipes.best_rounding import best_rounding
from dfq_jax.recipes.brecq import brecq
from dfq_jax.recipes.flexround import flexround
from dfq_jax.recipes.genie_m import genie_m
from dfq_jax.recipes.pd_quant import pd_quant
from dfq_jax.recipes.qdrop import qdrop
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.recipes.sizes import is_small
from dfq_jax.recipes.squant import squant
from dfq_jax.recipes.stages import stages
from dfq_jax.recipes.stochastic import stochastic
from dfq_jax.recipes.udfc import udfc_rounding
from dfq_jax.reconstruction.closed_form import ClosedForm
from dfq_jax.reconstruction.engine import reconstruct
from dfq_jax.reconstruction.footprint import Method, footprint
from dfq_jax.reconstruction.method import Reconstruction
from dfq_jax.synthesis.sources.augment import compose, flip, resized_crop
from dfq_jax.synthesis.sources.collages import collage
from dfq_jax.synthesis.sources.pixels import from_natural, to_natural
from dfq_jax.types import Input, InputContract

LEARNED: Mapping[str, Callable[..., Reconstruction]] = {
    "adaround": adaround,
    "brecq": brecq,
    "qdrop": qdrop,
    "genie_m": genie_m,
    "flexround": flexround,
    "pd_quant": pd_quant,
    "aquant": aquant,
    "stages": stages,
    "best": best_rounding,
}
PLACED: Mapping[str, Callable[[Quantized], Quantized]] = {
    "squant": squant,
    "stochastic": stochastic,
    "udfc": udfc_rounding,
}
"""What rounds without images, on grids from extreme to extreme."""
RECONSTRUCTIONS = ("nearest", *PLACED, "closed_form", *LEARNED)
OURS = ("closed_form", "stages", "best")
VIEWS = 3
"""Parts that `surfaces` shows of each image, beside the image."""
LEAST_SEEN = 0.1
"""Smallest share of an image that a view shows."""
MIXING = 2
"""Which draw of a key pairs images: the same for all methods, so that they learn from the same."""


class Enlarge(NamedTuple):
    """What is made of images before a reconstruction learns from them.

    Attributes:
      make: (images, key) -> as many as are learned from.
      times: so many of each.
    """

    make: Callable[[Shaped[Array, "n ..."], Key[Array, ""]], Shaped[Array, "m ..."]]
    times: int


def methods_of(name: str, steps: int | None = None) -> tuple[Method, ...]:
    """The methods of a reconstruction, in order; none where it looks at no images.

    Args:
      name: one of `RECONSTRUCTIONS`.
      steps: of a unit, instead of the paper's.

    Raises:
      UsageError: for another name, or steps where there are none or below 1.
    """
    check_method("reconstruction", name, RECONSTRUCTIONS)
    if steps is not None and (steps < 1 or name not in LEARNED):
        able = f"takes steps >= 1, got {steps}" if name in LEARNED else "takes no steps"
        raise UsageError(f"reconstruction {name!r} {able}.")
    if name == "nearest" or name in PLACED:
        return ()
    if name == "closed_form":
        return (ClosedForm(),)
    return (LEARNED[name](**({} if steps is None else {"steps": steps})),)


def learns_in_stages(methods: Sequence[Method]) -> bool:
    """Whether one of them trains stages of the network, guided by their blocks."""
    return any(isinstance(method, Reconstruction) and method.guided for method in methods)


def enlarges(name: str, read: Input) -> Enlarge | None:
    """What a reconstruction makes of its images first, for a network that reads such images.

    Papers say how many images theirs take. Of large images a few have all the positions that layers
    in closed form need, and what deep layers make of the mean of two is like nothing they make of
    one: on EfficientNet-lite0 at 4 bits it costs six points (`docs/RESULTS.md`). Late stages that
    learn by gradient need more: `surfaces`.
    """
    if not isinstance(read, InputContract):
        return None  # means of ids are none
    if name in OURS and is_small(read):
        return ENLARGED
    return Enlarge(partial(surfaces, read), 2 * (1 + VIEWS)) if name == "stages" else None


def enlarged(images: Shaped[Array, "n ..."], key: Key[Array, ""]) -> Shaped[Array, "m ..."]:
    """The images, their mirror images, and as many means of pairs of both: four times as many.

    What a network says of these is known as well, and they show it more than a few images do: on
    ResNet-20 at 2 bits they are worth more than four times as many images of their own
    (`docs/RESULTS.md`).
    """
    both = jnp.concatenate([images, images[:, :, ::-1]])
    other = jax.random.permutation(key, len(both))
    return jnp.concatenate([both, (both + both[other]) / 2])


ENLARGED = Enlarge(enlarged, 4)


def surfaces(
    contract: InputContract, images: Shaped[Array, "n ..."], key: Key[Array, ""]
) -> Shaped[Array, "m ..."]:
    """The images, parts of each, and collages of all these: eight times as many.

    Parts show at least `LEAST_SEEN` of an image, mirrored or not, and are as smooth as photographs;
    collages have their edges, and their surfaces without texture (`synthesis.sources.collages`).
    """
    shown = compose(resized_crop(smallest=LEAST_SEEN, attempts=0), flip(together=False))
    natural = to_natural(images, contract)
    parts = [shown(jax.random.fold_in(key, i), natural) for i in range(VIEWS)]
    whole = jnp.concatenate([natural, *parts])
    cut = collage()(jax.random.fold_in(key, VIEWS), whole)
    return from_natural(jnp.concatenate([whole, cut]), contract)


def foretold(made: Quantized, count: int, methods: Sequence[Method], memory: int | None) -> int:
    """Bytes that `reconstructed` will take beyond what is there, for so many images.

    Args:
      made: calibrated.
      count: images, those of `enlarges` included.
      methods: one after the other.
      memory: bytes that a step may take.
    """
    given = (made.reference, made.quantized.plan, count)
    return max((footprint(*given, method, memory).total for method in methods), default=0)


def reconstructed(
    made: Quantized,
    images: Shaped[Array, "n ..."],
    methods: Sequence[Method],
    key: Key[Array, ""],
    *,
    enlarge: Enlarge | None = None,
    memory: int | None = None,
    place: Place = NOWHERE,
    watch: Watcher = SILENT,
) -> tuple[Quantized, tuple[UnitReport, ...]]:
    """A quantized network after learned rounding.

    Args:
      made: calibrated, biases as they were in float.
      images: normalised.
      methods: one after the other.
      key: the only source of randomness.
      enlarge: what is made of the images first.
      memory: bytes that a step may take; see `reconstruction.engine`.
      place: keeps finished units here and resumes from them.
      watch: told how far the steps of a unit are, and of each unit that is done.

    Returns:
      The network with kernels on their grids, and how each unit fared under each method.

    Raises:
      UsageError: if `place` belongs to another run, or is in use.
    """
    if enlarge is not None:
        images = enlarge.make(images, jax.random.fold_in(key, MIXING))
    quantized, reports, pixels = made.quantized, (), np.asarray(images)
    for number, method in enumerate(methods):
        own, inside = jax.random.fold_in(key, number), place / f"reconstruction-{number}"
        given = (quantized, made.reference, pixels, method, own)
        quantized, found = reconstruct(*given, memory=memory, place=inside, watch=watch)
        reports += found
    return made._replace(quantized=guard_biases(quantized), used_images=True), reports
