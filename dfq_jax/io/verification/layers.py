"""Codes of every quantized tensor, compared with those of ONNX Runtime without optimisations.

Simulator and integer function compute each tensor *from the runtime's codes* of the tensors before
it, so that a difference shows where it arises and nowhere else. Both sides add in floats in another
order; a value that lies half way between two codes may go to either. Any other difference is a
fault, so what is measured is not only how many steps two codes are apart, but how far the value
lies outside of what its code stands for.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from dfq_jax.graph.evaluate import Slots, Tensor
from dfq_jax.graph.graph import Node
from dfq_jax.io.onnx.values import QuantizedEdge
from dfq_jax.numerics.affine import Affine, Grid, dequantize, over, quantize
from dfq_jax.numerics.levels import affine_of
from dfq_jax.quantization.node_by_node import Batch, in_integers, simulating
from dfq_jax.quantization.plan import Site
from dfq_jax.quantization.simulate import QuantizedModel

Readers = tuple[tuple[Site, int], ...]
"""((reader, index of the quantized tensor it reads), ...)."""


@dataclasses.dataclass(frozen=True)
class LayerCheck:
    """One quantized tensor, compared with ONNX Runtime without optimisations.

    Attributes:
      tensor: its name in the graph.
      bits: of its grid.
      simulator_steps: largest difference of the float simulation, in quantization steps.
      integer_steps: largest difference of the integer function, in quantization steps; None where
        sums are too long for it.
      simulator_equal: share of codes the float simulation hits exactly.
      integer_equal: share of codes the integer function hits exactly.
      count: number of codes compared.
      simulator_beyond: how far the simulator's values lie at most outside of what the runtime's
        codes stand for, in quantization steps: 0 but for what float sums err.
      integer_beyond: the same of the integer function.
    """

    tensor: str
    bits: int
    simulator_steps: int
    integer_steps: int | None
    simulator_equal: float
    integer_equal: float | None
    count: int
    simulator_beyond: float = 0.0
    integer_beyond: float | None = 0.0

    @property
    def steps(self) -> int:
        """The larger difference of the two."""
        return max(self.simulator_steps, self.integer_steps or 0)

    @property
    def equal(self) -> float:
        """The smaller share of equal codes of the two."""
        return min(self.simulator_equal, 1.0 if self.integer_equal is None else self.integer_equal)

    @property
    def beyond(self) -> float:
        """The larger distance of the two."""
        return max(self.simulator_beyond, self.integer_beyond or 0.0)


class CodeGap(NamedTuple):
    """How codes of one tensor differ: most steps, how many, and how far from a tie at most."""

    steps: int
    unequal: int
    beyond: float


def layer_gaps(
    quantized: QuantizedModel,
    batch: Batch,
    codes: list[np.ndarray],
    readers: Readers,
    *,
    integer: bool,
) -> list[CodeGap]:
    """Differences of every quantized tensor.

    Args:
      quantized: the network.
      batch: its input.
      codes: codes of every quantized tensor, as ONNX Runtime found them.
      readers: which site reads which of `codes`.
      integer: compare the integer function, else the simulator.

    Returns:
      One entry for each of `codes`.
    """
    found: dict[int, CodeGap] = {}
    table, affines, which = quantized.plan.table, edges_of(quantized), dict(readers)

    def hook(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        forced = list(args)
        for index, x in enumerate(args):
            site = Site(node.name, index)
            if (i := which.get(site)) is not None:
                if i not in found:
                    ours, theirs = map(batch.counting, (x, codes[i]))
                    found[i] = gap(ours, theirs, affines[site], table[site].grid)
                forced[index] = jax.device_put(dequantize(codes[i], affines[site]))
        return slots, tuple(forced)

    run = (in_integers if integer else simulating)(quantized)
    for _ in run(batch.images, hook=hook):
        pass
    return [found[i] for i in range(len(codes))]


def edges_of(quantized: QuantizedModel) -> dict[Site, Affine]:
    """{edge: scale and zero point, in NumPy}."""
    found = quantized.qparams.items()
    edges = {site: affine_of(p) for site, p in found if site.argument is not None}
    return jax.device_get(edges)


def gap(x: np.ndarray, theirs: np.ndarray, affine: Affine, grid: Grid) -> CodeGap:
    """How the codes of `x` differ from theirs."""
    zero_point = affine.zero_point.astype(np.float32)
    place = (over(x, affine.scale) + zero_point).clip(grid.qmin, grid.qmax)
    steps = abs(quantize(x, affine, grid).astype(np.int32) - theirs)
    beyond = abs(place - theirs).max(initial=0.5) - 0.5
    return CodeGap(int(steps.max()), int(np.count_nonzero(steps)), float(beyond))


def layer_checks(
    edges: tuple[QuantizedEdge, ...],
    simulator: list[list[CodeGap]],
    integer: list[list[CodeGap]],
    counts: Int[np.ndarray, " tensors"],
) -> tuple[LayerCheck, ...]:
    """One entry per tensor, from its gaps in every batch; `integer` is empty if left out."""
    ours, theirs = (summary(x, counts) for x in (simulator, integer))
    return tuple(
        LayerCheck(
            edge.tensor,
            edge.grid.bits,
            simulator_steps=ours[i][0],
            integer_steps=theirs[i][0] if theirs else None,
            simulator_equal=ours[i][1],
            integer_equal=theirs[i][1] if theirs else None,
            count=int(counts[i]),
            simulator_beyond=ours[i][2],
            integer_beyond=theirs[i][2] if theirs else None,
        )
        for i, edge in enumerate(edges)
    )


def summary(
    gaps: list[list[CodeGap]], counts: Int[np.ndarray, " tensors"]
) -> list[tuple[int, float, float]]:
    """(most steps, share of equal codes, furthest from a tie) of each tensor, over batches."""
    found = []
    for count, of_tensor in zip(counts, zip(*gaps, strict=True), strict=bool(gaps)):
        steps, unequal, beyond = (np.array(x) for x in zip(*of_tensor, strict=True))
        equal = 1 - float(unequal.sum()) / max(int(count), 1)
        found.append((int(steps.max()), equal, float(beyond.max())))
    return found
