"""Checks that simulator, integer arithmetic and ONNX Runtime compute the same network.

Layer by layer: ONNX Runtime, optimisations off, reveals the codes of every quantized tensor. The
simulator and the integer function then compute each tensor *from ONNX Runtime's codes* of the
tensors before it, so that a difference shows where it arises and nowhere else. End to end: the
scores of all four, on the same images.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jaxtyping import Array, Float, Int

from dfq_jax.errors import DataError, UsageError
from dfq_jax.graph.evaluate import Slots, Tensor, apply_node, evaluate
from dfq_jax.graph.graph import Node
from dfq_jax.io.onnx_layout import FIRST, STORED, as_stored
from dfq_jax.io.onnx_out import serialize
from dfq_jax.io.onnx_values import Draft, Edge, draft, quantized_edges
from dfq_jax.io.runtime import File, feed, read_onnx
from dfq_jax.io.verify_ends import EndCheck, decided, end_checks, end_gaps, first_output
from dfq_jax.io.verify_runners import RUNTIME, runners_of
from dfq_jax.numerics.affine import dequantize, quantize
from dfq_jax.quantize.integer import integer_node
from dfq_jax.quantize.plan import Site
from dfq_jax.quantize.simulate import (
    QuantizedModel,
    argument_hook,
    simulate,
    simulation_hook,
)
from dfq_jax.types import finite_or_none

BATCH = 8
MOST_STEPS = 1
FACTS = ("passed", "most_steps", "agreement", "undecided")
LEAST_AGREEMENT = 0.99

Readers = tuple[tuple[Site, int], ...]
"""((reader, index of the quantized tensor it reads), ...)."""


@dataclasses.dataclass(frozen=True)
class LayerCheck:
    """One quantized tensor, compared with ONNX Runtime without optimisations.

    Attributes:
      tensor: its name in the graph.
      bits: of its grid.
      simulator_steps: largest difference of the float simulation, in quantization steps.
      integer_steps: largest difference of the integer function, in quantization steps.
      simulator_equal: share of codes the float simulation hits exactly.
      integer_equal: share of codes the integer function hits exactly.
      count: number of codes compared.
    """

    tensor: str
    bits: int
    simulator_steps: int
    integer_steps: int
    simulator_equal: float
    integer_equal: float
    count: int


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
      layers: one entry per quantized tensor, in execution order.
      ends: one entry per way to run the network.
      images: number of images compared.
      runtime: version of what ran the file.
      warnings: what the numbers do not show, in sentences.
      runner: what ran the file: `ONNX Runtime`, or `the ONNX reference evaluator` where that is
        missing or too old.
    """

    layers: tuple[LayerCheck, ...]
    ends: tuple[EndCheck, ...]
    images: int
    runtime: str
    warnings: tuple[str, ...] = ()
    runner: str = RUNTIME

    @property
    def most_steps(self) -> int:
        """Largest difference of any layer, in quantization steps."""
        return max((max(c.simulator_steps, c.integer_steps) for c in self.layers), default=0)

    @property
    def agreement(self) -> float:
        """Share of decided images on which ONNX Runtime, optimised, picks the simulator's class."""
        return self.ends[-1].agreement

    @property
    def undecided(self) -> float:
        """Share of images whose best two scores are closer than rounding moves them."""
        return self.ends[-1].undecided

    @property
    def passed(self) -> bool:
        """At most one step in any layer, and the same top class on 99 % of the decided images."""
        return self.most_steps <= MOST_STEPS and self.agreement >= LEAST_AGREEMENT

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        found = {name: getattr(self, name) for name in FACTS}
        ends = [
            {**dataclasses.asdict(end), "difference": finite_or_none(end.difference)}
            for end in self.ends
        ]
        return {**found, **dataclasses.asdict(self), "ends": ends}


