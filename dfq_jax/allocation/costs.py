"""What bits cost: average bits, bytes in the ONNX file, bit operations; and budgets of them.

Bytes are those of the ONNX file (`io/onnx/qdq.py`), which depend on the form that the plan stores
kernels in. Packed ones take as many bits as they have, if that saves more than the nodes take that
unpack them. As ONNX's 4-bit integers, two or three bits save nothing over four, nor five or six
over eight. With the codes go, for each scale, 4 bytes of scale and a zero point; and a bias has
int32 codes with scales and zero points of their own.
"""

import dataclasses
import math
import re
from typing import Literal, NamedTuple

import jax.numpy as jnp

from dfq_jax.base.words import DEFAULT_STORE, Store
from dfq_jax.errors import BudgetError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import WEIGHTED
from dfq_jax.graph.query import macs
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.affine import Grid
from dfq_jax.numerics.packing import packed_bytes
from dfq_jax.quantization.observers import DEFAULT_OBSERVER
from dfq_jax.quantization.plan import Plan, weight_spec
from dfq_jax.quantization.sites import Site, operands, products

BudgetUnit = Literal["bits", "bytes", "bops"]
FLOAT = 32
"""Bits of what stays in float."""
UNPACKING = 1024
"""Bytes that the nodes and names take which unpack a kernel, about; fewer are not worth saving."""
UNITS: dict[str, tuple[BudgetUnit, int]] = {
    "bits": ("bits", 1),
    "b": ("bytes", 1),
    **{f"{letter}b": ("bytes", 1000**power) for power, letter in enumerate("kmg", 1)},
    **{f"{letter}ib": ("bytes", 1024**power) for power, letter in enumerate("kmg", 1)},
    **{f"{letter}bops": ("bops", 1000**power) for power, letter in enumerate(("", *"kmgt"))},
}
"""{suffix: (unit, factor)}: KB are 1000 bytes, KiB 1024."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a network may cost.

    Attributes:
      amount: positive; average bits of an element of a kernel, bytes, or bit operations an image.
      unit: which of them.
    """

    amount: float
    unit: BudgetUnit

    def __str__(self) -> str:
        """As `parse_budget` reads it, rounded up in the fifth digit."""
        fits = [(f, s) for s, (u, f) in UNITS.items() if u == self.unit and not s.endswith("ib")]
        factor, suffix = max([(f, s) for f, s in fits if f <= self.amount], default=fits[0])
        amount = self.amount / factor
        digits = max(4 - math.floor(math.log10(max(amount, 1e-9))), 0)
        shown = math.ceil(amount * 10**digits * (1 - 1e-12)) / 10**digits
        return f"{shown:g}{suffix.upper().replace('BITS', 'bits').replace('OPS', 'OPs')}"


def parse_budget(text: str) -> Budget:
    """Reads `4.5bits`, `600KB`, `1.5MiB` or `2GBOPs`.

    Raises:
      BudgetError: on anything else, and on amounts that are not positive.
    """
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-z]+)", text.strip().lower())
    suffix = "" if match is None else {"bit": "bits", "bytes": "b"}.get(match[2], match[2])
    if match is None or suffix not in UNITS or float(match[1]) == 0:
        raise BudgetError(
            f"budget {text!r} is no positive number of bits a weight, bytes of weights or bit "
            "operations an image: write 4.5bits, 600KB, 1.5MB or 2GBOPs."
        )
    unit, factor = UNITS[suffix]
    if unit == "bits" and float(match[1]) > FLOAT:
        raise BudgetError(f"budget {text!r}: a weight has {FLOAT} bits in float; write 4.5bits.")
    return Budget(float(match[1]) * factor, unit)


class LayerWork(NamedTuple):
    """A layer, or product of two tensors, as far as costs go.

    Attributes:
      operands: the two sites that it multiplies: kernel and input, or two inputs.
      macs: multiply-accumulates of an image.
      elements: of the kernel, 0 without one.
      scales: of the kernel.
      biases: elements of the bias, 0 without one.
      grouped: whether groups of input channels have scales of their own, so that it computes in
        float.
      blocks: whether there are several of them.
    """

    operands: tuple[Site, Site]
    macs: int
    elements: int = 0
    scales: int = 0
    biases: int = 0
    grouped: bool = False
    blocks: bool = False


