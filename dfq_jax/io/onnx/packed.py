"""Packed codes in an ONNX file, and the nodes that unpack them when a runtime loads it.

ONNX has 4-bit integers, but ONNX Runtime multiplies them as floats: it has integer kernels for 8
bits only. So codes are stored packed, and a few nodes that read only constants make int8 of them.
An optimising runtime computes such nodes once, when it loads the file, and from there on it has an
8-bit network, fused as ever. All of these operators are older than 4-bit integers.
"""

import functools
from collections.abc import Sequence

import numpy as np
import onnx

from dfq_jax.io.onnx.builder import OnnxBuilder
from dfq_jax.numerics.packing import codes_held, pack, planes_of, table

INT8, INT32 = onnx.TensorProto.INT8, onnx.TensorProto.INT32


def add_unpacked(
    b: OnnxBuilder, stem: str, codes: np.ndarray, offset: np.ndarray, bits: int
) -> str:
    """Adds packed codes less an offset, as int8, and returns the value.

    Args:
      b: receives them.
      stem: of the names.
      codes: uint8 in [0, 2**bits), laid out as the file's operator reads them.
      offset: uint8, what stands for zero; of a shape that broadcasts to that of `codes`.
      bits: of a code, 2 to 7.
    """
    planes = zip(pack(codes, bits), planes_of(bits), strict=True)
    parts = [looked_up(b, f"{stem}.plane{i}", *plane) for i, plane in enumerate(planes)]
    filled = codes_held(codes.size, bits) != codes.size
    if len(parts) > 1 or filled:  # else rows are whole, and one Reshape does
        row = shared_integers(b, (-1,))
        parts = [b.part("Reshape", f"{part}.flat", (part, row)) for part in parts]
    total = functools.reduce(lambda x, y: b.part("Add", f"{y}.added", (x, y)), parts)
    if filled:
        ends = shared_integers(b, (0,)), shared_integers(b, (codes.size,))
        total = b.part("Slice", f"{stem}.counted", (total, *ends))
    shaped = b.part("Reshape", f"{stem}.shaped", (total, shared_integers(b, codes.shape)))
    zero = b.part("Cast", f"{stem}.zero", (b.constant(f"{stem}.offset", offset),), to=INT32)
    centred = b.part("Sub", f"{stem}.centred", (shaped, zero))
    return b.part("Cast", f"{stem}.codes", (centred,), to=INT8)


def looked_up(b: OnnxBuilder, stem: str, data: np.ndarray, plane: tuple[int, int]) -> str:
    """What each byte of a plane adds to the codes, in rows."""
    rows = b.part("Cast", f"{stem}.rows", (b.constant(stem, data),), to=INT32)
    return b.part("Gather", f"{stem}.parts", (shared_table(b, plane), rows))


def shared_table(b: OnnxBuilder, plane: tuple[int, int]) -> str:
    """The table of a plane in int32, one for the file."""
    width, below = plane
    name = f"table.{width}.{below}"

    def add() -> str:
        stored = b.constant(f"{name}.bytes", table(*plane).astype(np.uint8))
        return b.part("Cast", name, (stored,), to=INT32)

    return b.shared(("table", plane), add)


def shared_integers(b: OnnxBuilder, values: Sequence[int]) -> str:
    """A list of int64 that many nodes read."""
    name = "x".join(map(str, values))
    return b.shared(("integers", tuple(values)), lambda: b.integers(f"shape.{name}", values))
