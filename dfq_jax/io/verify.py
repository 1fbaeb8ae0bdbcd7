"""Checks that simulator, integer arithmetic and ONNX Runtime compute the same network.

Layer by layer: ONNX Runtime, optimisations off, reveals the codes of every quantized tensor. The
simulator and the integer function then compute each tensor *from ONNX Runtime's codes* of the
tensors before it, so that a difference shows where it arises and nowhere else. End to end: the
scores of all four, on the same images.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jaxtyping import Array, Float, Int

from dfq_jax.errors import DataError, UsageError
from dfq_jax.graph.evaluate import Slots, Tensor, apply_node, evaluate
from dfq_jax.graph.graph import Model, Node
from dfq_jax.io.onnx_out import flat_orders, serialize, value_names
from dfq_jax.io.onnx_qdq import Edge, quantized_edges
from dfq_jax.io.runtime import (
    File,
    cpu_features,
    feed,
    onnxruntime,
    open_session,
    read_onnx,
    run,
    saturation_risk,
)
from dfq_jax.numerics.affine import dequantize, quantize
from dfq_jax.quantize.integer import integer_node, integer_predict
from dfq_jax.quantize.plan import Site
from dfq_jax.quantize.simulate import QuantizedModel, simulate, simulation_hook
from dfq_jax.types import finite_or_none

BATCH = 8
MOST_STEPS = 1
LEAST_AGREEMENT = 0.99
SATURATION = (
    "This processor has AVX2 but no VNNI: its 8-bit products can saturate at 16 bits, so optimised "
    "results may differ from those of other machines."
)

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
class EndCheck:
    """Scores of one way to run the network, compared with those of the simulator.

    Attributes:
      runner: `integer`, `onnxruntime off` or `onnxruntime on`.
      difference: largest absolute difference of a score.
      agreement: share of images with the same top class.
    """

    runner: str
    difference: float
    agreement: float


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
      layers: one entry per quantized tensor, in execution order.
      ends: one entry per way to run the network.
      images: number of images compared.
      runtime: version of ONNX Runtime.
      warnings: what the numbers do not show, in sentences.
    """

    layers: tuple[LayerCheck, ...]
    ends: tuple[EndCheck, ...]
    images: int
    runtime: str
    warnings: tuple[str, ...] = ()

    @property
    def most_steps(self) -> int:
        """Largest difference of any layer, in quantization steps."""
        return max((max(c.simulator_steps, c.integer_steps) for c in self.layers), default=0)

    @property
    def agreement(self) -> float:
        """Share of images on which ONNX Runtime, optimised, picks the simulator's top class."""
        return self.ends[-1].agreement

    @property
    def passed(self) -> bool:
        """At most one step in any layer, and the same top class on 99 % of the images."""
        return self.most_steps <= MOST_STEPS and self.agreement >= LEAST_AGREEMENT

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        found = {name: getattr(self, name) for name in ("passed", "most_steps", "agreement")}
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
      ImportError: if ONNX Runtime is not installed.
    """
    if len(images) == 0:
        raise UsageError("verify() needs at least one image.")
    edges, proto = quantized_edges(quantized), read_onnx(file)
    watched = code_values(proto, quantized.model, edges)
    off = open_session(serialize(exposed(proto, watched)), optimize=False, threads=threads)
    on = open_session(file, optimize=True, threads=threads)
    indexed = tuple((site, i) for i, edge in enumerate(edges) for site in edge.sites)
    orders = flat_orders(quantized.model)
    steps, unequal, counts, scores = [], [], np.zeros(len(edges), np.int64), []
    for valid, x in padded_batches(np.asarray(images, np.float32), batch):
        logits, *codes = off.run([proto.graph.output[0].name, *watched], feed(off, x))
        codes = [as_nhwc(c, orders.get(e.tensor)) for c, e in zip(codes, edges, strict=True)]
        most, differing = layer_gaps(
            quantized, jnp.asarray(x), [jnp.asarray(c) for c in codes], jnp.asarray(valid), indexed
        )
        steps.append(np.asarray(most))
        unequal.append(np.asarray(differing))
        counts += [c[:valid].size for c in codes]
        runs = (simulated(quantized, x), integer_predict(quantized, x), logits, run(on, x))
        scores.append(np.stack([np.asarray(r)[:valid] for r in runs]))
        if on_batch is not None:
            on_batch(sum(s.shape[1] for s in scores), len(images))
    layers = layer_checks(edges, np.stack(steps), np.stack(unequal), counts)
    ends = end_checks(np.concatenate(scores, axis=1))
    warnings = (SATURATION,) if saturation_risk(cpu_features()) else ()
    return Verification(layers, ends, len(images), onnxruntime().__version__, warnings)


def padded_batches(images: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of images that count, batch of one static size), the last one filled up."""
    size = min(size, len(images))
    for start in range(0, len(images), size):
        x = images[start : start + size]
        fill = np.repeat(x[-1:], size - len(x), axis=0)
        yield len(x), np.concatenate([x, fill])


def code_values(proto: onnx.ModelProto, model: Model, edges: tuple[Edge, ...]) -> list[str]:
    """The value in the file that holds the codes of each edge.

    Raises:
      DataError: if the file quantizes other tensors than the network.
    """
    names = value_names(model.graph)
    after = {n.input[0]: n for n in proto.graph.node if n.op_type == "Clip"}
    pairs: dict[str, list[str]] = {}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            codes = node.output[0]
            codes = after[codes].output[0] if codes in after else codes
            pairs.setdefault(node.input[0], []).append(codes)
    wanted = [pairs.get(names[edge.tensor], []) for edge in edges]
    if not all(wanted) or len(edges) != sum(map(len, pairs.values())):
        missing = [e.tensor for e, found in zip(edges, wanted, strict=True) if not found]
        raise DataError(
            f"the ONNX file quantizes {sum(map(len, pairs.values()))} tensors, the network "
            f"{len(edges)}; not in the file: {missing[:5]}. Export the network again."
        )
    return [found.pop(0) for found in wanted]


def exposed(proto: onnx.ModelProto, values: list[str]) -> onnx.ModelProto:
    """The network with integer tensors as further outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    kind = onnx.TensorProto.UINT8
    copy.graph.output.extend(onnx.helper.make_tensor_value_info(v, kind, None) for v in values)
    return copy


def as_nhwc(codes: np.ndarray, order: tuple[int, int, int] | None) -> np.ndarray:
    """Codes in the library's layout; `order` is (h, w, c) of an image flattened channels first."""
    if order is not None:
        h, w, c = order
        return codes.reshape(-1, c, h, w).transpose(0, 2, 3, 1).reshape(codes.shape)
    return codes.transpose(0, 2, 3, 1) if codes.ndim == 4 else codes


simulated = jax.jit(simulate)


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


def end_checks(scores: Float[np.ndarray, "runners n classes"]) -> tuple[EndCheck, ...]:
    """Every runner after the first compared with the first."""
    names = ("integer", "onnxruntime off", "onnxruntime on")
    simulator, *others = scores
    return tuple(
        EndCheck(
            name,
            float(np.max(np.abs(other - simulator))),
            float(np.mean(other.argmax(-1) == simulator.argmax(-1))),
        )
        for name, other in zip(names, others, strict=True)
    )