def work_of(model: Model, plan: Plan) -> tuple[LayerWork, ...]:
    """Everything that multiplies in a folded network, in execution order.

    Args:
      model: folded network.
      plan: says how kernels share scales; its bits do not matter.
    """
    counted, table, found = macs(model), plan.table, []
    for node in products(model.graph):
        first, second = operands(node)
        if not isinstance(node.op, WEIGHTED):
            found.append(LayerWork((first, second), counted[node.name]))
            continue
        slots, spec = model.params[node.name], table.get(second)
        kernel = slots["kernel"]
        levels = weight_spec(node.op, 8, DEFAULT_OBSERVER).levels if spec is None else spec.levels
        scales = 1 if levels.axis is None else kernel.shape[-1]
        group = levels.group if isinstance(levels, Grid) else None
        groups = 1 if group is None else -(-kernel.shape[-2] // group)
        biases = slots["bias"].size if "bias" in slots else 0
        counts = counted[node.name], kernel.size, scales * groups, biases
        found.append(LayerWork((second, first), *counts, group is not None, groups > 1))
    return tuple(found)


def with_biases_of(model: Model, corrected: Model) -> Model:
    """A float network with a zero bias wherever a corrected one has a bias that it lacks.

    It computes the same and takes the bytes that it will take once corrected.

    Args:
      model: folded network.
      corrected: the same network after the correction of its biases.

    Returns:
      The float network, its own biases as they were.
    """
    return with_params(
        model,
        {
            name: {"bias": jnp.zeros_like(slots["bias"])}
            for name, slots in corrected.params.items()
            if "bias" in slots and "bias" not in model.params[name]
        },
    )


def cost(
    work: LayerWork, first: int, second: int, unit: BudgetUnit, store: Store = DEFAULT_STORE
) -> int:
    """What a layer costs with so many bits of its operands, in whole units.

    Args:
      work: the layer.
      first: bits of the kernel, or of the first tensor of two; `FLOAT` if not quantized.
      second: bits of the (second) tensor.
      unit: what is counted; for `bits` their sum over the kernel.
      store: how kernels lie in the file.

    Returns:
      The cost.
    """
    match unit:
        case "bits":
            return work.elements * first
        case "bytes":
            return stored(work, first, second, store)
        case "bops":
            return work.macs * first * second


def stored(work: LayerWork, weight: int, tensor: int, store: Store) -> int:
    """Bytes of a layer's parameters in the ONNX file."""
    if weight == FLOAT:
        return 4 * (work.elements + work.biases)
    if is_packed(work.elements, weight, store):
        codes = packed_bytes(work.elements, weight) + (1 if work.blocks else 2) * work.scales
    elif store == "int4" and weight <= 4:
        codes = -(-work.elements // 2) - (-work.scales // 2)
    else:
        codes = work.elements + work.scales
    kernel = codes + 4 * work.scales
    integer_bias = work.biases and tensor <= 8 and not work.grouped
    return kernel + 4 * work.biases + (8 * work.scales if integer_bias else 0)


def is_packed(elements: int, bits: int, store: Store) -> bool:
    """Whether a kernel is packed in the file: where that form is wanted and saves bytes."""
    narrow = store == "packed" and bits < 8
    return narrow and elements - packed_bytes(elements, bits) > UNPACKING


def bits_of(plan: Plan, site: Site) -> int:
    """Bits of a site; `FLOAT` where it is not quantized."""
    spec = plan.spec(site)
    return FLOAT if spec is None else spec.levels.bits


def per_unit(works: tuple[LayerWork, ...], unit: BudgetUnit) -> int:
    """By what whole units are divided to get amounts of a budget."""
    return sum(work.elements for work in works) if unit == "bits" else 1


def cost_of(model: Model, plan: Plan, unit: BudgetUnit) -> Budget:
    """What a plan costs: the smallest budget that allows it.

    Args:
      model: folded network.
      plan: of it.
      unit: what is counted.

    Returns:
      The exact cost.
    """
    works = work_of(model, plan)
    bits = lambda work, operand: bits_of(plan, work.operands[operand])
    total = sum(cost(work, bits(work, 0), bits(work, 1), unit, plan.store) for work in works)
    return Budget(total / per_unit(works, unit), unit)
