"""Quantized tensors, kernels and biases of an ONNX graph: constants and Q/DQ nodes."""

import dataclasses
import math
from collections.abc import Callable, Collection

import jax.numpy as jnp
import numpy as np
import onnx

from dfq_jax.allocation.costs import is_packed
from dfq_jax.base.words import Store
from dfq_jax.errors import ExportError
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import Clip, Conv2d, ConvTranspose2d, Linear, Relu
from dfq_jax.graph.query import consumers, keeps_values
from dfq_jax.graph.volume_ops import Conv3d
from dfq_jax.io.artifacts.quantized_tensors import to_bias_codes, to_codes
from dfq_jax.io.onnx.builder import OnnxBuilder, printable
from dfq_jax.io.onnx.layout import Layout
from dfq_jax.io.onnx.packed import add_unpacked, shared_integers
from dfq_jax.io.onnx.slots import filed_slots, kernel_form, kernel_layout, output_axis
from dfq_jax.io.onnx.values import Draft, QdqPair, QuantizedEdge
from dfq_jax.numerics.affine import Affine, Grid, bias_scale
from dfq_jax.numerics.levels import scales_of
from dfq_jax.quantization.plan import Site
from dfq_jax.quantization.simulate import QuantizedModel


def add_pairs(
    b: OnnxBuilder,
    edges: tuple[QuantizedEdge, ...],
    drafted: Draft,
    tensor: str,
    producer: Node | None,
) -> None:
    """Adds the quantize/dequantize pairs of one tensor.

    Args:
      b: receives them.
      edges: of the whole network.
      drafted: the names of all values.
      tensor: its name in the graph.
      producer: the node that computes it, None for the network's input.
    """
    for edge in (e for e in edges if e.tensor == tensor):
        pair = drafted.pairs[edge.key]
        if not b.defines(pair.dequantized):
            saturate = edge.grid.bits < 8 and not moves_codes(producer, edge, edges)
            add_pair(b, edge, drafted.held[tensor], pair, saturate)


def moves_codes(
    producer: Node | None, edge: QuantizedEdge, edges: tuple[QuantizedEdge, ...]
) -> bool:
    """Whether the producer only moves values that lie on the edge's grid already."""
    if producer is None or len(producer.inputs) != 1 or not keeps_values(producer.op):
        return False
    site = Site(producer.name, 0)
    return any(site in e.sites and e.key[1:] == edge.key[1:] for e in edges)


def without_idle_ceiling(graph: Graph, node: Node, edges: tuple[QuantizedEdge, ...]) -> Node:
    """The node, less its ceiling where quantizing its output saturates there anyway.

    Nothing but quantized readers may see the tensor. Runtimes merge a plain ReLU into the integer
    convolution before it, but not every clip.
    """
    match node.op:
        case Relu(ceiling) | Clip(0.0, ceiling) if ceiling is not None:
            top = jnp.float32(ceiling)
        case _:
            return node
    mine = [e for e in edges if e.tensor == node.name]
    seen = {site for e in mine for site in e.sites}
    readers = {Site(n.name, i) for n, i in consumers(graph)[node.name]}
    idle = all(int(to_codes(top, e.affine, levels=e.grid)) == e.grid.qmax for e in mine)
    unseen = node.name in graph.outputs or not readers <= seen
    return node if unseen or not idle else dataclasses.replace(node, op=Relu())


def add_pair(
    b: OnnxBuilder, edge: QuantizedEdge, value: str, pair: QdqPair, saturate: bool
) -> None:
    """Adds one quantize/dequantize pair that defines the values of `pair`."""
    stem = pair.codes.removesuffix(".codes")
    affine = (
        b.constant(f"{stem}.scale", as_scalar(edge.affine.scale)),
        b.constant(f"{stem}.zero_point", as_scalar(edge.affine.zero_point)),
    )
    codes = b.fresh(f"{stem}.unsaturated") if saturate else pair.codes
    b.add("QuantizeLinear", f"{stem}.quantize", (value, *affine), codes)
    if saturate:
        lowest = b.constant(f"{stem}.lowest", np.array(edge.grid.qmin, np.uint8))
        highest = b.constant(f"{stem}.highest", np.array(edge.grid.qmax, np.uint8))
        b.add("Clip", f"{stem}.saturate", (codes, lowest, highest), pair.codes)
    b.add("DequantizeLinear", f"{stem}.dequantize", (pair.codes, *affine), pair.dequantized)


def as_scalar(x) -> np.ndarray:
    """An array of one element without axes."""
    return np.asarray(x).reshape(())


