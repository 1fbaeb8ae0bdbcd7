"""How much memory a step of an optimisation takes, foretold before anything is compiled.

The rule follows what XLA does with the gradient of a network by its images. Whatever is linear in
the image, convolutions above all, leaves nothing behind, since the weights are constant. What bends
(activations, statistics, products of two tensors) needs its arguments again. XLA keeps the outputs
of operators that it cannot fuse, and computes the pointwise ones in between once more: one tensor
is kept for a convolution, however many norms, activations and additions follow. On top comes the
layer at work with what it reads. The tests compare this with XLA's own figures.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dfq_jax.errors import ResourceError, UsageError
from dfq_jax.graph.cuts import blocks
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.ops import (
    Activation,
    Arrange,
    BatchNorm,
    Clip,
    Combine,
    Concat,
    Conv2d,
    Div,
    Elu,
    GroupNorm,
    LayerNorm,
    LeakyRelu,
    LocalNorm,
    LogSoftmax,
    MatMul,
    Maximum,
    MaxPool,
    Minimum,
    Mul,
    Op,
    Pointwise,
    Power,
    PRelu,
    Recurrent,
    Reduce,
    Relu,
    Select,
    Softmax,
)
from dfq_jax.graph.query import constants, output_shapes
from dfq_jax.graph.windows import shiftable
from dfq_jax.graph.winograd import GROWTH, tile_values, tileable
from dfq_jax.synthesis.recipe import Recipe
from dfq_jax.synthesis.run.work import BatchWork
from dfq_jax.synthesis.terms.targets import Forward
from dfq_jax.types import tree_bytes

CURVED = (
    *(Relu, LeakyRelu, PRelu, Clip, Elu, Activation, Power, Softmax, LogSoftmax),
    *(Maximum, Minimum, Select, LayerNorm, GroupNorm, LocalNorm, MaxPool, Reduce, Recurrent),
)
"""Operators whose derivative depends on their argument."""
PRODUCTS = (Mul, Div, MatMul)
"""Operators whose derivative by one argument depends on the other."""
DECIMAL = {letter: 1000**i for i, letter in enumerate("kmgt", 1)}
BINARY = {f"{letter}i": 1024**i for i, letter in enumerate("kmgt", 1)}
UNITS: Mapping[str, int] = {**DECIMAL, **BINARY, "": 1}


class Need(NamedTuple):
    """Bytes that a step takes on one device.

    Attributes:
      held: weights, and variables with their optimizer state; a CPU's memory is also that of the
        host, which keeps a copy of them.
      images: those shown to the network with their gradient, and what draws them.
      network: kept and computed while all of them pass through the network and back.
      update: gradient and new state of the variables, when the network is done with.
      copies: kernels in the form in which a CPU multiplies tiles by them.
    """

    held: int
    images: int
    network: int
    update: int
    copies: int = 0

    def during(self, parts: int) -> int:
        """What comes and goes in a step that passes in so many parts, one after the other."""
        return self.copies + max(self.images + -(-self.network // parts), self.update)

    def total(self, parts: int) -> int:
        """All of it at its peak."""
        return self.held + self.during(parts)


def needed(model: Model, work: BatchWork, how: Forward, platform: str) -> Need:
    """Foretells the peak of the most demanding stage; terms, which see little, are not counted.

    Args:
      model: the network.
      work: of one optimisation on one device.
      how: precision, and what is computed again; its parts are ignored.
      platform: of the device: `cpu`, `gpu` or `tpu`.

    Returns:
      The bytes.
    """
    recipe = work.recipe
    shape, key = (work.size, *model.contract.shape), jax.eval_shape(lambda: jax.random.key(0))
    x = jax.eval_shape(lambda key: recipe.source.init(key, shape), key)
    opts = [jax.eval_shape(stage.optimizer(1.0).init, x) for stage in recipe.stages]
    natural = jax.eval_shape(recipe.source.render, x)
    shown = {jax.eval_shape(stage.augment, key, natural).shape for stage in recipe.stages}
    taps = (*work.targets, *recipe.watch(model.graph).values())
    variables, drawn = tree_bytes(x), 2 * tree_bytes(natural) + drawing(recipe, x)
    state = work.turns * (variables + max(map(tree_bytes, opts), default=0))
    network = max(passing(model, taps, images, how, platform) for images in shown)
    held = tree_bytes(model.params) + (2 if platform == "cpu" else 1) * state
    copies = copied_kernels(model, how, platform)
    return Need(held, drawn, network, state + work.turns * variables, copies)


def copied_kernels(model: Model, how: Forward, platform: str) -> int:
    """Bytes of the kernels that a CPU transforms, once for each direction."""
    if not tiling(how, platform):
        return 0
    tiled = dict(tiled_convolutions(model, output_shapes(model)))
    return 2 * GROWTH * sum(tree_bytes(model.params[name]["kernel"]) for name in tiled)


def tiling(how: Forward, platform: str) -> bool:
    """Whether convolutions go by tiles."""
    return how.tiles and platform == "cpu" and how.dtype == "float32"


def drawing(recipe: Recipe, x: Any) -> int:
    """Bytes of what a source's gradient needs: what enters and leaves its convolutions."""
    jaxpr = jax.make_jaxpr(recipe.source.render)(x).jaxpr
    products = (e for e in equations(jaxpr) if e.primitive.name in UNFUSED)
    return sum(tree_bytes([v.aval for v in (*e.invars[:1], *e.outvars)]) for e in products)


UNFUSED = ("conv_general_dilated", "dot_general")


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, those of its functions included; of branches the last."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner: Any = value[-1] if isinstance(value, tuple) and value else value
            if hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)