def verify(
    quantized: QuantizedModel,
    file: File,
    images: Float[Any, "n h w c"],
    *,
    batch: int = BATCH,
    threads: int = 2,
    on_batch: Callable[[int, int], object] | None = None,
) -> Verification:
    """Compares simulator, integer function and ONNX Runtime on images.

    Where ONNX Runtime is missing, or too old for the file, ONNX's reference evaluator takes its
    place, and a warning says so.

    Args:
      quantized: the network.
      file: path or bytes of the .onnx file written from it.
      images: normalised; every one is compared.
      batch: images held at a time.
      threads: of ONNX Runtime.
      on_batch: called with (images done, images in total).

    Returns:
      Differences by layer, in quantization steps, and end to end.

    Raises:
      UsageError: without images.
      DataError: if the file does not hold this network.
      UnsupportedModelError: if neither runs it.
    """
    if len(images) == 0:
        raise UsageError("verify() needs at least one image.")
    edges, proto = quantized_edges(quantized), read_onnx(file)
    drafted = draft(quantized.model, edges)
    watched = code_values(proto, edges, drafted)
    runners = runners_of(file, serialize(exposed(proto, watched)), threads)
    (_, revealing), *others = runners.ways
    indexed = tuple((site, i) for i, edge in enumerate(edges) for site in edge.sites)
    names, done = list(drafted.outputs.values()), 0
    steps, unequal, counts, ends = [], [], np.zeros(len(edges), np.int64), []
    for valid, x in padded_batches(np.asarray(images, np.float32), batch):
        values = revealing.run([*names, *watched], feed(revealing, x))
        found = dict(zip(watched, values[len(names) :], strict=True))
        codes = [edge_codes(found, edge, drafted) for edge in edges]
        most, differing = layer_gaps(
            quantized, jnp.asarray(x), [jnp.asarray(c) for c in codes], jnp.asarray(valid), indexed
        )
        steps.append(np.asarray(most))
        unequal.append(np.asarray(differing))
        counts += [c[:valid].size for c in codes]
        theirs = [values[: len(names)], *(way.run(names, feed(way, x)) for _, way in others)]
        ends.append(gaps_of_ends(quantized, x, theirs, valid))
        done += valid
        if on_batch is not None:
            on_batch(done, len(images))
    layers = layer_checks(edges, np.stack(steps), np.stack(unequal), counts)
    checks = end_checks(np.stack(ends), ("integer", *(name for name, _ in runners.ways)))
    about = (runners.version, runners.warnings, runners.name)
    return Verification(layers, checks, len(images), *about)


def gaps_of_ends(
    quantized: QuantizedModel, x: np.ndarray, theirs: Sequence[Sequence[np.ndarray]], valid: int
) -> Float[np.ndarray, "runners 4"]:
    """`end_gaps` of the integer function and of what ran the file, on images that count."""
    ours = [outputs(quantized, x, integer=integer) for integer in (False, True)]
    plain = np.asarray(first_output(quantized.model, x))[:valid]
    runs = [[np.asarray(y)[:valid] for y in run] for run in (*ours, *map(in_nhwc, theirs))]
    return end_gaps(runs, decided(runs[0][0], plain))


def padded_batches(images: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of images that count, batch of one static size), the last one filled up."""
    size = min(size, len(images))
    for start in range(0, len(images), size):
        x = images[start : start + size]
        fill = np.repeat(x[-1:], size - len(x), axis=0)
        yield len(x), np.concatenate([x, fill])


def code_values(proto: onnx.ModelProto, edges: tuple[Edge, ...], drafted: Draft) -> list[str]:
    """The values in the file that hold the codes of the edges, each once.

    Raises:
      DataError: if the file quantizes or returns other tensors than the network.
    """
    returned, outputs = [o.name for o in proto.graph.output], list(drafted.outputs.values())
    if returned != outputs:
        raise DataError(
            f"the ONNX file returns {returned}, the network {outputs}. Export the network again."
        )
    wanted = {drafted.pairs[edge.key].codes: edge.tensor for edge in edges}
    nodes = [n for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    computed = {value for n in proto.graph.node for value in n.output}
    missing = [tensor for codes, tensor in wanted.items() if codes not in computed]
    if missing or len(nodes) != len(wanted):
        raise DataError(
            f"the ONNX file quantizes {len(nodes)} tensors, the network {len(wanted)}; "
            f"not in the file: {missing[:5]}. Export the network again."
        )
    return list(wanted)


def edge_codes(found: Mapping[str, np.ndarray], edge: Edge, drafted: Draft) -> np.ndarray:
    """The codes of an edge in the library's layout, out of {value: codes} of the file."""
    codes = found[drafted.pairs[edge.key].codes]
    return as_stored(codes, drafted.layouts.held[edge.tensor])


