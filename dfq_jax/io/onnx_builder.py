"""Collects the parts of an ONNX graph, packs constants, keeps names apart."""

from collections.abc import Iterable

import numpy as np
import onnx

FOUR_BITS = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


class OnnxBuilder:
    """Collects nodes and initialisers of one ONNX graph; lives only while that graph is built.

    Attributes:
      nodes: so far, in execution order.
      initializers: constants so far.
    """

    def __init__(self, reserved: Iterable[str]) -> None:
        """Starts an empty graph in which the names `reserved` are spoken for."""
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._values = set(reserved)
        self._names: set[str] = set()

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

    def add(self, kind: str, name: str, inputs: Iterable[str], output: str, **attributes) -> str:
        """Adds a node called `name`, or a variation of that, and returns its output."""
        name = first_free(name, self._names)
        self._names.add(name)
        node = onnx.helper.make_node(kind, list(inputs), [output], name=name, **attributes)
        self.nodes.append(node)
        return output


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