def passing(
    model: Model, taps: Collection[str], shape: tuple[int, ...], how: Forward, platform: str
) -> int:
    """Bytes kept and computed while a batch passes through a network and its gradient back.

    On a CPU bfloat16 saves nothing: XLA computes in float32 there, and a rounded copy lies beside
    each result. Neither does `remat`, since XLA drops the barriers that keep it from merging what
    is computed twice.

    Args:
      model: the network.
      taps: nodes whose first argument is looked at, e.g. batch norms.
      shape: of the images.
      how: precision, and what is computed again.
      platform: of the device.

    Returns:
      Tensors kept for the gradient, and the most that one node reads and writes.
    """
    cpu = platform == "cpu"
    value = jnp.dtype(how.dtype).itemsize + (4 if cpu and how.dtype != "float32" else 0)
    contract = dataclasses.replace(model.contract, height=shape[1], width=shape[2])
    shapes = output_shapes(dataclasses.replace(model, inputs=(contract,)), shape[0])
    bytes_of = {name: value * prod(each) for name, each in shapes.items()}
    pools = [n for n in model.graph.nodes if isinstance(n.op, MaxPool) and cpu and shiftable(n.op)]
    kept = needed_again(model.graph, taps, {node.name for node in pools})
    notes = sum(4 * prod(shapes[node.name]) for node in pools)  # which entry of each window won
    if how.remat and not cpu:
        pieces = [set(block.names) for block in blocks(model.graph)]
        cuts = sum(bytes_of[block.names[-1]] for block in blocks(model.graph))
        resting = cuts + max(sum(bytes_of[k] for k in kept & piece) for piece in pieces)
    else:
        resting = sum(bytes_of[k] for k in kept)
    tiled = dict(tiled_convolutions(model, shapes)) if tiling(how, platform) else {}
    touched = (
        sum(bytes_of[i] for i in (*n.inputs, n.name)) + 4 * tiled.get(n.name, 0)
        for n in model.graph.nodes
    )
    return resting + notes + max(touched)


def tiled_convolutions(
    model: Model, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, int]]:
    """Convolutions that a CPU computes by tiles, and how many values these have."""
    for node in model.graph.nodes:
        if isinstance(node.op, Conv2d):
            given = shapes[node.inputs[0]], model.params[node.name]["kernel"].shape, node.op
            if tileable(*given):
                yield node.name, tile_values(*given)


def needed_again(graph: Graph, taps: Collection[str], noted: Collection[str] = ()) -> set[str]:
    """The tensors that the gradient by the images cannot do without.

    Args:
      graph: of the network.
      taps: nodes whose first argument is looked at.
      noted: nodes whose derivative depends on something smaller than their argument.

    Returns:
      Their names.
    """
    fixed, nodes = constants(graph), {node.name: node for node in graph.nodes}
    found: set[str] = set()

    def keep(name: str) -> None:
        if name in fixed or name in graph.inputs or name in seen:
            return
        seen.add(name)
        if cheap(nodes[name].op):
            for source in nodes[name].inputs:
                keep(source)
        else:
            found.add(name)

    seen: set[str] = set()
    for node in graph.nodes:
        several = sum(i not in fixed for i in node.inputs) > 1
        bent = isinstance(node.op, CURVED) and node.name not in noted
        if bent or (isinstance(node.op, PRODUCTS) and several):
            for source in node.inputs:
                keep(source)
        elif node.name in taps:
            keep(node.inputs[0])
    return found


def cheap(op: Op) -> bool:
    """Whether XLA rather computes an operator again than keep what it returns.

    It fuses what is pointwise into whatever reads it, unless that means to compute an exponential
    twice, and on its way copies no tensor together with others.
    """
    match op:
        case Activation(curve):
            return curve in ("hard_sigmoid", "hard_swish", "abs")
        case Power() | Concat():
            return False
        case _:
            return isinstance(op, BatchNorm | Pointwise | Combine | Arrange)


def divisors(rows: int) -> list[int]:
    """Numbers of equal parts into which so many images divide, ascending."""
    return [d for d in range(1, rows + 1) if rows % d == 0]


def parts_within(need: Need, rows: int, memory: int, least: int = 1) -> int:
    """The fewest parts in which a batch stays within so much memory.

    Args:
      need: of the whole batch.
      rows: images of the batch on one device.
      memory: bytes of one device that may be used.
      least: parts to begin with.

    Returns:
      A divisor of `rows`.

    Raises:
      ResourceError: if one image at a time is too much, with what that needs.
    """
    for parts in divisors(rows):
        if parts >= least and need.total(parts) <= memory:
            return parts
    raise ResourceError(
        f"a batch of {rows} images needs about {in_units(need.total(rows))} of memory even if they "
        f"pass through the network one at a time, of which {in_units(need.held)} are weights and "
        f"the optimizer's state, and {in_units(memory)} are allowed. Allow more (`memory=`), or "
        "use a smaller `batch=`."
    )


def in_units(count: int) -> str:
    """Bytes with a binary unit, e.g. `1.2 GiB`."""
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while size >= 1023.95 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


def bytes_from(text: str) -> int:
    """The number of bytes a person wrote: `512MiB`, `4GB`, `1.5 GiB`, `100000`.

    Raises:
      UsageError: for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?(B|bytes)?", text.strip(), re.IGNORECASE)
    count = int(float(found[1]) * UNITS[(found[2] or "").lower()]) if found else 0
    if count < 1:
        raise UsageError(
            f"{text!r} is no amount of memory: give bytes with or without a unit, such as 512MiB, "
            "4GiB, 4GB or 4000000000."
        )
    return count
