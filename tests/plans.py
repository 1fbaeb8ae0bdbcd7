"""The bits a plan gives to layers and edges."""

from dfq_jax.quantization.plan import Scheme

W4A3 = Scheme(4, 3)


def kernel_bits(plan):
    return {s.node: spec.grid.bits for s, spec in plan.entries if s.argument is None}


def edge_bits(plan):
    return {
        f"{s.node}.{s.argument}": e.grid.bits for s, e in plan.entries if s.argument is not None
    }
