"""A task in numbers: what is measured of an output, and what a change of it costs.

`fidelity` tells people, in the measure of the task; `output_cost` is differentiable and in nats
(for directions in units of the cosine), so that bits can be chosen by it; `cost_probe` draws from
its curvature.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dfq_jax.graph.evaluate import Hook, Tensor, evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.graph.heads import Part
from dfq_jax.graph.tasks import Embedding, ImageToImage, LanguageModel, Task
from dfq_jax.numerics.gaps import (
    cosine_gap,
    cosine_probe,
    normal_divergence,
    normal_probe,
)
from dfq_jax.numerics.measures import cosines, next_token_divergences, psnr
from dfq_jax.numerics.softmax import curvature_probe, divergence

MEASURES: Mapping[type, str] = {
    ImageToImage: "psnr_db",
    Embedding: "cosine",
    LanguageModel: "divergence_nats",
}
"""{task: name of its own measure}; others have agreement and SQNR alone."""


class Fidelity(NamedTuple):
    """A measure of some images; those of others add up.

    Attributes:
      total: sum over all that is measured.
      number: images, vectors or tokens.
    """

    total: float = 0.0
    number: int = 0

    def plus(self, other: "Fidelity") -> "Fidelity":
        """Both together."""
        return Fidelity(self.total + other.total, self.number + other.number)

    @property
    def mean(self) -> float | None:
        """Of all; None where nothing was measured."""
        return self.total / self.number if self.number else None


def fidelity(
    task: Task, exact: Float[np.ndarray, "n ..."], rough: Float[np.ndarray, "n ..."]
) -> Fidelity:
    """The measure of a task between two outputs; nothing of a task without one, or another shape.

    Args:
      task: what the network is for.
      exact: a part of the float network's output; for a language model before the softmax.
      rough: of the quantized one.
    """
    match task:
        case ImageToImage() if exact.ndim == 4 and (exact.shape[-1] == 3 or not task.luma):
            how = {"low": task.low, "high": task.high, "luma": task.luma}
            found = psnr(exact, rough, border=task.border, rounded=task.rounded, **how)
        case Embedding() if exact.ndim > 1:
            found = cosines(exact, rough)
        case LanguageModel() if exact.ndim > 1:
            found = next_token_divergences(exact, rough)
        case _:
            return Fidelity()
    return Fidelity(float(np.sum(found)), found.size)


PartValues = tuple[Tensor, ...]
"""The parts of a network's outputs, each before its final softmax or sigmoid."""


def parts_outputs(
    model: Model, x: Tensor, parts: tuple[Part, ...], hook: Hook | None = None
) -> PartValues:
    """Every part of the outputs, before softmax or sigmoid, batch first; traceable."""
    wanted = {part.tensor for part in parts}
    _, values = evaluate(model, x, taps=wanted, hook=hook)
    return tuple(picked(part, values[part.tensor]) for part in parts)


def picked(part: Part, values: Tensor) -> Tensor:
    """A part out of its tensor; all of it as it is."""
    whole = part.source.shape == values.shape[1:] and np.array_equal(
        part.source.reshape(-1), np.arange(part.source.size)
    )
    return values if whole else values.reshape(len(values), -1)[:, part.source]


Cost = Callable[[Tensor, Tensor], Float[Array, ""]]
Probe = Callable[[Key[Array, ""], Tensor], Tensor]


class Curved(NamedTuple):
    """What a change costs, and the draw from its curvature."""

    cost: Cost
    probe: Probe


def curved_by(task: Task | None, part: Part) -> Curved:
    """How a change of a part counts: as its decisions do, or its direction, or its values."""
    if isinstance(task, Embedding):
        return Curved(cosine_gap, cosine_probe)
    if part.kind == "values":
        return Curved(normal_divergence, normal_probe)
    return Curved(divergence, curvature_probe)


def classes_last(part: Part, values: Tensor) -> Tensor:
    """A part with its classes along the last axis; of signs each is one score."""
    if part.kind == "signs" and values.shape[-1] != 1:
        return values[..., None]
    return values if part.axis is None else jnp.moveaxis(values, part.axis + 1, -1)


def classes_back(part: Part, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `classes_last` changed, in its own shape."""
    return values.reshape(shape) if part.axis is None else jnp.moveaxis(values, -1, part.axis + 1)


def output_cost(
    parts: tuple[Part, ...], exact: PartValues, rough: PartValues, task: Task | None
) -> Float[Array, ""]:
    """What all parts have moved, summed."""
    moved = zip(parts, exact, rough, strict=True)
    each = [
        curved_by(task, part).cost(*(classes_last(part, v) for v in (a, b))) for part, a, b in moved
    ]
    return sum(each, jnp.zeros(()))


def cost_probe(
    parts: tuple[Part, ...], key: Key[Array, ""], outputs: PartValues, task: Task | None
) -> PartValues:
    """A draw `r` of each part with `E[r r^T]` the Hessian of `output_cost` at no change."""
    keys = jax.random.split(key, len(outputs))
    found = []
    for part, k, values in zip(parts, keys, outputs, strict=True):
        drawn = curved_by(task, part).probe(k, classes_last(part, values))
        found.append(classes_back(part, drawn, values.shape))
    return tuple(found)
