"""Checks that a file holds a quantized network, and that what runs it computes what was simulated.

Four questions, each of which can fail a file (`io/verification/rules.py` has the limits):

1. Is every constant and node of the file what the exporter writes for this network?
2. Layer by layer: does ONNX Runtime, optimisations off, compute the codes that simulator and
   integer function compute from its own codes of the tensors before?
3. End to end, optimisations on: is every part of every output as near to the simulator as two
   exact roundings of one network are to each other?
4. Does every decision between classes stay that no rounding could turn?

The first does not depend on images; the others hold for any, sure or unsure, natural or noise.

Processors with AVX2 and without VNNI saturate sums of 8-bit products at 16 bits when ONNX Runtime
optimises. That is no fault of the file, and other machines do not do it. There the third and fourth
question are asked in ONNX Runtime's precise mode, which does not saturate, and how far saturation
moves the outputs on this machine is told as a warning.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import onnx
from jaxtyping import Shaped

from dfq_jax.errors import DataError, UsageError
from dfq_jax.graph.heads import Part
from dfq_jax.graph.tasks import Noun, Task, noun_of, parts_of
from dfq_jax.io.onnx.export import serialize
from dfq_jax.io.onnx.values import Draft, QuantizedEdge, draft, quantized_edges
from dfq_jax.io.runtime.session import File, feed, read_onnx
from dfq_jax.io.verification.ends import (
    DecisionsSeen,
    EndCheck,
    OutputCheck,
    end_checks,
    look,
    output_check,
)
from dfq_jax.io.verification.file import differences
from dfq_jax.io.verification.layers import CodeGap, LayerCheck, Readers, layer_checks, layer_gaps
from dfq_jax.io.verification.rules import broken_file, failures_of, judged_by, moved_by_saturation
from dfq_jax.io.verification.runners import RUNTIME, Runners, runners_of
from dfq_jax.io.verification.values import code_values, edge_codes, exposed, in_nhwc
from dfq_jax.io.verification.ways import WAYS, beyond_integers, outputs, simulated
from dfq_jax.quantization.node_by_node import BATCH, Batch, in_batches
from dfq_jax.quantization.simulate import QuantizedModel

__all__ = ["Verification", "simulated", "verify"]

PIXELS = BATCH * 256 * 256
"""Of the images held at a time: every quantized tensor of theirs is held several times over."""
FACTS = ("passed", "most_steps", "agreement", "undecided")


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
      layers: one entry per quantized tensor, in execution order.
      ends: one entry per way to run the network; the last one is judged.
      images: number of images compared.
      runtime: version of what ran the file.
      warnings: what the numbers do not show, in sentences.
      runner: what ran the file: `ONNX Runtime`, or `the ONNX reference evaluator` where that is
        missing or too old.
      outputs: one entry per part of each output.
      failures: why the file does not pass, a sentence for each rule it breaks; empty if it passes.
      noun: what one of the images is called.
    """

    layers: tuple[LayerCheck, ...]
    ends: tuple[EndCheck, ...]
    images: int
    runtime: str
    warnings: tuple[str, ...] = ()
    runner: str = RUNTIME
    outputs: tuple[OutputCheck, ...] = ()
    failures: tuple[str, ...] = ()
    noun: Noun = "image"

    @property
    def most_steps(self) -> int:
        """Largest difference of any layer, in quantization steps."""
        return max((check.steps for check in self.layers), default=0)

    @property
    def agreement(self) -> float:
        """Share of decisions that count on which what is judged picks the simulator's class."""
        return self.ends[-1].agreement

    @property
    def undecided(self) -> float:
        """Share of decisions whose margin is so small that rounding may turn it."""
        return self.ends[-1].undecided

    @property
    def counted(self) -> int:
        """How many decisions have a margin that no rounding closes."""
        return sum(output.counted for output in self.outputs)

    @property
    def noise(self) -> float:
        """Largest difference of a part of an output, in units of the noise of rounding."""
        name = self.ends[-1].runner
        return max((output.differences[name] for output in self.outputs), default=0.0)

    @property
    def passed(self) -> bool:
        """Whether no rule is broken."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        found = {name: getattr(self, name) for name in FACTS}
        ends, outputs = ([x.to_dict() for x in xs] for xs in (self.ends, self.outputs))
        return {**found, **dataclasses.asdict(self), "ends": ends, "outputs": outputs}


@dataclasses.dataclass(frozen=True)
class Ways:
    """What is compared: the network, what runs its file, and where its values are in there."""

    quantized: QuantizedModel
    edges: tuple[QuantizedEdge, ...]
    drafted: Draft
    runners: Runners
    watched: tuple[str, ...]
    limit: str | None

    @property
    def integer(self) -> bool:
        """Whether the integer function can run the network; `limit` says why not."""
        return self.limit is None

    @property
    def names(self) -> tuple[str, ...]:
        """What is compared with the simulator, in order."""
        ran = tuple(name for name, _ in self.runners.ways)
        return ("integer", *ran) if self.integer else ran

    @property
    def readers(self) -> Readers:
        """Which site reads which edge."""
        return tuple((site, i) for i, edge in enumerate(self.edges) for site in edge.sites)


class Told(NamedTuple):
    """What one batch told.

    Attributes:
      simulator: how the simulator's codes differ, by tensor.
      integer: how those of the integer function do; empty if it is left out.
      counts: codes compared, by tensor.
      parts: how each part of the outputs differs.
    """

    simulator: list[CodeGap]
    integer: list[CodeGap]
    counts: np.ndarray
    parts: list[DecisionsSeen]


def verify(
    quantized: QuantizedModel,
    file: File,
    images: Shaped[Any, "n ..."],
    *,
    task: Task | None = None,
    batch: int | None = None,
    threads: int = 2,
    on_batch: Callable[[int, int], object] | None = None,
) -> Verification:
    """Compares a file with its network, and what runs it with the simulator.

    Where ONNX Runtime is missing, or too old for the file, ONNX's reference evaluator takes its
    place, and a warning says so.

    Args:
      quantized: the network.
      file: path or bytes of the .onnx file written from it.
      images: normalised; every one is compared.
      task: what the network is for, which says what decides; None for what its graph says.
      batch: images held at a time; None for `BATCH`, or fewer of more than 256 x 256 pixels.
      threads: of ONNX Runtime.
      on_batch: called with (images done, images in total).

    Returns:
      Differences by layer, in quantization steps, and of every output, in units of the noise of
      rounding; and which rule is broken, if one is.

    Raises:
      UsageError: without images.
      DataError: if the file holds so different a network that it cannot be compared.
      UnsupportedModelError: if neither runs it.
    """
    if len(images) == 0:
        raise UsageError("verify() needs at least one image.")
    proto = read_onnx(file)
    damage = tuple(differences(proto, quantized))
    parts = parts_of(quantized.model, task)
    try:
        ways = ways_of(quantized, file, proto, threads)
        size = batch or images_at_a_time(images.shape)
        seen = [*all_batches(ways, parts, np.asarray(images), size, on_batch)]
    except Exception as error:
        if not damage:
            raise
        told = broken_file(damage)[0]
        raise DataError(f"{told}. It cannot be run either: {one_line(error)}") from error
    return summed_up(ways, parts, seen, damage, len(images))


def images_at_a_time(shape: tuple[int, ...]) -> int:
    """How many examples of this shape, batch first, are held at a time.

    Of large images, so many that hardly any place is left over in the last batch.
    """
    most = PIXELS // prod(shape[1:3])
    if most >= BATCH:
        return BATCH
    return -(-shape[0] // -(-shape[0] // max(most, 1)))


def one_line(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).partition("\n")[0]


def ways_of(quantized: QuantizedModel, file: File, proto: onnx.ModelProto, threads: int) -> Ways:
    """What is compared, and what runs it.

    Raises:
      DataError: if the file quantizes or returns other tensors than the network.
      UnsupportedModelError: if nothing runs it.
    """
    edges = quantized_edges(quantized)
    drafted = draft(quantized.model, edges)
    watched = code_values(proto, edges, drafted)
    runners = runners_of(file, serialize(exposed(proto, watched)), threads)
    return Ways(quantized, edges, drafted, runners, tuple(watched), beyond_integers(quantized))


def all_batches(
    ways: Ways,
    parts: Sequence[Part],
    images: Shaped[np.ndarray, "n ..."],
    size: int,
    on_batch: Callable[[int, int], object] | None,
) -> Iterator[Told]:
    """Compares all images, batch by batch."""
    done = 0
    for part in in_batches(images, size):
        yield compared(ways, parts, part)
        done += part.valid
        if on_batch is not None:
            on_batch(done, len(images))


def summed_up(
    ways: Ways, parts: Sequence[Part], seen: Sequence[Told], damage: Sequence[str], images: int
) -> Verification:
    """What all batches told, and the rules that it breaks."""
    counts = np.sum([b.counts for b in seen], axis=0)
    gaps = [b.simulator for b in seen], [b.integer for b in seen] if ways.integer else []
    layers = layer_checks(ways.edges, *gaps, counts)
    outputs = tuple(
        output_check(part, [b.parts[i] for b in seen], ways.names) for i, part in enumerate(parts)
    )
    worst = np.max(
        [p.worst for b in seen for p in b.parts] or np.zeros((1, len(ways.names))), axis=0
    )
    ends = end_checks(outputs, worst, ways.names)
    failures = failures_of(damage, layers, outputs, judged_by(ways.names))
    left = () if ways.integer else (f"The integer function was left out: {ways.limit}",)
    warnings = (*ways.runners.warnings, *moved_by_saturation(outputs), *left)
    about = (ways.runners.version, warnings, ways.runners.name)
    noun = noun_of(ways.quantized.model.input)
    return Verification(layers, ends, images, *about, outputs, failures, noun)


def compared(ways: Ways, parts: Sequence[Part], batch: Batch) -> Told:
    """Runs one batch in every way."""
    x, valid = np.asarray(batch.images), batch.valid
    names, (_, revealing), *others = ways.drafted.outputs.values(), *ways.runners.ways
    names = list(names)
    layout = ways.quantized.model.input.layout
    values = revealing.run([*names, *ways.watched], feed(revealing, x, layout))
    found = dict(zip(ways.watched, values[len(names) :], strict=True))
    codes = [edge_codes(found, edge, ways.drafted) for edge in ways.edges]
    gaps = lambda integer: layer_gaps(ways.quantized, batch, codes, ways.readers, integer=integer)
    ran = [values[: len(names)], *(way.run(names, feed(way, x, layout)) for _, way in others)]
    ours = [outputs(ways.quantized, batch.images, way=way) for way in WAYS[: 2 + ways.integer]]
    ran = [in_nhwc(values, layout) for values in ran]
    runs = [dict(zip(ways.drafted.outputs, run, strict=True)) for run in (*ours, *ran)]
    return Told(
        gaps(False),
        gaps(True) if ways.integer else [],
        np.array([c[:valid].size for c in codes], np.int64),
        [look(part, [np.asarray(run[part.output])[:valid] for run in runs]) for part in parts],
    )
