"""How long one batch takes in ONNX Runtime: the float network against the integer one."""

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.graph.tasks import A_NOUN, Noun, noun_of
from dfq_jax.io.onnx.builder import FOUR_BITS
from dfq_jax.io.runtime.session import (
    File,
    cpu_features,
    feed,
    fixed_batch,
    input_of,
    onnxruntime,
    open_session,
    read_onnx,
    unreadable_as_data,
)
from dfq_jax.types import NCHW, Input, InputContract, TokenColumns, Tokens

LEAST = 3
"""Timed runs without which there is no median."""


@dataclasses.dataclass(frozen=True)
class Latency:
    """Median times on this machine.

    Attributes:
      float_ms: of the float network.
      int_ms: of the integer network.
      batch: images at a time.
      threads: of ONNX Runtime.
      runs: how many times each was timed.
      runtime: version of ONNX Runtime.
      features: what this processor has for 8-bit products.
      warnings: what the user should know, in sentences.
      noun: what one example is called.
    """

    float_ms: float
    int_ms: float
    batch: int
    threads: int
    runs: int
    runtime: str
    features: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    noun: Noun = "image"

    @property
    def speedup(self) -> float:
        """Float time over integer time."""
        return self.float_ms / self.int_ms

    def __str__(self) -> str:
        """The comparison in words."""
        faster = self.int_ms <= self.float_ms
        times = self.speedup if faster else 1 / self.speedup
        return (
            f"{self.int_ms:.2f} ms {A_NOUN[self.noun]} against {self.float_ms:.2f} ms in float, "
            f"{times:.2f}x as {'fast' if faster else 'SLOW'}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"speedup": self.speedup, **dataclasses.asdict(self)}


def bench(
    float_onnx: File,
    int_onnx: File,
    *,
    batch: int = 1,
    threads: int = 2,
    runs: int = 50,
    warmup: int = 5,
    seconds: float = math.inf,
) -> Latency:
    """Times both networks in turn, so that disturbances of the machine hit both.

    Args:
      float_onnx: path or bytes of the float network.
      int_onnx: path or bytes of the integer network.
      batch: images at a time.
      threads: of ONNX Runtime.
      runs: timed runs of each.
      warmup: untimed runs of each before.
      seconds: after which there are no more runs, once each was timed `LEAST` times.

    Returns:
      Median milliseconds and what explains them.

    Raises:
      UsageError: if `batch`, `threads` or `runs` is below 1, or `warmup` below 0.
      ImportError: if ONNX Runtime is not installed.
    """
    if min(batch, threads, runs) < 1 or warmup < 0:
        raise UsageError(
            f"bench() needs batch, threads and runs >= 1 and warmup >= 0, got {batch}, {threads}, "
            f"{runs} and {warmup}."
        )
    sessions = [open_session(f, optimize=True, threads=threads) for f in (float_onnx, int_onnx)]
    reads = [input_of(file) for file in (float_onnx, int_onnx)]
    feeds = [
        random_feed(session, batch, read) for session, read in zip(sessions, reads, strict=True)
    ]
    times = timed_in_turn(sessions, feeds, runs=runs, warmup=warmup, seconds=seconds)
    float_ms, int_ms = map(statistics.median, times)
    features = cpu_features()
    stored = read_onnx(int_onnx).graph.initializer
    four_bits = any(t.data_type in FOUR_BITS for t in stored)
    notes = warnings(float_ms, int_ms, features, four_bits)
    version = onnxruntime().__version__
    noun = "image" if reads[0] is None else noun_of(reads[0])
    return Latency(float_ms, int_ms, batch, threads, len(times[1]), version, features, notes, noun)


def median_ms(file: File, *, runs: int = 30, warmup: int = 3, seconds: float = 2.0) -> float:
    """Milliseconds of an image, batch 1, on 2 threads; other arguments as of `bench`."""
    session = open_session(file, optimize=True)
    inputs = random_feed(session, 1, input_of(file))
    (times,) = timed_in_turn([session], [inputs], runs=runs, warmup=warmup, seconds=seconds)
    return statistics.median(times)


def timed_in_turn(
    sessions: Sequence[Any],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    runs: int,
    warmup: int,
    seconds: float,
) -> list[list[float]]:
    """Milliseconds of every run of every session, which take turns; see `bench`."""
    times: list[list[float]] = [[] for _ in sessions]
    end = time.perf_counter() + seconds
    for index in range(warmup + runs):
        if len(times[-1]) >= LEAST and time.perf_counter() > end:
            break
        for session, inputs, spent in zip(sessions, feeds, times, strict=True):
            start = time.perf_counter()
            with unreadable_as_data():
                session.run(None, inputs)
            if index >= warmup:
                spent.append(1000 * (time.perf_counter() - start))
    return times


def random_feed(session: Any, batch: int, read: Input | None) -> dict[str, np.ndarray]:
    """Normal noise, or rows of tokens, in the shape of the session's inputs.

    Free sizes are as the file says of what it reads. A file of a fixed batch gets that many.

    Raises:
      UnsupportedModelError: if nothing says how large its images are.
    """
    source = session.get_inputs()[0]
    if isinstance(read, Tokens | TokenColumns):
        return feed(session, read.example(jax.random.key(0), fixed_batch(session) or batch))
    contract = read if isinstance(read, InputContract) else None
    shape = [fixed_batch(session) or batch, *source.shape[1:]]
    if contract is not None and len(shape) == 4:
        space = slice(2, 4) if contract.layout == NCHW else slice(1, 3)
        shape[space] = contract.height, contract.width
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise UnsupportedModelError(
            f"cannot time a file that reads images of size {source.shape}: export it with a size."
        )
    return {source.name: np.random.default_rng(0).standard_normal(shape, np.float32)}


def warnings(
    float_ms: float, int_ms: float, features: tuple[str, ...], four_bits: bool
) -> tuple[str, ...]:
    """What to tell the user about the measured times."""
    if int_ms <= float_ms:
        return ()
    notes = [f"The integer network is slower here: {int_ms:.2f} ms against {float_ms:.2f} ms."]
    if four_bits:
        notes.append(
            "ONNX Runtime computes layers with 4-bit weights in float on processors; the form "
            '`store="packed"` is as small and runs as 8 bits do.'
        )
    if features and not any("vnni" in f or f.startswith(("amx", "asimd", "i8")) for f in features):
        notes.append("This processor has no instructions for 8-bit products (VNNI, AMX).")
    return tuple(notes)