def add_slots(
    b: OnnxBuilder,
    model: Model,
    quantized: QuantizedModel | None,
    node: Node,
    rank: int,
    layout: Layout,
) -> dict[str, str]:
    """Adds a node's parameters and returns {slot: value to read}.

    Args:
      b: receives them.
      model: the float network.
      quantized: the same network with its grids, None to keep all in float.
      node: whose parameters.
      rank: of the node's first argument.
      layout: of that argument.
    """
    name, values = printable(node.name), {}
    slots = {k: np.asarray(v, np.float32) for k, v in model.params.get(node.name, {}).items()}
    integers = {} if quantized is None else integer_slots(quantized, node, slots)
    if isinstance(op := node.op, Conv2d | ConvTranspose2d | Conv3d | Linear):
        form = kernel_form(op, rank, layout, "kernel" in integers)
        laid_out = lambda kernel: kernel_layout(op, kernel, form, layout)
        slots["kernel"] = laid_out(slots["kernel"])
        if "kernel" in integers and integers["kernel"].block is None:
            codes = laid_out(integers["kernel"].codes)
            axis = output_axis(form)
            integers["kernel"] = dataclasses.replace(integers["kernel"], codes=codes, axis=axis)
        elif "kernel" in integers:
            integers["kernel"] = in_blocks(integers["kernel"], slots["kernel"].shape, layout)
    for slot, array in sorted(filed_slots(node, slots, rank, layout).items()):
        if slot in integers:
            values[slot] = add_dequantized(b, f"{name}.{slot}", integers[slot])
        else:
            values[slot] = b.constant(f"{name}.{slot}", array)
    return values


@dataclasses.dataclass(frozen=True)
class Packed:
    """How codes are packed: bits of each, and what stands for zero, in the shape of the scale."""

    bits: int
    offset: np.ndarray


@dataclasses.dataclass(frozen=True)
class Integers:
    """A parameter as integers.

    Attributes:
      codes: in the layout of the library; of blocks (outputs, inputs and taps).
      scale: float32, one for all, one per output channel, or (outputs, blocks).
      zero_point: in the type of `codes`, shape of `scale`.
      kind: ONNX element type where NumPy's does not say it (4 bits).
      axis: of the output channels.
      packed: how codes of fewer than 8 bits are packed, None for a whole element each.
      block: so many codes of an output channel share a scale; None where there are no blocks.
      views: how blocks become a kernel: shapes, with a permutation of axes between two of them.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    kind: int | None = None
    axis: int = 0
    packed: Packed | None = None
    block: int | None = None
    views: tuple[tuple[int, ...], ...] = ()


def integer_slots(
    quantized: QuantizedModel, node: Node, slots: Collection[str]
) -> dict[str, Integers]:
    """The kernel and bias of a layer as integers, those of them that do not stay float.

    A bias is int32 where its layer sums products of integers.
    """
    plan, qparams, found = quantized.plan, quantized.qparams, {}
    kernel, data = Site(node.name), Site(node.name, 0)
    if kernel in plan.table:
        found["kernel"] = integer_kernel(quantized, kernel)
    if "bias" in slots and "kernel" in found and plan.multiplies(node):
        scales = scales_of(qparams[data]), scales_of(qparams[kernel])
        codes = np.asarray(to_bias_codes(quantized.model.params[node.name]["bias"], *scales))
        scale = bias_scale(*map(np.asarray, scales))
        found["bias"] = Integers(codes, scale, np.zeros(scale.shape, np.int32))
    return found


def integer_kernel(quantized: QuantizedModel, site: Site) -> Integers:
    """A kernel's codes as ONNX stores them.

    8 bits as they are. Fewer less their zero point in int8, which integer kernels handle best, and
    packed in the file where that saves enough; up to 4 bits in a 4-bit type if the plan says so.

    Raises:
      ExportError: if scales run along another axis than output channels.
    """
    levels, parameters = quantized.plan.table[site].levels, quantized.qparams[site]
    kernel = quantized.model.params[site.node][site.slot]
    codes = np.asarray(to_codes(kernel, parameters, levels=levels))
    scale = np.asarray(scales_of(parameters))
    if not isinstance(levels, Grid) or not isinstance(parameters, Affine):
        return Integers(codes, scale.reshape(-1), np.zeros(scale.size, np.int8))
    if levels.group is not None and scale.size > codes.shape[-1]:
        return blocks(codes, parameters, levels, levels.group, quantized.plan.store)
    scale = scale.reshape(-1)
    if scale.size not in (1, codes.shape[-1]):
        raise ExportError(
            f"kernel of {site.node!r} has scales of shape {parameters.scale.shape}; ONNX export "
            f"writes one scale per output channel, one for all, or one for each of its groups."
        )
    zero_point = np.broadcast_to(np.asarray(parameters.zero_point).reshape(-1), scale.shape)
    if is_int4(levels, quantized.plan.store):
        return Integers(codes, scale, zero_point, int4_of(levels))
    if levels.bits == 8:
        return Integers(codes, scale, zero_point)
    none = np.zeros(scale.shape, np.int8)
    if is_packed(codes.size, levels.bits, quantized.plan.store):
        above = from_zero(levels)
        return Integers(above(codes), scale, none, packed=Packed(levels.bits, above(zero_point)))
    return Integers((codes.astype(np.int16) - zero_point).astype(np.int8), scale, none)


def is_int4(grid: Grid, store: Store) -> bool:
    """Whether codes lie in one of ONNX's 4-bit types."""
    return grid.bits <= 4 and store == "int4"


