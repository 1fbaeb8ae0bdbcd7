"""The network as data: `Graph` (static) plus `Params` (arrays) make a `Model`."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property, partial, reduce
from typing import Any, NamedTuple

import jax
from jaxtyping import Float

from dfq_jax.errors import GraphError, UnsupportedModelError
from dfq_jax.graph.ops import Op
from dfq_jax.types import UNNAMED, Input, InputContract, Moments, SourceNames, in_words

Params = Mapping[str, Mapping[str, Float[Any, "..."]]]
"""{node name: {slot: array of JAX or NumPy}}: a plain dict pytree that crosses every `jit`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One operation with one output.

    Attributes:
      name: unique; the PyTorch module path where there is one; also the key into `Params`.
      op: what it computes.
      inputs: names of the nodes or graph inputs it reads, in argument order.
    """

    name: str
    op: Op
    inputs: tuple[str, ...]

    def __str__(self) -> str:
        """One readable line: `name = Op(args)(inputs)`."""
        return f"{self.name} = {self.op!r} <- {', '.join(self.inputs)}"


class Edge(NamedTuple):
    """What a node reads: its argument of that number."""

    node: str
    argument: int = 0

    def __str__(self) -> str:
        """As it is told in a message."""
        return f"argument {self.argument} of {self.node!r}"


@dataclasses.dataclass(frozen=True)
class Graph:
    """Single-assignment, topologically ordered, immutable and hashable."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises GraphError on a read before its definition or a name used twice."""
        seen = set(self.inputs)
        for node in self.nodes:
            if missing := [i for i in node.inputs if i not in seen]:
                raise GraphError(f"node {node.name!r} reads {missing}, not defined before it.")
            if node.name in seen:
                raise GraphError(f"duplicate node name {node.name!r}.")
            seen.add(node.name)
        if missing := [o for o in self.outputs if o not in seen]:
            raise GraphError(f"graph outputs {missing} are defined by no node.")

    def __str__(self) -> str:
        """One line a node."""
        return "\n".join(str(n) for n in self.nodes)

    def __getitem__(self, name: str) -> Node:
        """The node called `name`; KeyError if there is none."""
        return self.by_name[name]

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        """{name: node}, in execution order."""
        return {node.name: node for node in self.nodes}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "moments"],
    meta_fields=["graph", "inputs", "names"],
)
@dataclasses.dataclass(frozen=True)
class Model:
    """A network: static graph, traced parameters, and what is known about its tensors.

    Attributes:
      graph: the static structure.
      params: {node: {slot: array}}.
      inputs: what each input of the graph must be, in its order; empty for a piece of a network,
        which reads tensors of that.
      moments: {node: Moments of that node's output}, filled when batch norm is folded and kept
        true by every pass that rescales channels.
      names: what exported files call the input and the outputs, where its source says it.
    """

    graph: Graph
    params: Params
    inputs: tuple[Input, ...]
    moments: Mapping[str, Moments] = dataclasses.field(default_factory=dict)
    names: SourceNames = UNNAMED

    def __post_init__(self) -> None:
        """Raises GraphError unless all inputs of the graph are stated, or none."""
        if self.inputs and len(self.inputs) != len(self.graph.inputs):
            raise GraphError(f"inputs {self.graph.inputs} are stated by {in_words(self.inputs)}.")

    @property
    def input(self) -> Input:
        """What the one input must be that the network reads.

        Raises:
          UnsupportedModelError: naming what it reads, where that is not one input.
        """
        if len(self.inputs) == 1:
            return self.inputs[0]
        raise UnsupportedModelError(
            f"this works with networks of one input; inputs {self.graph.inputs} are "
            f"{in_words(self.inputs)}. Import a network that reads one."
        )

    @property
    def contract(self) -> InputContract:
        """What the image must be that the network reads, and that is all it reads.

        Raises:
          UnsupportedModelError: naming what it reads, where that is not one image.
        """
        if len(self.inputs) == 1 and isinstance(self.inputs[0], InputContract):
            return self.inputs[0]
        raise UnsupportedModelError(
            f"this works with networks that read one image; inputs {self.graph.inputs} are "
            f"{in_words(self.inputs)}. Quantize it through examples of its inputs, or import a "
            "network of one image."
        )


Pass = Callable[[Model], Model]
"""A rewrite of a network. Unless its name says otherwise it keeps the function computed."""


def compose(*passes: Pass) -> Pass:
    """The pass that applies `passes` from left to right."""
    return lambda model: reduce(lambda m, p: p(m), passes, model)
