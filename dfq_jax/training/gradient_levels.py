"""Layers whose gradients lie on few bits, as integer hardware would multiply them.

Both products of a layer's backward pass read the same rounded gradient (Zhu et al. 2020, Unified
INT8 training; formulas in `numerics/gradient_grids.py`). What its parameters learn is multiplied by
phi, which an optimizer that divides by the size of gradients, as Adam does, undoes: take SGD.
"""

import zlib
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Key

from dfq_jax.graph.evaluate import Apply
from dfq_jax.graph.graph import Node
from dfq_jax.graph.ops import WEIGHTED
from dfq_jax.graph.semantics import Slots, Tensor
from dfq_jax.numerics.gradient_grids import counteracted_rate, gradient_on_grid


def with_gradients_on(apply: Apply, bits: int, key: Key[Array, ""]) -> Apply:
    """How nodes are computed, with the gradients of those that have kernels on a grid.

    Args:
      apply: how they are computed; hashable.
      bits: of the gradients.
      key: of the draws; each layer has its own.
    """

    def applied(node: Node, slots: Slots, args: tuple[Tensor, ...]) -> Tensor:
        if not isinstance(node.op, WEIGHTED):
            return apply(node, slots, args)
        own = jax.random.fold_in(key, zlib.crc32(node.name.encode()))
        return layer(apply, node, bits, jax.random.key_data(own), slots, args)

    return applied


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def layer(
    apply: Apply, node: Node, bits: int, seed: Array, slots: Slots, args: tuple[Tensor, ...]
) -> Tensor:
    """A layer as it is; backwards, `layer_backward`."""
    return apply(node, slots, args)


def layer_forward(
    apply: Apply, node: Node, bits: int, seed: Array, slots: Slots, args: tuple[Tensor, ...]
):
    """The layer, and what its gradients need."""
    made, back = jax.vjp(lambda s, a: apply(node, s, a), slots, args)
    return made, (back, seed)


def layer_backward(apply: Apply, node: Node, bits: int, saved, gradient: Tensor):
    """Gradients by nothing, the parameters and the arguments."""
    back, seed = saved
    rounded, turned = gradient_on_grid(gradient, bits, jax.random.wrap_key_data(seed))
    by_slots, by_args = back(rounded)
    phi = counteracted_rate(turned)
    nothing = np.zeros(seed.shape, jax.dtypes.float0)
    return nothing, jax.tree.map(lambda g: phi * g, by_slots), by_args


layer.defvjp(layer_forward, layer_backward)
