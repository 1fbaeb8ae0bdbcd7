"""Collects the parts of an ONNX graph, packs constants, keeps names apart."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx

from dfq_jax.graph.graph import Node
from dfq_jax.io.onnx.layout import FIRST, STORED, Layout, Shape, turned

FOUR_BITS = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


@dataclasses.dataclass(frozen=True)
class WrittenNode:
    """One node of the network as it is written.

    Attributes:
      node: what to compute.
      args: values it reads, those of rank 4 and above in `layout`.
      output: value it defines, in layout `gives`.
      slots: {slot: value} of its parameters, laid out by `io/onnx/slots.py`.
      shapes: of its arguments, as stored.
      result: shape of its output, as stored.
      layout: of its arguments of rank 4 and above.
      gives: layout of its output.
      integer: whether its kernel is stored in integers.
    """

    node: Node
    args: tuple[str, ...]
    output: str
    slots: Mapping[str, str]
    shapes: tuple[Shape, ...]
    result: Shape
    layout: Layout
    gives: Layout
    integer: bool

    @property
    def name(self) -> str:
        """The name of the node that computes `output`."""
        return printable(self.node.name)

    @property
    def rank(self) -> int:
        """Number of axes of the first argument."""
        return len(self.shapes[0])


class Link(NamedTuple):
    """One node of a chain: its kind, what it reads beside the value before, its attributes."""

    kind: str
    inputs: tuple[str, ...] = ()
    how: Mapping[str, Any] = {}


class OnnxBuilder:
    """Collects nodes and initialisers of one ONNX graph; lives only while that graph is built.

    Attributes:
      nodes: so far, in execution order.
      initializers: constants so far.
      opset: of the graph.
      any_length: whether rows of tokens have any length when the graph runs.
    """

    def __init__(
        self, images: str, reserved: Iterable[str], opset: int, *, any_length: bool = False
    ) -> None:
        """Starts an empty graph that reads `images`; the names `reserved` are spoken for."""
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.opset = opset
        self.any_length = any_length
        self._images = images
        self._values = {images, *reserved}
        self._names: set[str] = set()
        self._defined: set[str] = set()
        self._known: dict[tuple, str] = {}

    def fresh(self, wanted: str) -> str:
        """`wanted`, or a variation of it if a value has that name; taken from now on."""
        name = first_free(wanted, self._values)
        self._values.add(name)
        return name

    def constant(self, wanted: str, values: np.ndarray, kind: int | None = None) -> str:
        """Adds an initialiser (see `tensor`) and returns its name."""
        name = self.fresh(wanted)
        self.initializers.append(tensor(name, values, kind))
        return name

    def add(
        self,
        kind: str,
        name: str,
        inputs: Iterable[str],
        output: str,
        *,
        place: int = 0,
        **attributes,
    ) -> str:
        """Adds a node called `name`, or a variation of that, and returns its output at `place`."""
        name = first_free(name, self._names)
        self._names.add(name)
        node = onnx.helper.make_node(
            kind, list(inputs), [*[""] * place, output], name=name, **attributes
        )
        self.nodes.append(node)
        self._defined.add(output)
        return output

    def defines(self, value: str) -> bool:
        """Whether a node computes `value` already."""
        return value in self._defined

    def part(self, kind: str, name: str, inputs: Iterable[str], **attributes) -> str:
        """Adds a node whose output is called after it, and returns that."""
        return self.add(kind, name, inputs, self.fresh(name), **attributes)

    def chain(self, name: str, x: str, links: Iterable[Link], output: str) -> str:
        """Adds nodes that each read the one before, the last called `name`; returns `output`."""
        links = tuple(links) or (Link("Identity"),)
        for link in links[:-1]:
            x = self.part(link.kind, f"{output}.{link.kind.lower()}", (x, *link.inputs), **link.how)
        last = links[-1]
        return self.add(last.kind, name, (x, *last.inputs), output, **last.how)

    def number(self, wanted: str, value: float) -> str:
        """Adds a float32 scalar."""
        return self.constant(wanted, np.array(value, np.float32))

    def integers(self, wanted: str, values: Iterable[int]) -> str:
        """Adds a list of int64."""
        return self.constant(wanted, np.array(list(values), np.int64))

    def brought(self, value: str, rank: int, have: Layout, want: Layout) -> str:
        """A value in another layout, transposed once for all its readers."""
        if have == want:
            return value
        known = (value, want)
        if known not in self._known:
            perm = turned(tuple(range(rank)), have, want)
            name = f"{value}.first" if want == FIRST else f"{value}.{STORED}"
            self._known[known] = self.part("Transpose", name, (value,), perm=perm)
        return self._known[known]

    def expanded(self, value: str, shape: Iterable[int]) -> str:
        """A value of one row, repeated for every image of the batch; `shape` is without rows."""
        known = (value, "rows")
        if known not in self._known:
            sizes = self.integers(f"{value}.sizes", shape)
            target = self.part("Concat", f"{value}.shape", (self.batch(), sizes), axis=0)
            self._known[known] = self.part("Expand", f"{value}.rows", (value, target))
        return self._known[known]

    def shared(self, key: tuple, add: Callable[[], str]) -> str:
        """A value for all who ask with the same key, added for the first of them."""
        if key not in self._known:
            self._known[key] = add()
        return self._known[key]

    def batch(self) -> str:
        """The batch size as a list of one, computed once."""
        known = (self._images, "batch")
        if known not in self._known:
            name = f"{self._images}.batch"
            self._known[known] = self.part("Shape", name, (self._images,), start=0, end=1)
        return self._known[known]


def first_free(wanted: str, taken: set[str]) -> str:
    """`wanted`, or `wanted_2`, `wanted_3` ... where that is taken."""
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def tensor(name: str, values: np.ndarray, kind: int | None = None) -> onnx.TensorProto:
    """A constant with its bytes in `raw_data`, never in the bulky typed fields.

    Args:
      name: of the initialiser.
      values: any array of a type ONNX knows.
      kind: an ONNX element type; INT4 and UINT4 pack two values a byte, the first one low.
    """
    kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype) if kind is None else kind
    raw = pack_nibbles(values) if kind in FOUR_BITS else as_little_endian(values)
    return onnx.TensorProto(name=name, dims=values.shape, data_type=kind, raw_data=raw)


def as_little_endian(values: np.ndarray) -> bytes:
    """Bytes of an array in row order, least significant byte first."""
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()


def pack_nibbles(values: np.ndarray) -> bytes:
    """Two 4-bit integers a byte, the first in the low half; an odd one out is followed by 0."""
    flat = values.reshape(-1).astype(np.int16) & 15
    pairs = np.pad(flat, (0, flat.size % 2)).reshape(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8).tobytes()


def printable(name: str) -> str:
    """`name` with control characters and the like written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
