"""Sums of products of codes that 32 bits may not hold, and the rules that keep them there.

Kernels add products up in int32. With codes of 8 bits that is safe up to 66,311 terms whatever the
weights; beyond, it depends on them, and here they are looked at. Pieces of a sum may leave the
range: additions wrap around, and come back.
"""

import glob
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from dfq_jax.graph.graph import Node
from dfq_jax.graph.ops import MatMul
from dfq_jax.graph.query import output_shapes
from dfq_jax.numerics.affine import Affine, Grid, quantize_bias
from dfq_jax.numerics.integer import LARGEST_SUM
from dfq_jax.numerics.levels import Levels, Parameters, scales_of
from dfq_jax.quantization.integer import centred
from dfq_jax.quantization.plan import Plan, Rule, Site
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.sites import operands, products

SAFE = LARGEST_SUM // 255**2
"""So many products of any codes stay below half of `LARGEST_SUM`, or below it without a bias."""
FEWEST_BITS = 4
"""Of a kernel; a layer that would need fewer stays in float."""


class LongSum(NamedTuple):
    """A layer whose sums 32 bits may not hold.

    Attributes:
      layer: its name.
      terms: products of an output.
      largest: what a sum of them may come to.
    """

    layer: str
    terms: int
    largest: int

    def __str__(self) -> str:
        """What is the matter, in words."""
        return (
            f"layer {self.layer!r} sums {self.terms:,} products for each output, which may come to "
            f"{self.largest:,}, and 32 bits hold {LARGEST_SUM:,}"
        )


def overflowing(quantized: QuantizedModel) -> tuple[LongSum, ...]:
    """The layers whose sums may leave 32 bits, for some input, in execution order."""
    model = quantized.model
    multiplied = [n for n in products(model.graph) if quantized.plan.multiplies(n)]
    shapes = output_shapes(model) if any(isinstance(n.op, MatMul) for n in multiplied) else {}
    found = []
    for node in multiplied:
        if isinstance(node.op, MatMul):
            terms = shapes[node.inputs[0]][-1]
            largest = terms * math.prod(farthest(quantized, site) for site in operands(node))
        else:
            kernel = model.params[node.name]["kernel"]
            terms = kernel.size // kernel.shape[-1]
            largest = largest_sum(quantized, node) if terms > SAFE else 0
        if largest > LARGEST_SUM:
            found.append(LongSum(node.name, terms, largest))
    return tuple(found)


def largest_sum(quantized: QuantizedModel, node: Node) -> int:
    """The largest sum, bias included, that the kernel of a layer can make of codes of its input."""
    table, qparams, slots = quantized.plan.table, quantized.qparams, quantized.model.params
    data, kernel = operands(node)
    low, high = ends(qparams[data], table[data].levels)
    codes, levels = quantized.codes(node.name), jax.device_get(qparams[kernel])
    weights = np.asarray(centred(codes, levels), np.int64)
    rows = weights.reshape(-1, weights.shape[-1])
    positive, negative = np.maximum(rows, 0).sum(0), np.minimum(rows, 0).sum(0)
    top, bottom = positive * high + negative * low, positive * low + negative * high
    if "bias" in slots[node.name]:
        scales = scales_of(qparams[data]), scales_of(qparams[kernel])
        bias = np.asarray(quantize_bias(slots[node.name]["bias"], *scales), np.int64)
        top, bottom = top + bias, bottom + bias
    return int(max(top.max(), -bottom.min()))


def ends(parameters: Parameters, levels: Levels) -> tuple[int, int]:
    """The smallest and largest code of a tensor, less its zero point."""
    if not (isinstance(levels, Grid) and isinstance(parameters, Affine)):
        return -1, 1  # signs: integers multiply no others
    return levels.qmin - int(parameters.zero_point), levels.qmax - int(parameters.zero_point)


def farthest(quantized: QuantizedModel, site: Site) -> int:
    """The largest code of a tensor less its zero point, whatever its sign."""
    return max(map(abs, ends(quantized.qparams[site], quantized.plan.table[site].levels)))


def smaller(plan: Plan, found: LongSum) -> Rule:
    """The rule that gives a kernel one bit less; the last resort is float."""
    spec = plan.spec(Site(found.layer))
    pattern = glob.escape(found.layer)
    if spec is None or spec.levels.bits <= FEWEST_BITS:  # a product of two tensors has no kernel
        return Rule(pattern, keep_float=True)
    return Rule(pattern, weight_bits=spec.levels.bits - 1)


def told(found: Mapping[str, LongSum], plan: Plan) -> tuple[str, ...]:
    """What became of layers whose sums were too large, a sentence each."""
    notes = []
    for layer, sum_ in found.items():
        spec = plan.spec(Site(layer))
        what = "it stays in float" if spec is None else f"its kernel has {spec.levels.bits} bits"
        notes.append(f"{sum_}: {what}")
    return tuple(notes)
