"""Devices: the one place that builds meshes and shardings.

Two ways to use several devices. Apart: batches that know nothing of each other, one a device. Or
together: one batch whose rows are spread over the devices, while every formula keeps its meaning
for the whole batch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypedDict, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from dfq_jax.base.words import Precision
from dfq_jax.errors import UsageError, check_choice

Tree = TypeVar("Tree")
DATA = "data"


class MachineFields(TypedDict, total=False):
    """The fields of a `Machine`, by name."""

    devices: int
    together: bool
    dtype: str
    remat: bool
    memory: int | None
    parts: int
    process: int | None
    processes: int | None


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where images are made or a student learns, and what a step may take.

    What is computed is the same. Training takes `devices` and `dtype` (`training/on_machine.py`),
    the making of images all of it.

    Attributes:
      devices: of this process, to use at most: each makes batches of its own, and images are those
        of one device. Those of a training always share every batch.
      together: the devices share every batch of images instead; statistics are those of the whole
        batch.
      dtype: of weights and activations; statistics and images are float32 whatever it is. Of a
        training, what layers multiply.
      remat: compute activations again instead of keeping them, where that is possible.
      memory: bytes that a step may take on one device, or on a CPU in all: batches go through the
        network in as many parts as that asks for. None for as many as `parts` says.
      parts: equal parts of a batch that go through the network one after the other, at least.
      process: index of this process among those that make one set; that of `jax.distributed` by
        default.
      processes: how many there are; likewise.
    """

    devices: int = 1
    together: bool = False
    dtype: str = "float32"
    remat: bool = False
    memory: int | None = None
    parts: int = 1
    process: int | None = None
    processes: int | None = None

    def __post_init__(self) -> None:
        """Refuses a precision that is none."""
        check_choice("dtype", self.dtype, get_args(Precision))


HERE = Machine()
"""One device, all the memory it has."""


def data_mesh(devices: int) -> Mesh:
    """A mesh of one axis over the first `devices` devices of this process.

    Raises:
      UsageError: if there are not so many.
    """
    here = jax.local_devices()
    if devices < 1:
        raise UsageError(f"there must be one device at least, got {devices}.")
    if devices > len(here):
        raise UsageError(
            f"asked for {devices} devices, this process has {len(here)} of platform "
            f"{here[0].platform}. A CPU counts as several after "
            '`jax.config.update("jax_num_cpu_devices", N)` at the start of a program.'
        )
    return Mesh(np.array(here[:devices]), (DATA,), axis_types=(AxisType.Auto,))


def automatic(mesh: Mesh) -> Mesh:
    """The same devices, where the compiler decides what nobody placed.

    On explicit axes an array's type says how it lies, and an operator that leaves the choice open
    is an error (the product of a matrix with its own transpose, for one). What is computed here
    does not depend on the placement, so nothing is lost by leaving it to the compiler.
    """
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def no_mesh() -> AbstractContextManager[Any]:
    """A context in which no mesh is set, whatever the caller has set."""
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def everywhere(tree: Tree, mesh: Mesh) -> Tree:
    """A copy of all arrays on every device."""
    return jax.device_put(tree, NamedSharding(automatic(mesh), P()))


def at_home(tree: Tree) -> Tree:
    """Arrays that several devices hold, brought to the default device; others as they are."""

    def bring(v: Any) -> Any:
        if not isinstance(v, jax.Array) or len(v.sharding.device_set) == 1:
            return v
        if jnp.issubdtype(v.dtype, jax.dtypes.prng_key):
            data = jax.device_put(np.asarray(jax.random.key_data(v)))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(v))
        return jax.device_put(np.asarray(v))

    return jax.tree.map(bring, tree)


