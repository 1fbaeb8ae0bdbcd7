"""Data that an optimisation reads a chunk at a time, since it is too large for the device."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Int, PyTree


class Fed(NamedTuple):
    """A context together with what the steps of one chunk read.

    Attributes:
      context: the same for all steps.
      first: step of the first entry.
      data: arrays with one entry a step.
    """

    context: PyTree
    first: Int[Array, ""]
    data: PyTree

    def at(self, step: Int[Array, ""]) -> PyTree:
        """What one step reads."""
        return jax.tree.map(lambda v: v[step - self.first], self.data)
