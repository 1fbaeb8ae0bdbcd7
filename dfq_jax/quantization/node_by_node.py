"""Runs a network node by node, every node in a program that all nodes like it share.

What passes over a few images is compiled for longer than it runs. Here the float network, the
simulator and the function in integers, of any number of bits, share one program for each operator
and shape; whatever is measured of their tensors is up to NumPy.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from dfq_jax.graph.evaluate import Apply, Tensor, applied, walked
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import WEIGHTED, Op
from dfq_jax.graph.semantics import Slots
from dfq_jax.numerics.affine import Affine, Grid, Steps, nearest_values, snapped, spread, steps_of
from dfq_jax.numerics.levels import Levels, Parameters, on_levels
from dfq_jax.quantization.integer import integer_product
from dfq_jax.quantization.plan import Site
from dfq_jax.quantization.simulate import QuantizedModel, snap_bias

BATCH = 8
"""Images of a pass: the same for all who look at a network, or they could not share programs."""
AS_IS = Steps(np.float32(0), np.float32(0), np.float32(0))
"""The grid of what is on none."""

NodeResults = Iterator[tuple[str, tuple[Tensor, ...], Tensor]]
"""What `graph.evaluate.walked` yields."""
NodeWalk = Callable[..., NodeResults]
"""(images, hook=None) -> the pass of a network over `BATCH` images."""


class Batch(NamedTuple):
    """Images of one static size.

    Attributes:
      images: as many as a batch has, the last repeated where there are fewer.
      valid: how many count.
    """

    images: Shaped[Array, "n ..."]
    valid: int

    def counting(self, x: Any) -> np.ndarray:
        """The rows of a tensor that belong to images which count; constants have others."""
        return np.asarray(x)[: self.valid if np.shape(x)[:1] == self.images.shape[:1] else None]


def in_batches(images: Any, size: int = BATCH) -> Iterator[Batch]:
    """All images in batches of one size, no larger than there are images."""
    images = as_read(images)
    size = min(size, len(images))
    for start in range(0, len(images), size):
        part = images[start : start + size]
        fill = np.repeat(part[-1:], size - len(part), axis=0)
        yield Batch(jax.device_put(np.concatenate([part, fill])), len(part))


def as_read(examples: Any) -> np.ndarray:
    """Examples as networks read them: whole numbers as int32, all others as float32."""
    found = np.asarray(examples)
    return found.astype(np.int32 if found.dtype.kind in "iu" else np.float32, copy=False)


def outputs_of(
    run: NodeWalk, outputs: tuple[str, ...], images: Any, size: int = BATCH
) -> tuple[np.ndarray, ...]:
    """Outputs of a network over any number of images."""
    parts = []
    for batch in in_batches(images, size):
        made = {name: batch.counting(y) for name, _, y in run(batch.images) if name in outputs}
        parts.append([made[name] for name in outputs])
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True))


def in_float(model: Model) -> NodeWalk:
    """The float network."""
    return partial(walked, model, apply=apply_float)


def simulating(quantized: QuantizedModel) -> NodeWalk:
    """The quantized network in floats."""
    return partial(walked, on_grids(quantized), apply=simulation(quantized))


def rounding_kernels(quantized: QuantizedModel) -> NodeWalk:
    """The quantized network with activations as they are."""
    return in_float(on_grids(quantized))


def rounding_activations(quantized: QuantizedModel) -> NodeWalk:
    """The quantized network with kernels and biases as they are."""
    return partial(walked, quantized.model, apply=simulation(quantized))


def in_integers(quantized: QuantizedModel) -> NodeWalk:
    """The quantized network, its products of codes summed in integers."""
    host = QuantizedModel(quantized.model, quantized.plan, jax.device_get(quantized.qparams))
    simulated, original = simulation(quantized), jax.device_get(quantized.model.params)

    def apply(node: Node, slots: Slots, args: tuple[Tensor, ...]) -> Tensor:
        multiply = partial(multiplied, "bias" in slots)
        inputs = tuple(map(np.asarray, args))
        found = integer_product(host, node, original.get(node.name, {}), inputs, multiply)
        return simulated(node, slots, args) if found is None else jax.device_put(found)

    return partial(walked, on_grids(quantized), apply=apply)


def on_grids(quantized: QuantizedModel) -> Model:
    """The network with kernels and biases on their grids."""
    plan, qparams = quantized.plan, jax.device_get(quantized.qparams)
    table, params = plan.table, {k: dict(v) for k, v in quantized.model.params.items()}
    for node in quantized.model.graph.nodes:
        kernel, data = Site(node.name), Site(node.name, 0)
        if kernel not in table:
            continue
        slots = params[node.name]
        slots["kernel"] = on_level(slots["kernel"], table[kernel].levels, qparams[kernel])
        if "bias" in slots and plan.multiplies(node):
            bias = snap_bias(np.asarray(slots["bias"]), qparams[data], qparams[kernel])
            slots["bias"] = jax.device_put(bias)
    return dataclasses.replace(quantized.model, params=params)


def on_level(x: Tensor, levels: Levels, parameters: Parameters) -> Tensor:
    """`numerics.levels.on_levels`, in NumPy for grids."""
    if isinstance(levels, Grid) and isinstance(parameters, Affine):
        steps = steps_of(spread(parameters, x.shape, levels), levels)
        return jax.device_put(nearest_values(np.asarray(x), steps))
    return on_any(x, parameters, levels=levels)


@partial(jax.jit, static_argnames="levels")
def on_any(x: Tensor, parameters: Parameters, *, levels: Levels) -> Tensor:
    """`numerics.levels.on_levels`, compiled once for each shape."""
    return on_levels(x, levels, parameters)


def simulation(quantized: QuantizedModel) -> Apply:
    """The semantics of a node with quantized arguments; its parameters are on their grids."""
    table, qparams = quantized.plan.table, jax.device_get(quantized.qparams)

    def grid(node: Node, index: int) -> Steps:
        site = Site(node.name, index)
        if site not in table or not isinstance(table[site].levels, Grid):
            return AS_IS
        return steps_of(qparams[site], table[site].grid)

    def placed(node: Node, index: int, x: Tensor) -> Tensor:
        site = Site(node.name, index)
        if site not in table or isinstance(table[site].levels, Grid):
            return x
        return on_any(x, qparams[site], levels=table[site].levels)

    def apply(node: Node, slots: Slots, args: tuple[Tensor, ...]) -> Tensor:
        args = tuple(placed(node, i, x) for i, x in enumerate(args))
        return computed(node.op, slots, args, tuple(grid(node, i) for i in range(len(args))))

    return apply


def apply_float(node: Node, slots: Slots, args: tuple[Tensor, ...]) -> Tensor:
    """The float semantics of a node."""
    return computed(node.op, slots, args, (AS_IS,) * len(args))


@partial(jax.jit, static_argnames="op")
def computed(op: Op, slots: Slots, args: tuple[Tensor, ...], grids: tuple[Steps, ...]) -> Tensor:
    """The output of an operator whose arguments lie on these grids."""
    return applied(op, slots, *map(on_steps, args, grids))


def on_steps(x: Tensor, grid: Steps) -> Tensor:
    """The values on a grid, or as they are; only floats can be on one."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jnp.where(grid.scale > 0, snapped(x, grid), x)


def multiplied(biased: bool, op: Op, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The product of two tensors of small integers held as floats, exactly.

    Args:
      biased: whether the operator has a bias elsewhere, so that one program serves both.
      op: a layer or a matrix product.
      x: its input.
      w: its kernel, or the second factor.
    """
    on_cpu = jax.default_backend() == "cpu"  # where that is how floats are multiplied anyway
    exactly = contextlib.nullcontext() if on_cpu else jax.default_matmul_precision("highest")
    with exactly:
        if not isinstance(op, WEIGHTED):
            return np.asarray(computed(op, {}, (x, w), (AS_IS, AS_IS)))
        slots = {"kernel": w} | ({"bias": np.zeros(w.shape[-1], w.dtype)} if biased else {})
        return np.asarray(computed(op, slots, (x,), (AS_IS,)))
