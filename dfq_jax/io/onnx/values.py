"""The values of the file: which one holds a tensor, its codes, and what each reader reads.

All of it is settled before anything is written, so that `io/verification` finds it in a file again.
"""

import dataclasses
import functools
from typing import assert_never

from dfq_jax.errors import ExportError
from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import Constant, Transpose
from dfq_jax.graph.query import consumers, output_shapes
from dfq_jax.graph.token_ops import Column
from dfq_jax.io.onnx.builder import first_free, printable
from dfq_jax.io.onnx.layout import Layout, Layouts, Shape, filed, find_layouts, still
from dfq_jax.numerics.affine import Affine, Grid
from dfq_jax.numerics.levels import affine_of
from dfq_jax.quantization.plan import Site
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.types import NHWC, Input, InputContract, TokenColumns, Tokens, Values

OUTPUT = "logits"
ROWS = 2
"""Batch size with which shapes are found: tensors of one row do not depend on the images."""

Key = tuple[str, float, int, Grid]


@dataclasses.dataclass(frozen=True)
class QuantizedEdge:
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

    @functools.cached_property
    def key(self) -> Key:
        """What a pair may be shared by: tensor, scale, zero point and grid."""
        return self.tensor, float(self.affine.scale), int(self.affine.zero_point), self.grid


@dataclasses.dataclass(frozen=True)
class QdqPair:
    """The values a QuantizeLinear/DequantizeLinear pair defines."""

    codes: str
    dequantized: str


@dataclasses.dataclass(frozen=True)
class Draft:
    """What is settled before the file is written.

    Attributes:
      shapes: {tensor: its shape as stored, with `ROWS` rows if it depends on the images}.
      layouts: the order of axes of every tensor in the file.
      outputs: {graph output: its value}.
      returned: {value that the file returns: graph output}; one returned twice has two.
      held: {tensor: the value that holds it}; it may be another tensor's.
      pairs: {edge: the values of its pair}; edges of tensors in one value may share one.
      read: {argument of a node: the value it reads}.
    """

    shapes: dict[str, Shape]
    layouts: Layouts
    outputs: dict[str, str]
    returned: dict[str, str]
    held: dict[str, str]
    pairs: dict[Key, QdqPair]
    read: dict[Site, str]

    @property
    def names(self) -> set[str]:
        """Every value named so far."""
        pairs = [name for p in self.pairs.values() for name in (p.codes, p.dequantized)]
        return {*self.returned, *self.held.values(), *pairs}


def quantized_edges(quantized: QuantizedModel) -> tuple[QuantizedEdge, ...]:
    """Every quantized tensor once for each grid it is read with, in execution order.

    Raises:
      ExportError: if a grid is not one unsigned grid for the whole tensor.
    """
    table, qparams = quantized.plan.table, quantized.qparams
    found: dict[Key, QuantizedEdge] = {}
    for node in quantized.model.graph.nodes:
        for index, tensor in enumerate(node.inputs):
            site = Site(node.name, index)
            if site not in table:
                continue
            affine, grid = affine_of(qparams[site]), table[site].grid
            if grid.symmetric or affine.scale.size != 1:
                raise ExportError(
                    f"{site.slot} of {site.node!r} has {affine.scale.size} scales on {grid}; ONNX "
                    f"export writes activations with one unsigned grid per tensor."
                )
            edge = QuantizedEdge(tensor, (site,), affine, grid)
            before = found[edge.key].sites if edge.key in found else ()
            found[edge.key] = dataclasses.replace(edge, sites=(*before, site))
    return tuple(found.values())


