"""What synthetic images must match: batch-norm statistics, and how a batch measures up to them."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, PyTree

from dfq_jax.base.words import Precision
from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.cuts import blocks
from dfq_jax.graph.evaluate import Apply, Hook, apply_node, apply_tiled, evaluate
from dfq_jax.graph.graph import Edge, Graph, Model, Node
from dfq_jax.graph.query import batch_norms
from dfq_jax.graph.semantics import Slots, Tensor


@partial(jax.tree_util.register_dataclass, data_fields=["mean", "var"], meta_fields=["positions"])
@dataclasses.dataclass(frozen=True)
class Stats:
    """Per-sample statistics of one tensor over its positions.

    Attributes:
      mean: Float[b c].
      var: biased variance, Float[b c].
      positions: how many values each statistic summarises (static).
    """

    mean: Float[Array, "b c"]
    var: Float[Array, "b c"]
    positions: int


class Target(NamedTuple):
    """Moments one batch norm recorded, and which of its channels can be trusted."""

    mean: Float[Array, " c"]
    var: Float[Array, " c"]
    usable: Bool[Array, " c"]


Targets = Mapping[str, Target]


@dataclasses.dataclass(frozen=True)
class Unusable:
    """A batch norm whose statistics say nothing, wholly or in part."""

    node: str
    channels: int
    of: int
    reason: str

    def __str__(self) -> str:
        """One line for a person."""
        return f"{self.node}: {self.channels} of {self.of} channels excluded ({self.reason})"


def recorded_statistics(model: Model) -> tuple[dict[str, Target], tuple[Unusable, ...]]:
    """What the batch norms of an unfolded network recorded, as far as it is usable.

    Channels with a variance that is zero, negative or not finite are masked; layers that were
    never trained (all means 0, all variances 1) or have no channel left are dropped.

    Args:
      model: network with its batch norms in place.

    Returns:
      {batch norm node: target}, empty for a network without batch norm, and what was excluded.
    """
    targets: OrderedDict[str, Target] = OrderedDict()  # a plain dict loses its order under `jit`
    excluded: list[Unusable] = []
    for node in batch_norms(model.graph):
        slots = model.params[node.name]
        mean, var = np.asarray(slots["mean"]), np.asarray(slots["var"])
        usable = np.isfinite(mean) & np.isfinite(var) & (var > 0)
        if np.all(mean == 0) and np.all(var == 1):
            excluded.append(Unusable(node.name, mean.size, mean.size, "never updated in training"))
            continue
        if not usable.all():
            bad = int((~usable).sum())
            excluded.append(Unusable(node.name, bad, mean.size, "variance not positive"))
        if usable.any():
            safe = np.where(usable, var, 1.0).astype(np.float32)
            centre = np.where(usable, mean, 0.0).astype(np.float32)
            targets[node.name] = Target(*map(jax.device_put, (centre, safe, usable)))
    return targets, tuple(excluded)


def batch_norm_targets(model: Model) -> tuple[dict[str, Target], tuple[Unusable, ...]]:
    """`recorded_statistics` of a network that has some.

    Raises:
      UnsupportedModelError: if no usable statistics are left, as in a network without batch norm.
    """
    targets, excluded = recorded_statistics(model)
    if not targets:
        count = len(batch_norms(model.graph))
        raise UnsupportedModelError(
            f"synthesis from batch-norm statistics is not available for this network: it has "
            f"{count} batch norms, none with usable statistics. Calibrate with images of your own "
            "(`images=`), or re-export the network with its batch norms in place."
        )
    return targets, excluded


def distrusted_norms(model: Model) -> frozenset[str]:
    """Batch norms whose statistics say nothing in any channel."""
    targets, _ = recorded_statistics(model)
    return frozenset(n.name for n in batch_norms(model.graph) if n.name not in targets)


def sample_stats(x: Tensor, centre: Float[Array, " c"]) -> Stats:
    """Mean and variance of each sample and channel, in one pass over `x`.

    Moments are taken about `centre`, a value close to the mean, which keeps
    `E[x^2] - E[x]^2` from cancelling.

    Args:
      x: activations, Float[b ... c].
      centre: any constants per channel; the batch norm's mean is ideal.

    Returns:
      Statistics over all axes but the first and last, float32.
    """
    shifted = x.astype(jnp.float32) - centre
    axes = tuple(range(1, x.ndim - 1))
    first = jnp.mean(shifted, axes)
    second = jnp.mean(shifted * shifted, axes)
    positions = x.size // (x.shape[0] * x.shape[-1])
    return Stats(first + centre, jnp.maximum(second - first**2, 0.0), positions)


class Seen(NamedTuple):
    """What one forward pass shows.

    Attributes:
      logits: the first output.
      stats: {batch norm: statistics of its input}.
      taps: {node: its first argument}, of those asked for.
    """

    logits: Tensor
    stats: dict[str, Stats]
    taps: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Forward:
    """How a forward pass is computed; what it computes is the same.

    Attributes:
      dtype: of weights and activations; statistics are float32 whatever it is.
      parts: equal parts of a batch that go through the network one after the other; what the
        gradient needs of a part is computed again when its turn comes, so memory shrinks with it.
      remat: keep only the tensors between blocks for the gradient, and compute the rest again.
      memory: bytes that a step may take on one device, or on a CPU in all; a run foretells what it
        needs, and takes as many parts as that asks for. None for as many as `parts` says.
      tiles: let a CPU convolve by tiles in float32, faster and off by 1e-5 of the largest value.
    """

    dtype: Precision = "float32"
    parts: int = 1
    remat: bool = False
    memory: int | None = None
    tiles: bool = True


PLAIN = Forward()


def observe(
    model: Model,
    targets: Targets,
    images: Float[Array, "b h w c"],
    *,
    taps: Sequence[str] = (),
    hook: Hook | None = None,
    how: Forward = PLAIN,
) -> Seen:
    """One forward pass: logits, statistics of the input of every targeted batch norm, and taps.

    Args:
      model: the network.
      targets: which batch norms to watch.
      images: normalised.
      taps: nodes whose first arguments are wanted.
      hook: of the network, see `evaluate`.
      how: precision, and what to do about memory.

    Returns:
      What it shows.

    Raises:
      ValueError: if the images do not divide into equal parts.
    """
    if how.dtype != "float32":
        model = dataclasses.replace(model, params=cast(model.params, how.dtype))

    apply = apply_tiled if how.tiles else apply_node
    if how.remat:
        apply = keep_cuts(model.graph, apply)

    def look(images: Tensor) -> Seen:
        wanted = [Edge(name) for name in (*targets, *taps)]
        outputs, tapped = evaluate(
            model, images.astype(how.dtype), taps=wanted, hook=hook, apply=apply
        )
        stats = {k: sample_stats(tapped[Edge(k)], targets[k].mean) for k in targets}
        return Seen(outputs[0].astype(jnp.float32), stats, {k: tapped[Edge(k)] for k in taps})

    if how.remat:
        look = jax.checkpoint(look, policy=jax.checkpoint_policies.save_only_these_names(CUT))
    if how.parts == 1:
        return look(images)
    if images.shape[0] % how.parts:
        raise ValueError(f"{images.shape[0]} images do not divide into {how.parts} equal parts.")
    return in_parts(look if how.remat else jax.checkpoint(look), images, how.parts)


def in_parts(look: Callable[[Tensor], Seen], images: Float[Array, "b h w c"], parts: int) -> Seen:
    """What `look` sees of equal parts of a batch, one after the other, in the order of the batch.

    Each part takes rows from all over the batch, so that devices that share it share every part.
    """
    pieces = images.reshape(-1, parts, *images.shape[1:]).swapaxes(0, 1)
    structure: list[Any] = []

    def leaves(piece: Tensor) -> list[Tensor]:
        seen, found = jax.tree.flatten(look(piece))
        structure.append(found)
        return seen

    whole = lambda v: v.swapaxes(0, 1).reshape(-1, *v.shape[2:])
    merged = jax.tree.map(whole, jax.lax.map(leaves, pieces))
    return jax.tree.unflatten(structure[-1], merged)


def cast(params: PyTree, dtype: str) -> PyTree:
    """Floating-point leaves in another precision."""
    floats = lambda v: jnp.issubdtype(v.dtype, jnp.floating)
    return jax.tree.map(lambda v: v.astype(dtype) if floats(v) else v, params)


CUT = "between blocks"


def keep_cuts(graph: Graph, apply: Apply) -> Apply:
    """The semantics of `apply`, with the tensors between blocks marked as those to keep."""
    cuts = {block.names[-1] for block in blocks(graph)}

    def marked(node: Node, slots: Slots, args: tuple[Tensor, ...]) -> Tensor:
        out = apply(node, slots, args)
        return checkpoint_name(out, CUT) if node.name in cuts else out

    return marked
