"""Bytes and speed of what `dfq quantize` writes, in words: before the work and after it."""

import zlib
from collections.abc import Callable
from pathlib import Path

from dfq_jax.base.words import Store
from dfq_jax.errors import DfqError
from dfq_jax.io.runtime.latency import Latency
from dfq_jax.quantization.plan import WIDE, Scheme
from dfq_jax.report.console import Terminal


def foretell(scheme: Scheme, store: Store, terminal: Terminal) -> None:
    """Says what bits below 8 will do to the file, where a user may expect more of them."""
    for told in foretold(scheme, store):
        terminal.note(f"  {told}")


def foretold(scheme: Scheme, store: Store) -> list[str]:
    """What bits below 8 do to the file, in words."""
    bits, told = scheme.weight_bits, []
    if scheme.activation_bits in (None, WIDE) or isinstance(scheme.sharing, int):
        told.append(
            f"{scheme}: ONNX Runtime multiplies these weights as floats, so the file is smaller "
            "and no faster than that of the float network"
        )
    elif scheme.fewest_bits < 8:
        told.append(
            f"{scheme}: processors multiply bytes, so in ONNX Runtime a network of fewer bits is "
            "smaller than w8a8, and not faster"
        )
    taken = 4 if store == "int4" and bits <= 4 else 8
    if store != "packed" and bits < taken:
        told.append(
            f"--store {store}: weights of {bits} bits take {taken} bits each in the file; "
            f"--store packed takes {bits}"
        )
    return told


def timed(measure: Callable[[], Latency], terminal: Terminal) -> Latency | None:
    """How long both networks take here; None, with a note, where nobody can tell."""
    terminal.stage("timing both networks in ONNX Runtime")
    try:
        return measure()
    except (DfqError, ImportError) as error:
        terminal.note(f"  not timed: {error}")
        return None


def size_line(before: int, after: int, path: Path, store: Store) -> str:
    """Bytes of the float and the integer file; with a byte a code, what packing would leave."""
    line = f"on disk {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({100 * after / before:.1f} %)"
    if store != "int8":
        return line
    return f"{line}; {len(zlib.compress(path.read_bytes())) / 1e6:.2f} MB zipped"


def speed_lines(latency: Latency | None) -> list[str]:
    """The times of both networks, and why the integer one is slower if it is."""
    if latency is None:
        return []
    head = f"in ONNX Runtime {latency.runtime} here, one thread: {latency}"
    return [head, *(f"  {told}" for told in latency.warnings[1:])]