def int4_of(grid: Grid) -> int:
    """The 4-bit type of a grid's codes."""
    return onnx.TensorProto.INT4 if grid.symmetric else onnx.TensorProto.UINT4


def from_zero(grid: Grid) -> Callable[[np.ndarray], np.ndarray]:
    """Counts codes of a grid from its lowest one."""
    return lambda codes: (np.asarray(codes, np.int16) - grid.qmin).astype(np.uint8)


def blocks(codes: np.ndarray, affine: Affine, grid: Grid, group: int, store: Store) -> Integers:
    """A kernel with scales of groups of input channels, as blocks of its rows.

    A row holds all weights of an output channel, by input channel: what ONNX calls a block is what
    the taps of a group's channels have. The layer computes in float, so zero points may stay.
    """
    taps = math.prod(codes.shape[:-2])
    rows = np.moveaxis(codes, (-1, -2), (0, 1)).reshape(codes.shape[-1], -1)
    scale, zero_point = (np.asarray(v).reshape(-1, codes.shape[-1]).T for v in affine)
    block = taps * group
    if is_int4(grid, store):
        return Integers(rows, scale, zero_point, int4_of(grid), axis=1, block=block)
    if grid.bits == 8:
        return Integers(rows, scale, zero_point, axis=1, block=block)
    rows, zero_point = (from_zero(grid)(v) for v in (rows, zero_point))
    if is_packed(rows.size, grid.bits, store):
        packed = Packed(grid.bits, np.zeros(1, np.uint8))
        return Integers(rows, scale, zero_point.astype(np.int8), axis=1, packed=packed, block=block)
    return Integers(rows, scale, zero_point, axis=1, block=block)


def in_blocks(kernel: Integers, shape: tuple[int, ...], layout: Layout) -> Integers:
    """Blocks with the way from their rows to a kernel of `shape` in the file.

    Where the layer reads a flattened image, the file has it channels first: there the rows are
    brought into that order after they are dequantized, as groups run along the library's.
    """
    outputs, size = kernel.codes.shape
    views: tuple[tuple[int, ...], ...] = () if shape == (outputs, size) else (shape,)
    if isinstance(layout, tuple):
        views = ((outputs, *layout), (0, 3, 1, 2), shape)
    return dataclasses.replace(kernel, views=views)


def add_dequantized(b: OnnxBuilder, stem: str, integers: Integers) -> str:
    """Adds integers and their DequantizeLinear; returns its output."""
    scale, zero_point = integers.scale, integers.zero_point
    per_tensor = scale.size == 1
    if per_tensor:
        scale, zero_point = as_scalar(scale), as_scalar(zero_point)
    inputs = (
        add_codes(b, stem, integers),
        b.constant(f"{stem}.scale", scale),
        b.constant(f"{stem}.zero_point", zero_point, integers.kind),
    )
    attributes = {} if per_tensor else {"axis": integers.axis}
    if integers.block is not None:
        attributes["block_size"] = integers.block
    value = b.add("DequantizeLinear", f"{stem}.dequantize", inputs, b.fresh(stem), **attributes)
    for index, view in enumerate(integers.views):
        if index % 2:
            value = b.part("Transpose", f"{stem}.turned", (value,), perm=view)
        else:
            value = b.part("Reshape", f"{stem}.shape{index}", (value, shared_integers(b, view)))
    return value


def add_codes(b: OnnxBuilder, stem: str, integers: Integers) -> str:
    """Adds the codes of a parameter, and what unpacks them where they are packed."""
    codes, packed = integers.codes, integers.packed
    if packed is None:
        return b.constant(f"{stem}.codes", codes, integers.kind)
    along = [1] * codes.ndim
    if packed.offset.size > 1:
        along[integers.axis] = packed.offset.size
    return add_unpacked(b, stem, codes, packed.offset.reshape(along), packed.bits)
