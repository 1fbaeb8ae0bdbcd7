"""Which layers do not multiply integers under a plan, and why."""

from dfq_jax.graph.graph import Graph
from dfq_jax.graph.ops import WEIGHTED
from dfq_jax.numerics.affine import Grid
from dfq_jax.numerics.levels import multiplied_as_integers
from dfq_jax.quantization.plan import WIDE, Plan, Spec
from dfq_jax.quantization.sites import READING, Site, products


def float_layers(graph: Graph, plan: Plan) -> dict[str, str]:
    """{layer or product: why it does not multiply integers}, in execution order."""
    table, reasons = plan.table, {}
    for node in products(graph):
        if plan.multiplies(node):
            continue
        kernel = table.get(Site(node.name))
        stored = kernel is not None or not isinstance(node.op, WEIGHTED)
        edges = [table.get(Site(node.name, i)) for i in range(len(node.inputs))]
        if stored and None not in edges:
            reasons[node.name] = wider_than_integers(kernel)
        elif plan.layers in READING and plan.scheme.activation_bits and stored:
            reasons[node.name] = f"{plan.layers}: its input is not behind a ReLU"
        elif plan.scheme.activation_bits is None and stored:
            reasons[node.name] = "only weights are quantized: it computes in float"
        else:
            reasons[node.name] = "a rule keeps it in float"
    return reasons


def wider_than_integers(kernel: Spec | None) -> str:
    """Why a layer on grids on both sides computes in float all the same."""
    if kernel is not None and not multiplied_as_integers(kernel.levels):
        grid = kernel.levels
        if isinstance(grid, Grid):
            return f"scales of {grid.group} input channels each: it computes in float"
        return "its kernel is on levels that no integers are multiplied for"
    return f"inputs of {WIDE} bits: it computes in float"
