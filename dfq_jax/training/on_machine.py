"""Where a student learns: rows of a batch over several devices, and what layers multiply in.

What is computed stays the same but for the order of sums, and for what bfloat16 leaves out:
kernels, images and all that is trained are float32, rounding to levels happens in float32, and only
what layers multiply is bfloat16 (mixed precision, Micikevicius et al. 2018; as bfloat16 has the
exponents of float32, losses are not scaled).
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from dfq_jax.base.parallel import DATA, HERE, Machine, data_mesh, everywhere
from dfq_jax.errors import UsageError
from dfq_jax.graph.evaluate import Apply, apply_node, apply_tiled
from dfq_jax.graph.graph import Node
from dfq_jax.graph.ops import WEIGHTED, MatMul
from dfq_jax.graph.semantics import Slots, Tensor
from dfq_jax.values import bound

LEARNS_ON = ("devices", "dtype")
"""What of a `Machine` training knows; its devices always share every batch."""
MULTIPLYING = (*WEIGHTED, MatMul)


def check_machine(machine: Machine, batch: int) -> None:
    """Refuses what training cannot do with a machine.

    Args:
      machine: where it shall happen.
      batch: images of a step.

    Raises:
      UsageError: for devices that are not there or do not divide the batch, and for what only
        synthesis knows of.
    """
    data_mesh(machine.devices)
    if batch % machine.devices:
        raise UsageError(
            f"a step of {batch} images does not divide evenly among {machine.devices} devices: "
            f"take `batch={batch + -batch % machine.devices}`, or other devices."
        )
    plain = Machine(machine.devices, machine.together, machine.dtype)
    if machine != plain:
        raise UsageError(
            f"training takes {' and '.join(LEARNS_ON)} of a machine; got {machine}, which is for "
            "making images."
        )


def on_devices(tree: PyTree, machine: Machine) -> PyTree:
    """Arrays as training begins with them: copies on every device, if there are several."""
    return tree if machine.devices == 1 else everywhere(tree, data_mesh(machine.devices))


def over_devices(tree: PyTree, machine: Machine) -> PyTree:
    """A batch inside a traced function, with its rows over the devices; means stay those of all."""
    if machine.devices == 1:
        return tree
    rows = NamedSharding(data_mesh(machine.devices), P(DATA))
    return jax.tree.map(lambda v: jax.lax.with_sharding_constraint(v, rows), tree)


def layers_on(machine: Machine) -> Apply:
    """How a machine computes a node."""
    return apply_tiled if machine.dtype == HERE.dtype else bound(apply_mixed, machine.dtype)


def apply_mixed(dtype: str, node: Node, slots: Slots, args: tuple[Tensor, ...]) -> Tensor:
    """A node whose layer multiplies what `dtype` holds, and puts out float32; others in float32."""
    if not isinstance(node.op, MULTIPLYING):
        return apply_node(node, slots, args)
    slots, args = jax.tree.map(lambda v: v.astype(dtype), (slots, args))
    return apply_node(node, slots, args).astype(jnp.float32)
