"""Norms by the statistics of a batch, as networks that learn from scratch have them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import BatchNorm
from dfq_jax.graph.rewrite import with_params
from dfq_jax.graph.semantics import Slots, Tensor


def by_batch(
    node: Node, slots: Slots, args: tuple[Tensor, ...]
) -> tuple[Slots, tuple[Tensor, ...]]:
    """A hook: batch norms take mean and biased variance of what they read, with its slopes."""
    if isinstance(node.op, BatchNorm):
        slots = {**slots, **batch_statistics(args[0])}
    return slots, args


def batch_statistics(x: Tensor) -> dict[str, Float[Array, " c"]]:
    """Mean and biased variance of each channel over images and positions."""
    axes = tuple(range(x.ndim - 1))
    return {"mean": jnp.mean(x, axes), "var": jnp.var(x, axes)}


def with_recorded_norms(model: Model, images: Float[Array, "n h w c"]) -> Model:
    """The network whose norms have the statistics that images show it, norm after norm.

    Args:
      model: which learned with norms by batch.
      images: normalised, all of one batch.
    """
    return with_params(model, recorded_statistics_of(model, images))


@jax.jit
def recorded_statistics_of(
    model: Model, images: Float[Array, "n h w c"]
) -> dict[str, dict[str, Array]]:
    """{norm: statistics of what it reads, where those before it have theirs}."""
    found: dict[str, dict[str, Array]] = {}

    def hook(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        if isinstance(node.op, BatchNorm):
            found[node.name] = batch_statistics(args[0])
        return by_batch(node, slots, args)

    evaluate(model, images, hook=hook)
    return found
