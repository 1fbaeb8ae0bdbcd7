"""How much memory a reconstruction takes, foretold from shapes before anything is computed."""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.ops import Conv2d
from dfq_jax.graph.query import output_shapes, weighted_nodes
from dfq_jax.quantize.closed_form import MOST_VALUES, ClosedForm
from dfq_jax.quantize.learning import Reconstruction
from dfq_jax.quantize.plan import Plan
from dfq_jax.quantize.units import Unit, layers_of, units_of
from dfq_jax.quantize.work import BATCH

FLOAT = 4
PASSES = 3
"""Copies of a tensor while it passes: as it is, quantized, and padded or unfolded."""
STEPS = 5
"""Copies of a tensor in a step: those, and its gradients before and after a quantizer."""

Method = Reconstruction | ClosedForm


class Footprint(NamedTuple):
    """Bytes that the largest unit takes at its peak.

    Attributes:
      kept: what enters and leaves it, of all images, in the float and in the quantized network.
      working: what a batch leaves behind while it passes, or in a step.
    """

    kept: int
    working: int

    @property
    def total(self) -> int:
        """Both."""
        return self.kept + self.working


def footprint(reference: Model, plan: Plan, count: int, method: Method, fed: int) -> Footprint:
    """What reconstruction takes beyond the network and what the process held before.

    Args:
      reference: the float network.
      plan: what is quantized.
      count: images.
      method: what is learned.
      fed: bytes of images' data that steps may have on the device.
    """
    values, units = values_of(reference), cut(reference.graph, plan, method)
    each = [unit_footprint(unit, values, reference, count, method, fed) for unit in units]
    return max(each, key=lambda f: f.total)


def cut(graph: Graph, plan: Plan, method: Method) -> tuple[Unit, ...]:
    """The units that a method learns."""
    return units_of(graph, plan, merge=1 if isinstance(method, ClosedForm) else method.merge)


def unit_footprint(
    unit: Unit,
    values: Mapping[str, int],
    reference: Model,
    count: int,
    method: Method,
    fed: int,
) -> Footprint:
    """What one unit takes."""
    graph = unit.block.graph
    ends = sum(values[name] for name in (graph.inputs[0], graph.outputs[0]))
    kept = 2 * ends * count * FLOAT
    passing = PASSES * BATCH * largest_step(graph, values) * FLOAT
    if isinstance(method, ClosedForm):
        windows = 3 * min(MOST_VALUES, count * most_unfolded(graph, values, reference)) * FLOAT
        return Footprint(kept, passing + windows)
    held = min((values[graph.inputs[0]] + ends) * count * FLOAT, fed)
    return Footprint(kept + held, max(passing, step_bytes(unit, values, method)))


def step_bytes(unit: Unit, values: Mapping[str, int], method: Reconstruction) -> int:
    """What a gradient step leaves behind: every tensor of the unit, or of its largest layer."""
    graph = unit.block.graph
    if method.layers:
        inside = largest_step(graph, values)
    else:
        inside = sum(values[name] for name in (*graph.inputs, *(n.name for n in graph.nodes)))
    return STEPS * method.batch * inside * FLOAT


def by_layers(
    units: tuple[Unit, ...], reference: Model, method: Reconstruction, memory: int
) -> frozenset[int]:
    """Numbers of the units whose steps take more than so many bytes: those learn layer by layer."""
    values = values_of(reference)
    too_large = (i for i, u in enumerate(units) if step_bytes(u, values, method) > memory)
    return frozenset(i for i in too_large if len(layers_of(units[i])) > 1)


def values_of(model: Model) -> dict[str, int]:
    """{tensor: its values for one image}."""
    return {name: prod(shape) for name, shape in output_shapes(model, 1).items()}


def largest_step(graph: Graph, values: Mapping[str, int]) -> int:
    """Values that the operator with most of them reads and writes."""
    return max(sum(values[i] for i in n.inputs) + values[n.name] for n in graph.nodes)


def most_unfolded(graph: Graph, values: Mapping[str, int], reference: Model) -> int:
    """Values of an image's windows where they are most."""
    found = [0]
    for node in weighted_nodes(graph):
        kernel = reference.params[node.name]["kernel"].shape
        window = prod(kernel[:2]) if isinstance(node.op, Conv2d) else 1
        found.append(window * values[node.inputs[0]])
    return max(found)
