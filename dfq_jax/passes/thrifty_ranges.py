"""Predicted ranges narrowed to where a tensor errs least, by the statistics of its channels."""

from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Float

from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import Concat, LeakyRelu, PRelu, Relu
from dfq_jax.graph.query import keeps_values
from dfq_jax.numerics.tails import least_lossy_range
from dfq_jax.passes.moments import expected_moments
from dfq_jax.passes.ranges import TensorRange, expected_ranges
from dfq_jax.types import Moments

Rectifier = Relu | LeakyRelu | PRelu


def thrifty_ranges(model: Model, *, sigmas: float = 6.0) -> dict[str, TensorRange]:
    """{tensor: (lo, hi)}: of `expected_ranges` the part under which 8 bits lose least.

    Six deviations of the widest channel are two to four times as wide as a grid should be where
    one channel is far wider than the others. Where channels are alike little changes.

    Args:
      model: folded network with moments.
      sigmas: how many standard deviations are covered at most.
    """
    model = jax.device_get(model)
    known = expected_moments(model)
    found: dict[str, TensorRange] = expected_ranges(model, sigmas=sigmas, known=known)
    for node in model.graph.nodes:
        if node.name in found:
            found[node.name] = narrowed(model, node, found, known)
    return found


def narrowed(
    model: Model, node: Node, found: Mapping[str, TensorRange], known: Mapping[str, Moments]
) -> TensorRange:
    """The range of a tensor: by its channels, or by the ranges of what it takes its values from."""
    low, high = found[node.name]
    if isinstance(node.op, Concat) or keeps_values(node.op):
        read = [found[name] for name in node.inputs if name in found]
        if len(read) < len(node.inputs):
            return low, high
        lows, highs = zip(*read, strict=True)
        return np.maximum(low, min(lows)), np.minimum(high, max(highs))
    rectifier = isinstance(node.op, Rectifier)
    moments = known.get(node.inputs[0] if rectifier else node.name)
    if moments is None or moments.mean.ndim != 1 or not float(high) > float(low):
        return low, high
    mean, deviation = moments.mean, np.sqrt(moments.var)
    if not np.all(np.isfinite((*mean, *deviation, float(low), float(high)))):
        return low, high  # numbers that a failed model names
    below = slope_below(model, node)
    low, high = least_lossy_range(mean, deviation, (float(low), float(high)), below)
    return np.float32(low), np.float32(high)


def slope_below(model: Model, node: Node) -> float | Float[np.ndarray, " c"]:
    """What negative values are multiplied with."""
    match node.op:
        case Relu():
            return 0.0
        case LeakyRelu(slope):
            return slope
        case PRelu():
            return np.asarray(model.params[node.name]["slope"])
        case _:
            return 1.0
