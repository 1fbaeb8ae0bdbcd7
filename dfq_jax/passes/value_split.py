"""Value-aware quantization: the few large weights of a kernel lie in a layer of their own.

Park et al. 2018, "Value-aware Quantization for Training and Inference of Neural Networks": a small
share of values, the largest, keeps many bits, so that the grid of all others can be fine. Here of
weights alone, as two layers that read the same and are summed:

    y = x * w + b   ->   y = (x * small + b) + x * large,   small + large = w

`large` is almost all zeros, which the file stores like others; sums of two layers are rounded to 8
bits where a preset quantizes what sums read (`zsq_all_low` does not).
"""

import dataclasses
from math import ceil

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import WEIGHTED, Add
from dfq_jax.graph.rewrite import with_params

LARGE, SUM = ".large", ".sum"
"""What the names of a layer's second half, and of the sum of both, end in."""


def split_values(model: Model, share: float) -> Model:
    """Every layer with a kernel as two: its large weights apart from the others.

    Args:
      model: folded network.
      share: of the weights of each layer that are large, in [0, 1); rounded up.

    Returns:
      The same function; `moments` of a layer are those of the sum.

    Raises:
      UsageError: for another share.
    """
    if not 0 <= share < 1:
        raise UsageError(f"value-aware quantization takes a share in [0, 1), got {share}.")
    layers = [n for n in model.graph.nodes if isinstance(n.op, WEIGHTED)] if share else []
    if not layers:
        return model
    kernels = {}
    for node in layers:
        kernel = model.params[node.name]["kernel"]
        large = largest(kernel, share)
        kernels[node.name] = {"kernel": jnp.where(large, 0.0, kernel)}
        kernels[node.name + LARGE] = {"kernel": jnp.where(large, kernel, 0.0)}
    moved = {name + SUM if name in kernels else name: m for name, m in model.moments.items()}
    split = dataclasses.replace(model, graph=doubled(model.graph, layers), moments=moved)
    return with_params(split, kernels)


def largest(kernel: Float[Array, "..."], share: float) -> Bool[Array, "..."]:
    """Which weights are among so large a share of the largest."""
    sizes = jnp.abs(kernel)
    return sizes >= jnp.sort(sizes.reshape(-1))[-ceil(share * sizes.size)]


def doubled(graph: Graph, layers: list[Node]) -> Graph:
    """The graph with a second layer beside each of these, and the sum of both in its place."""
    sums = {node.name: node.name + SUM for node in layers}
    nodes: list[Node] = []
    for node in graph.nodes:
        inputs = tuple(sums.get(name, name) for name in node.inputs)
        nodes.append(dataclasses.replace(node, inputs=inputs))
        if node.name in sums:
            other = node.name + LARGE
            nodes.append(dataclasses.replace(node, name=other, inputs=inputs))
            nodes.append(Node(sums[node.name], Add(), (node.name, other)))
    return Graph(tuple(nodes), graph.inputs, tuple(sums.get(o, o) for o in graph.outputs))
