"""Statistics of all batches together: a table with a row of moments for each, refreshed in turn.

Batches that take turns need not each have the recorded statistics, as long as all of them together
have. The one whose turn it is contributes what the network is shown now, and only this is
differentiated; the others contribute what their finished images last gave.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.synthesis.recipe import Memory
from dfq_jax.synthesis.terms.base import EPS, Observed
from dfq_jax.synthesis.terms.match import Gap, sample_std_gap, usable_gap
from dfq_jax.synthesis.terms.targets import Stats, Target, Targets

IMAGE = "(images)"
"""What the images themselves are called among the batch norms."""


class ShiftedMoments(NamedTuple):
    """Means of `x - c` and `(x - c)^2` per channel, c being close to the mean of x.

    About such a constant `second - first^2`, the variance, does not cancel.
    """

    first: Float[Array, "... c"]
    second: Float[Array, "... c"]


class MomentTable(NamedTuple):
    """Moments of every batch.

    Attributes:
      rows: {batch norm or `IMAGE`: moments, one row a batch}.
      seen: which rows are filled.
    """

    rows: Mapping[str, ShiftedMoments]
    seen: Bool[Array, " turns"]


def empty_table(targets: Targets, turns: int, channels: int) -> MomentTable:
    """A table before the first step.

    Args:
      targets: recorded moments.
      turns: batches.
      channels: of an image.

    Returns:
      Rows of zeros, none of them seen.
    """
    widths = {name: target.mean.shape[0] for name, target in targets.items()}
    zeros = lambda width: ShiftedMoments(jnp.zeros((turns, width)), jnp.zeros((turns, width)))
    rows = {name: zeros(width) for name, width in {**widths, IMAGE: channels}.items()}
    return MomentTable(rows, jnp.zeros(turns, bool))


def moments_about(stats: Stats, centre: Float[Array, " c"]) -> ShiftedMoments:
    """Moments of a batch about constants, from the statistics of its samples."""
    shifted = stats.mean - centre
    return ShiftedMoments(jnp.mean(shifted, 0), jnp.mean(stats.var + shifted**2, 0))


def row_of(observed: Observed) -> dict[str, ShiftedMoments]:
    """The row of what is observed: batch norms about recorded means, images about 0."""
    rows = {k: moments_about(observed.stats[k], t.mean) for k, t in observed.targets.items()}
    natural = observed.natural
    return {
        **rows,
        IMAGE: ShiftedMoments(jnp.mean(natural, (0, 1, 2)), jnp.mean(natural**2, (0, 1, 2))),
    }


def refreshed(
    table: MomentTable, turn: Int[Array, ""], row: Mapping[str, ShiftedMoments]
) -> MomentTable:
    """The table with the row of one batch replaced."""
    put = lambda rows, new: rows.at[turn].set(new)
    return MomentTable(
        jax.tree.map(put, dict(table.rows), dict(row)), table.seen.at[turn].set(True)
    )


def together(table: MomentTable) -> dict[str, ShiftedMoments]:
    """Moments of all batches seen, which are of equal size."""
    seen = table.seen.astype(jnp.float32)[:, None]
    mean = lambda rows: jnp.sum(seen * rows, axis=0) / jnp.maximum(jnp.sum(seen), 1)
    return jax.tree.map(mean, dict(table.rows))


def aggregate_gaps(observed: Observed) -> dict[str, Gap]:
    """Mean and biased deviation of all batches less the recorded ones, images less 0 and 1.

    Args:
      observed: one forward pass of the batch `observed.turn`; its memory is a `MomentTable`.

    Returns:
      {batch norm or `IMAGE`: gap}; only what is observed now can be differentiated.

    Reference:
      Dikstein et al. 2025, "Data Generation for Hardware-Friendly Post-Training Quantization"
      (aggregated batch-norm alignment), released code.
    """
    table = refreshed(jax.lax.stop_gradient(observed.memory), observed.turn, row_of(observed))
    gaps = {}
    for name, (first, second) in together(table).items():
        target = standard(first) if name == IMAGE else observed.targets[name]
        std = jnp.sqrt(jnp.maximum(second - first**2, 0.0) + EPS)
        gaps[name] = usable_gap(first, std - jnp.sqrt(target.var), target)
    return gaps


def standard(like: Float[Array, " c"]) -> Target:
    """Mean 0 and variance 1 in every channel."""
    return Target(jnp.zeros_like(like), jnp.ones_like(like), jnp.ones(like.shape, bool))


def aggregate_match(observed: Observed, spread: float = 1.0) -> Float[Array, ""]:
    """Distance of the statistics of all batches to the recorded ones.

    Args:
      observed: as for `aggregate_gaps`.
      spread: factor of the deviations.

    Returns:
      The mean over batch norms and images of `||mean gap||^2 + spread ||std gap||^2`, divided by
      the number of channels in batch norms, not in images.

    Reference:
      Dikstein et al. 2025, released code.
    """
    values = []
    for name, gap in aggregate_gaps(observed).items():
        squares = gap.mean**2 + spread * gap.spread**2
        values.append(jnp.sum(squares) if name == IMAGE else jnp.mean(squares))
    return jnp.mean(jnp.stack(values))


def output_range(outputs: Float[Array, "b ..."]) -> Float[Array, ""]:
    """Mean over images of the largest less the smallest output: confidence without labels."""
    flat = outputs.reshape(outputs.shape[0], -1)
    return jnp.mean(jnp.max(flat, axis=1) - jnp.min(flat, axis=1))


def outlying(stats: Stats, target: Target, slack: float = 0.5) -> Float[Array, ""]:
    """How far single images are from recorded moments, beyond a slack.

    Args:
      stats: of one layer.
      target: what it recorded.
      slack: mean squared gap of an image that costs nothing.

    Returns:
      The mean over images of `[||mean gap||^2/C - slack]_+ + [||std gap||^2/C - slack]_+`.

    Reference:
      Dikstein et al. 2025, released code (regularisation of the output loss).
    """
    gap = sample_std_gap(stats, target)
    hinge = lambda v: jax.nn.relu(jnp.mean(v**2, axis=1) - slack)
    return jnp.mean(hinge(gap.mean) + hinge(gap.spread))


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


def confidence(observed: Observed) -> Float[Array, ""]:
    """Less, the wider the range of outputs."""
    return -output_range(observed.logits)


def typical_confidence(observed: Observed) -> Float[Array, ""]:
    """The same, with a price on images far from the statistics of the last batch norm."""
    ((name, target),) = observed.shared.items()
    return confidence(observed) + outlying(observed.stats[name], target)
