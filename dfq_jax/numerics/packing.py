"""Codes of fewer than 8 bits packed into bytes, any number of bits without loss of space.

A code is cut into *planes* of 4, 2 or 1 bits, which divide a byte evenly: 7 bits are planes of 4, 2
and 1. A table of 256 rows turns a byte of a plane into its parts of codes, so any runtime that can
look up rows of a table can unpack them.
"""

import math

import numpy as np
from jaxtyping import Int, UInt8

WIDTHS = (4, 2, 1)
"""Bits of a plane; the widest that fits lies lowest in a code."""

Planes = tuple[tuple[int, int], ...]
"""((bits of a plane, bits below it in a code), ...)."""


def planes_of(bits: int) -> Planes:
    """The planes of codes of 1 to 7 bits, the lowest first.

    Raises:
      ValueError: for other bits.
    """
    if not 1 <= bits <= 7:
        raise ValueError(f"codes of 1 to 7 bits are packed, got {bits}.")
    found, below = [], 0
    for width in WIDTHS:
        if bits & width:
            found.append((width, below))
            below += width
    return tuple(found)


def codes_held(count: int, bits: int) -> int:
    """How many codes lie in the bytes of `count` codes: those of the narrowest plane end last."""
    together = 8 // planes_of(bits)[-1][0]
    return math.ceil(count / together) * together


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of so many codes."""
    return codes_held(count, bits) * bits // 8


def pack(codes: UInt8[np.ndarray, "..."], bits: int) -> tuple[UInt8[np.ndarray, " bytes"], ...]:
    """The bytes of each plane of codes in row order, the first code lowest in a byte.

    Args:
      codes: in [0, 2**bits).
      bits: of a code, 1 to 7.

    Raises:
      ValueError: if a code has more bits.
    """
    flat = codes.reshape(-1)
    if flat.size and int(flat.max()) >> bits:
        raise ValueError(f"a code of {bits} bits is at most {2**bits - 1}, got {flat.max()}.")
    flat = np.pad(flat, (0, codes_held(flat.size, bits) - flat.size))
    found = []
    for width, below in planes_of(bits):
        parts = (flat >> below & (1 << width) - 1).reshape(-1, 8 // width)
        places = np.arange(0, 8, width, dtype=np.uint8)
        found.append(np.bitwise_or.reduce(parts << places, axis=1).astype(np.uint8))
    return tuple(found)


def table(width: int, below: int) -> Int[np.ndarray, "256 parts"]:
    """What the parts of codes in a byte of a plane are worth, for every byte."""
    places = np.arange(0, 8, width)
    return (np.arange(256)[:, None] >> places & (1 << width) - 1) << below


def unpack(planes: tuple[np.ndarray, ...], bits: int, count: int) -> UInt8[np.ndarray, " codes"]:
    """The first `count` codes that `pack` packed."""
    codes = np.zeros(codes_held(count, bits), np.uint8)
    for data, plane in zip(planes, planes_of(bits), strict=True):
        codes += table(*plane)[data].reshape(-1).astype(np.uint8)
    return codes[:count]
