"""How much memory a reconstruction takes, foretold from shapes before anything is computed."""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from dfq_jax.graph.cuts import stage_sizes
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.graph.query import output_shapes, weighted_nodes
from dfq_jax.quantization.plan import Plan
from dfq_jax.quantization.second_moments import MOST_VALUES, WindowLayer, unfolding
from dfq_jax.reconstruction.closed_form import ClosedForm
from dfq_jax.reconstruction.method import Reconstruction, batch_of
from dfq_jax.reconstruction.unit_at_work import BATCH
from dfq_jax.reconstruction.units import Unit, layers_of, units_of

FLOAT = 4
PASSES = 3
"""Copies of a tensor while it passes: as it is, quantized, and padded or unfolded."""
STEPS = 5
"""Copies of a tensor in a step: those, and its gradients before and after a quantizer."""
BEHIND = 3
"""Copies of a float tensor that gradients pass through: as it is, padded or unfolded, its slope."""

FED = 2**30
"""Bytes of images' data on the device, unless told otherwise."""

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


def footprint(
    reference: Model, plan: Plan, count: int, method: Method, memory: int | None = None
) -> Footprint:
    """What reconstruction takes beyond the network and what the process held before.

    Args:
      reference: the float network.
      plan: what is quantized.
      count: images.
      method: what is learned.
      memory: bytes that a step may take, as `reconstruct` takes them.
    """
    values, units = values_of(reference), learned_units(reference, plan, method)
    split = layers_instead(plan, reference, method, memory)
    given = Passing(reference, values, count, memory or FED)
    found = [
        unit_footprint(unit, given, layered(method) if index in split else method, after)
        for index, (unit, after) in enumerate(zip(units, behind(units, values), strict=True))
    ]
    return max(found, key=lambda footprint: footprint.total)


def learned_units(reference: Model, plan: Plan, method: Method) -> tuple[Unit, ...]:
    """The units that a method learns."""
    merge = 1 if isinstance(method, ClosedForm) else method.merge
    return units_of(
        reference.graph, plan, merge=stage_sizes(reference) if merge == "stage" else merge
    )


class Passing(NamedTuple):
    """What passes through a network while it is reconstructed.

    Attributes:
      reference: the float network.
      values: of its tensors, as of `values_of`.
      images: how many.
      fed: bytes of images' data that steps may have on the device.
    """

    reference: Model
    values: Mapping[str, int]
    images: int
    fed: int


def unit_footprint(unit: Unit, passing: Passing, method: Method, after: int = 0) -> Footprint:
    """What one unit takes.

    Args:
      unit: which.
      passing: what passes through the network.
      method: what is learned.
      after: values of all tensors behind the unit, for methods that look ahead.
    """
    reference, values, count, fed = passing
    graph = unit.block.graph
    enters, leaves = values[graph.inputs[0]], values[graph.outputs[0]]
    kept = 2 * (enters + leaves) * count * FLOAT
    batch = PASSES * BATCH * largest_step(graph, values) * FLOAT
    if isinstance(method, ClosedForm):
        windows = 3 * min(MOST_VALUES, count * most_unfolded(graph, values, reference)) * FLOAT
        return Footprint(kept, batch + windows)
    ahead, corrected = looks_ahead(method), method.correction is not None
    logits = values[reference.graph.outputs[0]] if ahead else 0
    slopes = leaves if ahead and method.fisher else 0
    copies = enters + leaves if corrected else 0
    kept += (copies + slopes + logits) * count * FLOAT
    if method.lines:
        method = method._replace(batch=batch_of(method, entering(unit, reference)))
    held = min((2 * enters + leaves + slopes + logits) * count * FLOAT, fed)
    return Footprint(kept + held, max(batch, step_bytes(unit, values, method, after)))


def entering(unit: Unit, reference: Model) -> tuple[int, ...]:
    """The shape of what one image is where it enters a unit."""
    return output_shapes(reference)[unit.block.graph.inputs[0]]


def step_bytes(
    unit: Unit, values: Mapping[str, int], method: Reconstruction, after: int = 0
) -> int:
    """What a gradient step leaves behind, or what slopes or corrected inputs take before it.

    Args:
      unit: every tensor of it counts, or those of its largest layer.
      values: as of `values_of`.
      method: what is learned. With a prediction the unit runs on two batches at once, and one
        passes through all that follows.
      after: values of all tensors behind the unit.
    """
    graph = unit.block.graph
    whole = sum(values[name] for name in (*graph.inputs, *(n.name for n in graph.nodes)))
    step = STEPS * method.batch * (largest_step(graph, values) if method.layers else whole)
    step += method.batch * whole if method.guided else 0
    beside = BEHIND * BATCH * whole if method.correction is not None else 0
    if looks_ahead(method) and method.prediction is not None:
        step = 2 * step + BEHIND * method.batch * after
    if looks_ahead(method) and method.fisher:
        beside = max(beside, BEHIND * BATCH * (values[graph.outputs[0]] + after))
    return max(step, beside) * FLOAT


def looks_ahead(method: Method) -> bool:
    """Whether a method needs to know what follows a unit; what learns layer by layer does not."""
    if isinstance(method, ClosedForm) or method.layers:
        return False
    return method.fisher or method.prediction is not None


def by_layers(
    units: tuple[Unit, ...], reference: Model, method: Reconstruction, memory: int
) -> frozenset[int]:
    """Numbers of the units whose steps take more than so many bytes: those learn layer by layer.

    A unit of one layer is among them only if that spares it a look at what follows.
    """
    values, fewest = values_of(reference), 1 if looks_ahead(method) else 2
    sizes = zip(units, behind(units, values), strict=True)
    too_large = [step_bytes(u, values, method, after) > memory for u, after in sizes]
    several = [len(layers_of(unit)) >= fewest for unit in units]
    return frozenset(i for i in range(len(units)) if too_large[i] and several[i])


def layers_instead(
    plan: Plan, reference: Model, method: Method, memory: int | None
) -> frozenset[int]:
    """Numbers of the units that are too large to learn as a whole; what is guided has to."""
    if memory is None or isinstance(method, ClosedForm) or method.layers or method.guided:
        return frozenset()
    return by_layers(learned_units(reference, plan, method), reference, method, memory)


def layered(method: Method) -> Method:
    """The method where layers learn one by one; its name says so, and what it goes without.

    The prediction follows from what a unit puts out, not from a layer inside it: only whole units
    look ahead.
    """
    if isinstance(method, ClosedForm):
        return method
    asked = {"prediction": method.prediction is not None, "Fisher weights": method.fisher}
    lost = [what for what, wanted in asked.items() if wanted]
    if method.layers and not lost:
        return method
    without = [f"without its {' and '.join(lost)}"] if lost else []
    name = ", ".join([method.name, "layer by layer", *without])
    return method._replace(layers=True, name=name, prediction=None, fisher=False)


def behind(units: tuple[Unit, ...], values: Mapping[str, int]) -> list[int]:
    """Values of all tensors that follow each unit, for one image."""
    own = [sum(values[node.name] for node in unit.block.graph.nodes) for unit in units]
    return [sum(own[i + 1 :]) for i in range(len(units))]


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
        if isinstance(node.op, WindowLayer):
            kernel = reference.params[node.name]["kernel"].shape
            found.append(unfolding(node.op, kernel) * values[node.inputs[0]])
    return max(found)