def exposed(proto: onnx.ModelProto, values: list[str]) -> onnx.ModelProto:
    """The network with integer tensors as further outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    kind = onnx.TensorProto.UINT8
    copy.graph.output.extend(onnx.helper.make_tensor_value_info(v, kind, None) for v in values)
    return copy


def in_nhwc(values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Outputs of the file in the library's layout."""
    return [as_stored(v, FIRST if v.ndim == 4 else STORED) for v in values]


simulated = jax.jit(simulate)


@partial(jax.jit, static_argnames="integer")
def outputs(
    quantized: QuantizedModel, images: Float[Array, "n h w c"], *, integer: bool
) -> tuple[Tensor, ...]:
    """Every output of the quantized network once, simulated or computed in integers."""
    plan, qparams = quantized.plan, quantized.qparams
    hook = argument_hook(plan, qparams) if integer else simulation_hook(plan, qparams)
    apply = partial(integer_node, quantized) if integer else apply_node
    found = evaluate(quantized.model, images, hook=hook, apply=apply)[0]
    return tuple(dict(zip(quantized.model.graph.outputs, found, strict=True)).values())


@partial(jax.jit, static_argnames="readers")
def layer_gaps(
    quantized: QuantizedModel,
    images: Float[Array, "n h w c"],
    codes: list[Array],
    valid: Int[Array, ""],
    readers: Readers,
) -> tuple[Array, Array]:
    """Largest difference and number of differing codes of every quantized tensor.

    Args:
      quantized: the network.
      images: its input.
      codes: codes of every quantized tensor, as ONNX Runtime found them.
      valid: how many images count.
      readers: which site reads which of `codes`.

    Returns:
      Two arrays Int[2 tensors]: row 0 for the simulator, row 1 for the integer function.
    """
    simulator = forced_codes(quantized, images, codes, dict(readers), integer=False)
    integer = forced_codes(quantized, images, codes, dict(readers), integer=True)
    counted = jnp.arange(images.shape[0]) < valid

    def gap(mine: Array, theirs: Array) -> tuple[Array, Array]:
        steps = jnp.abs(mine.astype(jnp.int32) - theirs.astype(jnp.int32))
        if steps.shape[0] == counted.size:  # else a constant's, of one row
            steps = jnp.where(counted.reshape(-1, *(1,) * (steps.ndim - 1)), steps, 0)
        return jnp.max(steps), jnp.sum(steps != 0)

    found = [[gap(m, c) for m, c in zip(r, codes, strict=True)] for r in (simulator, integer)]
    most = jnp.array([[g[0] for g in row] for row in found])
    return most, jnp.array([[g[1] for g in row] for row in found])


def forced_codes(
    quantized: QuantizedModel,
    images: Tensor,
    codes: list[Array],
    readers: Mapping[Site, int],
    *,
    integer: bool,
) -> list[Array]:
    """Codes of every quantized tensor, each computed from the given codes of those before it."""
    found: dict[int, Array] = {}
    snap = simulation_hook(quantized.plan, quantized.qparams)
    table, qparams = quantized.plan.table, quantized.qparams

    def hook(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        forced = list(args)
        for index, x in enumerate(args):
            site = Site(node.name, f"input{index}")
            if site in readers:
                which = readers[site]
                found.setdefault(which, quantize(x, qparams[site], table[site].grid))
                forced[index] = dequantize(codes[which], qparams[site])
        snapped, _ = snap(node, slots, ())
        return (slots if integer else snapped), tuple(forced)

    apply = partial(integer_node, quantized) if integer else apply_node
    evaluate(quantized.model, images, hook=hook, apply=apply)
    return [found[i] for i in range(len(codes))]


def layer_checks(
    edges: tuple[Edge, ...], steps: np.ndarray, unequal: np.ndarray, counts: np.ndarray
) -> tuple[LayerCheck, ...]:
    """One entry per tensor, from arrays Int[batches 2 tensors]."""
    most, equal = steps.max(axis=0), 1 - unequal.sum(axis=0) / np.maximum(counts, 1)
    return tuple(
        LayerCheck(
            edge.tensor,
            edge.grid.bits,
            int(most[0, i]),
            int(most[1, i]),
            float(equal[0, i]),
            float(equal[1, i]),
            int(counts[i]),
        )
        for i, edge in enumerate(edges)
    )
