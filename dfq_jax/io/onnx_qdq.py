"""Quantized tensors, kernels and biases of an ONNX graph: constants and Q/DQ nodes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import onnx

from dfq_jax.errors import ExportError
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import BatchNorm, Flatten, MaxPool, Pad, Relu, Slice
from dfq_jax.graph.query import consumers
from dfq_jax.io.onnx_builder import OnnxBuilder, printable
from dfq_jax.io.onnx_nodes import Order, kernel_layout
from dfq_jax.io.quantized_tensors import to_bias_codes, to_codes
from dfq_jax.numerics.affine import Affine, Grid, bias_scale
from dfq_jax.quantize.plan import Site
from dfq_jax.quantize.simulate import QuantizedModel


@dataclasses.dataclass(frozen=True)
class Edge:
    """One tensor quantized in one way: what a QuantizeLinear/DequantizeLinear pair stands for.

    Attributes:
      tensor: its name in the graph.
      sites: its readers that see it quantized.
      affine: scale and zero point, scalars.
      grid: the codes that exist.
    """

    tensor: str
    sites: tuple[Site, ...]
    affine: Affine
    grid: Grid

    @property
    def key(self) -> tuple[str, float, int, Grid]:
        """What a pair may be shared by: tensor, scale, zero point and grid."""
        return self.tensor, float(self.affine.scale), int(self.affine.zero_point), self.grid


def quantized_edges(quantized: QuantizedModel) -> tuple[Edge, ...]:
    """Every quantized tensor once for each grid it is read with, in execution order.

    Raises:
      ExportError: if a grid is not one unsigned grid for the whole tensor.
    """
    table, qparams = quantized.plan.table, quantized.qparams
    found: dict[tuple[str, float, int, Grid], Edge] = {}
    for node in quantized.model.graph.nodes:
        for index, tensor in enumerate(node.inputs):
            site = Site(node.name, f"input{index}")
            if site not in table:
                continue
            affine, grid = qparams[site], table[site].grid
            if grid.symmetric or affine.scale.size != 1:
                raise ExportError(
                    f"{site.slot} of {site.node!r} has {affine.scale.size} scales on {grid}; ONNX "
                    f"export writes activations with one unsigned grid per tensor."
                )
            edge = Edge(tensor, (site,), affine, grid)
            before = found[edge.key].sites if edge.key in found else ()
            found[edge.key] = dataclasses.replace(edge, sites=(*before, site))
    return tuple(found.values())


def add_pairs(
    b: OnnxBuilder, edges: tuple[Edge, ...], tensor: str, value: str, producer: Node | None
) -> dict[Site, str]:
    """Adds the quantize/dequantize pairs of one tensor.

    Args:
      b: receives them.
      edges: of the whole network.
      tensor: its name in the graph.
      value: its name in the file.
      producer: the node that computes it, None for the network's input.

    Returns:
      {reader: the value it shall read}.
    """
    read = {}
    for edge in (e for e in edges if e.tensor == tensor):
        saturate = edge.grid.bits < 8 and not moves_codes(producer, edge, edges)
        read |= dict.fromkeys(edge.sites, add_pair(b, edge, value, saturate))
    return read


def moves_codes(producer: Node | None, edge: Edge, edges: tuple[Edge, ...]) -> bool:
    """Whether the producer only moves values that lie on the edge's grid already."""
    if producer is None:
        return False
    moves = isinstance(producer.op, MaxPool | Flatten | Slice) or (
        isinstance(producer.op, Pad) and producer.op.value == 0
    )
    site = Site(producer.name, "input0")
    return moves and any(site in e.sites and e.key[1:] == edge.key[1:] for e in edges)


def without_idle_ceiling(graph: Graph, node: Node, edges: tuple[Edge, ...]) -> Node:
    """The node, less its ceiling where quantizing its output saturates there anyway.

    Nothing but quantized readers may see the tensor. Runtimes merge a plain ReLU into the integer
    convolution before it, but not every clip.
    """
    if not isinstance(node.op, Relu) or node.op.ceiling is None or node.name in graph.outputs:
        return node
    mine = [e for e in edges if e.tensor == node.name]
    seen = {site for e in mine for site in e.sites}
    ceiling = jnp.float32(node.op.ceiling)
    readers = {Site(n.name, f"input{i}") for n, i in consumers(graph)[node.name]}
    idle = all(int(to_codes(ceiling, e.affine, grid=e.grid)) == e.grid.qmax for e in mine)
    return dataclasses.replace(node, op=Relu()) if idle and readers <= seen else node


def add_pair(b: OnnxBuilder, edge: Edge, value: str, saturate: bool) -> str:
    """Adds one quantize/dequantize pair and returns the value its readers read."""
    affine = (
        b.constant(f"{value}.scale", as_scalar(edge.affine.scale)),
        b.constant(f"{value}.zero_point", as_scalar(edge.affine.zero_point)),
    )
    codes, out = b.fresh(f"{value}.codes"), b.fresh(f"{value}.dequantized")
    b.add("QuantizeLinear", f"{value}.quantize", (value, *affine), codes)
    if saturate:
        lowest = b.constant(f"{value}.lowest", np.array(edge.grid.qmin, np.uint8))
        highest = b.constant(f"{value}.highest", np.array(edge.grid.qmax, np.uint8))
        inside = b.fresh(f"{value}.saturated")
        codes = b.add("Clip", f"{value}.saturate", (codes, lowest, highest), inside)
    return b.add("DequantizeLinear", f"{value}.dequantize", (codes, *affine), out)