def draft(model: Model, edges: tuple[QuantizedEdge, ...]) -> Draft:
    """Settles shapes, layouts and names of the file that holds `model` with these edges.

    Raises:
      ExportError: unless there is one input, and every output is the result of a node.
    """
    graph, shapes = model.graph, output_shapes(model, batch=ROWS)
    layouts, names, readers = find_layouts(graph, shapes), value_names(model), consumers(graph)
    taken, shared = {*names.values(), *source_outputs(model)}, {}
    outputs = {name: names[name] for name in graph.outputs}
    returned = source_outputs(model) or {name: o for o, name in outputs.items()}
    drafted = Draft(shapes, layouts, outputs, returned, {}, {}, {})
    nodes = {node.name: node for node in graph.nodes}
    wanted = lambda name: filed(len(shapes[name]), model.input.layout)
    for tensor, stem in names.items():
        node = nodes.get(tensor)
        if node is None and (missing_axes(model.input) or layouts.held[tensor] != wanted(tensor)):
            value = free(f"{stem}.first", taken)
        elif node is not None and is_still(node, layouts):
            value = drafted.read[Site(tensor, 0)]
        elif node is not None and tensor in outputs and needs_copy(node, drafted, wanted(tensor)):
            value = free(f"{stem}.held", taken)
        else:
            value = stem
        drafted.held[tensor] = value
        for edge in (e for e in edges if e.tensor == tensor):
            pair = shared.get((value, *edge.key[1:]))
            if pair is None:
                pair = QdqPair(free(f"{stem}.codes", taken), free(f"{stem}.dequantized", taken))
                shared[value, *edge.key[1:]] = shared[pair.dequantized, *edge.key[1:]] = pair
            drafted.pairs[edge.key] = pair
            drafted.read.update(dict.fromkeys(edge.sites, pair.dequantized))
        for reader, index in readers[tensor]:
            drafted.read.setdefault(Site(reader.name, index), value)
    return drafted


def input_name(model: Model) -> str:
    """What files call the input, as the source does if it says; of columns what the graph does."""
    read = model.input
    if model.names.input and not isinstance(read, TokenColumns):
        return printable(model.names.input)
    match read:
        case InputContract():
            return "images"
        case Tokens():
            return "input_ids"
        case TokenColumns():
            return "rows"
        case Values():
            return "values"
        case _:
            assert_never(read)


def missing_axes(read: Input) -> tuple[int, ...]:
    """The axes of size 1 that files have not: the height of lines, all places of plain values."""
    if not isinstance(read, InputContract) or read.axes == 4:
        return ()
    first = 1 if read.layout == NHWC else 2
    return tuple(range(first, first + 4 - read.axes))


def value_names(model: Model) -> dict[str, str]:
    """{tensor: a name for its value}: the source's, `images` and `logits` where it says none.

    Between them are the graph's own names. Characters that could disturb a terminal are escaped;
    names that meet are numbered.

    Raises:
      ExportError: unless there is one input, and every output is the result of a node.
    """
    graph = model.graph
    if len(graph.inputs) != 1:
        raise ExportError(f"ONNX export writes networks with one input, got {graph.inputs}.")
    if unchanged := set(graph.outputs) & set(graph.inputs):
        raise ExportError(f"network returns its own input {unchanged}; ONNX export cannot.")
    read, given = input_name(model), source_outputs(model)
    ends = {o: name for name, o in reversed(given.items())} or {graph.outputs[0]: OUTPUT}
    columns = model.input.names if isinstance(model.input, TokenColumns) else ()
    columns = tuple(map(printable, columns))
    names, taken = {graph.inputs[0]: read}, {read, *ends.values(), *given, *columns}
    for node in graph.nodes:
        if isinstance(node.op, Column):
            names[node.name] = columns[node.op.index]
        elif node.name in ends:
            names[node.name] = ends[node.name]
        else:
            names[node.name] = free(printable(node.name), taken)
    return names


def source_outputs(model: Model) -> dict[str, str]:
    """{what the source calls an output: that of the graph}, in order; empty if nothing says.

    A tensor that is returned twice has two names. Names that do not fit the graph count as none.
    """
    named = tuple(zip(map(printable, model.names.outputs), model.graph.outputs, strict=False))
    found = dict(named)
    complete = len(model.names.outputs) == len(model.graph.outputs)
    fits = complete and set(found.items()) == set(named) and input_name(model) not in found
    return found if fits else {}


def free(wanted: str, taken: set[str]) -> str:
    """`wanted` or a variation of it that nothing else is called; taken from now on."""
    name = first_free(wanted, taken)
    taken.add(name)
    return name


def is_still(node: Node, layouts: Layouts) -> bool:
    """Whether the node only names another order of axes in which its input lies already."""
    if not isinstance(node.op, Transpose):
        return False
    return still(node.op.order, layouts.read[node.name]) is not None


def needs_copy(node: Node, drafted: Draft, wanted: Layout) -> bool:
    """Whether an output of the network is computed under another name first."""
    return isinstance(node.op, Constant) or drafted.layouts.held[node.name] != wanted