def remembered(tree: Tree) -> Callable[[], Tree]:
    """Copies arrays to the host before a program consumes them.

    Args:
      tree: arrays; of those on several hosts, each remembers what lies on its own devices.

    Returns:
      A function that gives the tree again, on the devices it was on.
    """
    leaves, structure = jax.tree.flatten(tree)
    copies = [[(np.array(s.data), s.device) for s in v.addressable_shards] for v in leaves]
    places = [(v.shape, v.sharding) for v in leaves]
    join = jax.make_array_from_single_device_arrays

    def again() -> Tree:
        pieces = [[jax.device_put(*each) for each in copy] for copy in copies]
        whole = [join(*place, parts) for place, parts in zip(places, pieces, strict=True)]
        return jax.tree.unflatten(structure, whole)

    return again


def share_rows(tree: Tree, rows: int, mesh: Mesh) -> Tree:
    """Spreads a batch over the devices.

    Args:
      tree: arrays.
      rows: length of the batch; arrays whose first axis is as long are spread along it, others are
        copied to every device. Placement has no bearing on values, so an array that has this
        length by chance does no harm.
      mesh: of one axis, of either type; its number of devices divides `rows`.

    Returns:
      The same arrays, placed.
    """
    mesh = automatic(mesh)

    def place(v: jax.Array) -> jax.Array:
        spread = v.ndim > 0 and v.shape[0] == rows
        return jax.device_put(v, NamedSharding(mesh, P(DATA) if spread else P()))

    return jax.tree.map(place, tree)


def settled(tree: Tree) -> Tree:
    """A tree of which some arrays lie on a mesh, with all of them there, axes left to the compiler.

    Arrays that were on one device are copied to all. A tree without a mesh is returned as it is.
    """
    placed = (v.sharding for v in jax.tree.leaves(tree) if isinstance(v, jax.Array))
    meshes = (s.mesh for s in placed if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh))
    mesh = next(map(automatic, meshes), None)
    if mesh is None:
        return tree

    def place(v: Any) -> Any:
        if not isinstance(v, jax.Array):
            return v
        spec = v.sharding.spec if isinstance(v.sharding, NamedSharding) else P()
        return jax.device_put(v, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def on_every_device(program: Callable[..., Any], mesh: Mesh, stacked: PyTree) -> Callable[..., Any]:
    """Runs `program` on every device at the same time, each on arguments of its own.

    Args:
      program: a jitted function without collective operations, e.g. `run_chunk`. Jitted, since its
        constants are then its own; as constants of the whole they would become arguments of each
        device's program, which changes how it is fused, and thereby the last bits.
      mesh: of one axis.
      stacked: for each argument, as a prefix of its tree, whether its arrays are stacked along a
        first axis of one entry a device; else every device gets all of them.

    Returns:
      A function of the same arguments; what it returns is stacked.

    Proof that device i returns `program` of the i-th arguments, whatever the others do: `P(DATA)`
    over an axis of one entry a device hands it entry i of a stacked argument, as an array whose
    first axis has length 1; `P()` hands it the whole of any other. `alone` removes that axis,
    which leaves what the program gets on one device. The body has no collective operation, so no
    value of another device enters it, and its derivatives are taken inside it, so none is summed
    over devices. `P(DATA)` of the result puts it at i. This is why replication is left unchecked.
    """
    spec = jax.tree.map(lambda apart: P(DATA) if apart else P(), stacked)

    def alone(*arguments: PyTree) -> PyTree:
        own = lambda apart, tree: jax.tree.map(lambda v: v[0], tree) if apart else tree
        result = program(*jax.tree.map(own, stacked, arguments))
        return jax.tree.map(lambda v: v[None], result)

    return jax.shard_map(alone, mesh=mesh, in_specs=spec, out_specs=P(DATA), check_vma=False)


def stack(trees: Sequence[Tree], mesh: Mesh) -> Tree:
    """Equal trees as one, stacked along a new first axis of one entry a device."""
    each = lambda *v: jax.device_put(jnp.stack(v), NamedSharding(mesh, P(DATA)))
    return jax.tree.map(each, *trees)


def unstack(tree: Tree) -> list[Tree]:
    """The opposite of `stack`; what it returns is on the default device."""
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    return [
        jax.tree.unflatten(structure, [jax.device_put(v[i]) for v in leaves])
        for i in range(len(leaves[0]))
    ]