def as_scalar(x) -> np.ndarray:
    """An array of one element without axes."""
    return np.asarray(x).reshape(())


def add_slots(
    b: OnnxBuilder,
    model: Model,
    quantized: QuantizedModel | None,
    node: Node,
    rank: int,
    order: Order | None,
) -> dict[str, str]:
    """Adds a node's parameters and returns {slot: value to read}.

    Args:
      b: receives them.
      model: the float network.
      quantized: the same network with its grids, None to keep all in float.
      node: whose parameters.
      rank: of the node's first input.
      order: as in `kernel_layout`.
    """
    name, values = printable(node.name), {}
    slots = {k: np.asarray(v, np.float32) for k, v in model.params.get(node.name, {}).items()}
    if isinstance(node.op, BatchNorm):
        slots.setdefault("scale", np.ones_like(slots["mean"]))
        slots.setdefault("bias", np.zeros_like(slots["mean"]))
    for slot, array in sorted(slots.items()):
        integers = None if quantized is None else integer_slot(quantized, node.name, slot)
        stored = array if integers is None else integers.codes
        if slot == "kernel":
            stored = kernel_layout(stored, rank, order)
        if integers is None:
            values[slot] = b.constant(f"{name}.{slot}", stored)
        else:
            integers = dataclasses.replace(integers, codes=stored)
            values[slot] = add_dequantized(b, f"{name}.{slot}", integers)
    return values


@dataclasses.dataclass(frozen=True)
class Integers:
    """A parameter as integers.

    Attributes:
      codes: in the layout of the library.
      scale: float32, one for all or one per output channel.
      zero_point: in the type of `codes`, shape of `scale`.
      kind: ONNX element type where NumPy's does not say it (4 bits).
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    kind: int | None = None


def integer_slot(quantized: QuantizedModel, layer: str, slot: str) -> Integers | None:
    """A kernel or bias as integers, None where it stays float.

    A bias is int32 where kernel and input of its layer are both quantized.
    """
    table = quantized.plan.table
    kernel, data = Site(layer, "kernel"), Site(layer, "input0")
    if slot == "kernel" and kernel in table:
        return integer_kernel(quantized, kernel)
    if slot == "bias" and kernel in table and data in table:
        scales = quantized.qparams[data].scale, quantized.qparams[kernel].scale
        codes = np.asarray(to_bias_codes(quantized.model.params[layer]["bias"], *scales))
        scale = np.asarray(bias_scale(*scales))
        return Integers(codes, scale, np.zeros(scale.shape, np.int32))
    return None


def integer_kernel(quantized: QuantizedModel, site: Site) -> Integers:
    """A kernel's codes as ONNX stores them.

    Up to 4 bits in a 4-bit type; 5 to 7 bits less their zero point in int8, which integer kernels
    handle best; 8 bits as they are.

    Raises:
      ExportError: if scales run along another axis than output channels.
    """
    grid, affine = quantized.plan.table[site].grid, quantized.qparams[site]
    kernel = quantized.model.params[site.node][site.slot]
    codes = np.asarray(to_codes(kernel, affine, grid=grid))
    scale = np.asarray(affine.scale).reshape(-1)
    if scale.size not in (1, codes.shape[-1]):
        raise ExportError(
            f"kernel of {site.node!r} has scales of shape {affine.scale.shape}; ONNX export "
            f"writes one scale per output channel, or one for all."
        )
    zero_point = np.broadcast_to(np.asarray(affine.zero_point).reshape(-1), scale.shape)
    if grid.bits <= 4:
        kind = onnx.TensorProto.INT4 if grid.symmetric else onnx.TensorProto.UINT4
        return Integers(codes, scale, zero_point, kind)
    if grid.bits < 8:
        centred = codes.astype(np.int16) - zero_point
        return Integers(centred.astype(np.int8), scale, np.zeros(scale.shape, np.int8))
    return Integers(codes, scale, zero_point)


def add_dequantized(b: OnnxBuilder, stem: str, integers: Integers) -> str:
    """Adds integers, output channels first, and their DequantizeLinear; returns its output."""
    scale, zero_point = integers.scale, integers.zero_point
    per_tensor = scale.size == 1
    if per_tensor:
        scale, zero_point = as_scalar(scale), as_scalar(zero_point)
    inputs = (
        b.constant(f"{stem}.codes", integers.codes, integers.kind),
        b.constant(f"{stem}.scale", scale),
        b.constant(f"{stem}.zero_point", zero_point, integers.kind),
    )
    attributes = {} if per_tensor else {"axis": 0}
    return b.add("DequantizeLinear", f"{stem}.dequantize", inputs, b.fresh(stem), **attributes)
