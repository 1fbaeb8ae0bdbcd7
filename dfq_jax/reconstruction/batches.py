"""What the steps of a unit read: batches drawn from all images.

Where the device has room, all images' data lie there and steps are told which of them to read;
else batches are gathered in host memory, a chunk of steps at a time.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dfq_jax.graph.evaluate import Tensor

MOST_STEPS = 50
"""Steps fed to the device at a time."""

Chosen = Int[Array, " b"]


class Rows(NamedTuple):
    """What steps read.

    Attributes:
      exact: inputs in the float network.
      rough: inputs in the quantized network.
      targets: outputs in the float network.
      slopes: of the divergence of predictions by the outputs.
      logits: the float prediction.
    """

    exact: Tensor
    rough: Tensor
    targets: Tensor
    slopes: Tensor | None = None
    logits: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(v.nbytes for v in jax.tree.leaves(self))


class Supply(NamedTuple):
    """How steps come by their rows.

    Attributes:
      resident: the rows of all images, on the device; None where they are fed.
      feed: (first step, how many) -> which images each step reads, or their rows.
      chunk: most steps at a time.
    """

    resident: Rows | None
    feed: Callable[[int, int], Rows | Int[np.ndarray, "steps b"]]
    chunk: int


def supply(rows: Rows, batch: int, seed: int, memory: int) -> Supply:
    """How the steps of a run come by their rows.

    Args:
      rows: of all images, in host memory.
      batch: images a step, without repetition where there are as many.
      seed: of the draws; those of a step depend on nothing else.
      memory: bytes that the device may hold of them.

    Returns:
      The supply; whichever way, steps read the same.
    """
    draw = partial(drawn, len(rows.exact), batch, seed)
    if rows.nbytes <= memory:
        return Supply(jax.tree.map(jnp.asarray, rows), draw, MOST_STEPS)
    each = max(rows.nbytes // len(rows.exact), 1) * batch
    chunk = int(np.clip(memory // each, 1, MOST_STEPS))
    return Supply(None, partial(gathered, rows, draw, cache(partial(space, rows, batch))), chunk)


def drawn(count: int, batch: int, seed: int, step: int, length: int) -> Int[np.ndarray, "steps b"]:
    """Which of `count` images some steps read."""
    draw = lambda i: np.random.default_rng([seed, i]).choice(count, batch, replace=count < batch)
    return np.stack([draw(i) for i in range(step, step + length)]).astype(np.int32)


def space(rows: Rows, batch: int, length: int) -> Rows:
    """Room for the rows of some steps."""
    return jax.tree.map(lambda v: np.empty((length * batch, *v.shape[1:]), v.dtype), rows)


def gathered(
    rows: Rows,
    draw: Callable[[int, int], Int[np.ndarray, "steps b"]],
    room: Callable[[int], Rows],
    step: int,
    length: int,
) -> Rows:
    """The rows of some steps, on the device.

    They are gathered where those of the last steps were: fresh memory costs ten times the copy.
    """
    chosen = draw(step, length)

    def copied(source: np.ndarray, target: np.ndarray) -> Array:
        np.take(source, chosen.reshape(-1), axis=0, out=target, mode="clip")
        return jnp.array(target.reshape(*chosen.shape, *source.shape[1:]), copy=True)

    return jax.tree.map(copied, rows, room(length))


def read_rows(resident: Rows | None, entry: Rows | Chosen) -> Rows:
    """What one step reads, from what it was fed."""
    if isinstance(entry, Rows):
        return entry
    if resident is None:
        raise ValueError("read() got numbers of images, and no images lie on the device.")
    return jax.tree.map(lambda v: v.at[entry].get(mode="promise_in_bounds"), resident)
