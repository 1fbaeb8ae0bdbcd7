"""What an architecture is: graph, input contract, and the parameters a checkpoint must hold."""

import dataclasses
from typing import Literal

from dfq_jax.graph.graph import Graph
from dfq_jax.types import InputContract

WeightLayout = Literal["vector", "conv", "linear"]
"""How PyTorch stores a parameter: (c), (out, in/groups, kh, kw) or (out, in)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of a PyTorch `state_dict`, and where it goes.

    Attributes:
      torch_name: its key in the `state_dict`.
      torch_shape: its shape there.
      node: the node that reads it.
      slot: the slot of that node.
      layout: the order of its axes in PyTorch.
      flattened: (channels, height, width) PyTorch flattened in that order to feed a linear layer;
        None where the input was flat, or for other layers.
    """

    torch_name: str
    torch_shape: tuple[int, ...]
    node: str
    slot: str
    layout: WeightLayout
    flattened: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network without its weights.

    Attributes:
      name: as in the catalog.
      graph: the structure.
      contract: what an input image must be.
      expected: every parameter, in execution order.
    """

    name: str
    graph: Graph
    contract: InputContract
    expected: tuple[Parameter, ...]
