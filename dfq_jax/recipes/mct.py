"""MCT: smoothed images, all of which together match the statistics, optimised in turn.

Dikstein et al. 2025, "Data Generation for Hardware-Friendly Post-Training Quantization" (DGH), and
the data generation of Sony's Model Compression Toolkit (MCT).
"""

from collections.abc import Mapping
from typing import Literal

import jax
import optax
from jaxtyping import Array, Float, Key, PyTree

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.optim.schedules import rated, reduce_on_plateau
from dfq_jax.synthesis.recipe import Memory, Recipe, Source, Stage
from dfq_jax.synthesis.sources.augment import (
    Sized,
    blur,
    centre_crop,
    compose,
    flip,
    random_crop,
)
from dfq_jax.synthesis.sources.pixels import Images, gaussian
from dfq_jax.synthesis.terms.aggregate import (
    aggregate_match,
    empty_table,
    outlying,
    output_range,
    refreshed,
    row_of,
)
from dfq_jax.synthesis.terms.base import Observed, Term
from dfq_jax.synthesis.terms.targets import Target, Targets
from dfq_jax.values import bound

Variant = Literal["paper", "code"]


def mct(
    *,
    variant: Variant = "paper",
    steps: int = 1000,
    batch: int = 128,
    learning_rate: float = 16.0,
    output: float | None = None,
    margin: int | None = None,
    sigma: float = 1.25,
) -> Recipe:
    """DGH's or MCT's images.

    Args:
      variant: `paper`: DGH, deviations count ten times, images far from the statistics of the last
        batch norm cost extra; `code`: MCT, neither.
      steps: RAdam steps of each batch (MCT: 500).
      batch: images optimised together (MCT: 32); all batches share their statistics.
      learning_rate: of RAdam, in natural units; halved on plateaus of 1/50 of the steps. As
        released; steps this large take pixels to their bounds until it has been halved often.
      output: weight of the range of outputs; by default 3e-7 (DGH for ResNet-18) or 1e-5 (MCT).
      margin: by how much canvases are larger than images; by default 32 (DGH) or 64 (MCT).
      sigma: of the blur.

    Returns:
      The recipe.
    """
    paper = variant == "paper"
    weight = {"paper": 3e-7, "code": 1e-5}[variant] if output is None else output
    room = {"paper": 32, "code": 64}[variant] if margin is None else margin
    confidence = confident_but_typical if paper else confident
    optimizer = rated(radam_with_plateau, learning_rate, steps=steps)
    return Recipe(
        name="mct",
        settings={
            "variant": variant,
            "learning_rate": learning_rate,
            "output": weight,
            "margin": room,
            "sigma": sigma,
        },
        batch=batch,
        source=canvas(room, sigma),
        stages=(
            Stage(steps, optimizer, compose(flip(), blur(sigma), bound(crop_at_random, room))),
        ),
        terms=(
            Term("batch norm", 1.0, bound(aggregate_match, spread=10.0 if paper else 1.0)),
            Term("output", weight, confidence),
        ),
        prepare=last_target,
        watch=image_itself,
        memory=all_batches(),
        turns=True,
        bounded=True,
    )


def all_batches() -> Memory:
    """The moments of the finished images of every batch."""
    return Memory(
        start=no_moments_yet,
        step=with_moments,
        finished=True,
    )


def no_moments_yet(targets: Targets, turns: int, classes: int, sizes: Mapping[str, int]) -> PyTree:
    """An empty table of the moments of all batches."""
    del classes
    return empty_table(targets, turns, sizes["image"])


def with_moments(observed: Observed) -> PyTree:
    """The table with those of the batch whose turn it is."""
    return refreshed(observed.memory, observed.turn, row_of(observed))


def image_itself(graph: Graph) -> dict[str, str]:
    """What the first layer reads."""
    return {"image": first_reader(graph)}


def canvas(margin: int, sigma: float) -> Source:
    """Gaussian noise beyond the edges of the images, which are its blurred middle."""
    return Source(bound(larger_noise, margin), finish=bound(smooth_middle, margin, sigma))


def larger_noise(margin: int, key: Key[Array, ""], shape: tuple[int, ...]) -> Sized:
    """Gaussian noise, so much higher and wider than asked for."""
    b, h, w, c = shape
    return gaussian(key, (b, h + margin, w + margin, c))


def smooth_middle(margin: int, sigma: float, images: Images) -> Sized:
    """What is within the margin of blurred images."""
    smooth = blur(sigma)(jax.random.key(0), images)
    return centre_crop(smooth, *inside(images, margin))


def crop_at_random(margin: int, key: Key[Array, ""], images: Images) -> Sized:
    """A window smaller by `margin` at a random place, the same for the whole batch."""
    return random_crop(*inside(images, margin))(key, images)


def inside(canvases: Images, margin: int) -> tuple[int, int]:
    """Height and width of what is within a margin in all."""
    return canvases.shape[1] - margin, canvases.shape[2] - margin


def radam_with_plateau(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """RAdam, halved on plateaus down to 1e-4; each cut forgets the best loss so far."""
    rule = reduce_on_plateau(
        factor=0.5, patience=steps // 50, floor=1e-4 / learning_rate, forget=True
    )
    return optax.chain(optax.radam(learning_rate), rule)


def first_reader(graph: Graph) -> str:
    """The first node whose first argument is the image.

    Raises:
      UnsupportedModelError: if there is none.
    """
    for node in graph.nodes:
        if node.inputs[:1] == graph.inputs[:1]:
            return node.name
    raise UnsupportedModelError(f"no node of this network reads {graph.inputs[0]!r} first.")


def last_target(model: Model, targets: Targets, key: Key[Array, ""]) -> dict[str, Target]:
    """The last batch norm with usable statistics; dictionaries lose their order under `jit`."""
    del model, key
    return {name: targets[name] for name in list(targets)[-1:]}


def confident(observed: Observed) -> Float[Array, ""]:
    """Less, the wider the range of outputs."""
    return -output_range(observed.logits)


def confident_but_typical(observed: Observed) -> Float[Array, ""]:
    """The same, with a price on images far from the statistics of the last batch norm."""
    ((name, target),) = observed.shared.items()
    return confident(observed) + outlying(observed.stats[name], target)
