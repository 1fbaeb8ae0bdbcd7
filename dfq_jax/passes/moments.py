"""Propagates batch-norm moments through a folded network, and corrects biases with them."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.graph.graph import Model, Node
from dfq_jax.graph.ops import (
    WEIGHTED,
    Add,
    AvgPool,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    MaxPool,
    Pad,
    Relu,
    Slice,
)
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.gaussian import clipped_normal, normal_range
from dfq_jax.types import Moments


def expected_moments(model: Model) -> dict[str, Moments]:
    """{tensor: mean and variance per channel} wherever batch-norm statistics determine them.

    A layer that had a batch norm restarts from the recorded moments. ReLU uses the clipped normal,
    addition adds means and (as if independent) variances, pooling and slicing keep the moments of
    their input, which for max pooling is a lower bound of the mean.
    """
    known = dict(model.moments)
    for node in model.graph.nodes:
        if node.name not in known and all(i in known for i in node.inputs):
            moments = propagated(node, [known[i] for i in node.inputs])
            if moments is not None:
                known[node.name] = moments
    return known


def propagated(node: Node, inputs: list[Moments]) -> Moments | None:
    """Moments of a node's output from those of its inputs, None if they do not determine it."""
    match node.op:
        case Relu(ceiling):
            return clipped_normal(inputs[0], ceiling)
        case Add():
            a, b = inputs
            return Moments(a.mean + b.mean, a.var + b.var)
        case MaxPool() | AvgPool() | GlobalAvgPool():
            return inputs[0]
        case Slice(bounds) if bounds[-1] == (0, None, 1):
            return inputs[0]
        case Pad(widths, value) if value == 0:
            return Moments(jnp.pad(inputs[0].mean, widths[-1]), jnp.pad(inputs[0].var, widths[-1]))
        case _:
            return None


Range = tuple[Float[Array, ""], Float[Array, ""]]


def expected_ranges(model: Model, *, sigmas: float = 6.0) -> dict[str, Range]:
    """{tensor: (lo, hi)} that batch-norm statistics predict, `mean -/+ sigmas * std` at the widest.

    A rectified tensor takes the range of its input, clipped; pooling by maximum, slicing and zero
    padding keep ranges; sums and means use the moments of their results.

    Args:
      model: folded network with moments.
      sigmas: how many standard deviations to cover.

    Returns:
      Ranges of all tensors whose moments are known.

    Reference:
      Nagel et al. 2019, section 5 (n = 6).
    """
    known = expected_moments(model)
    ranges: dict[str, Range] = {}
    nonnegative: set[str] = set()
    for node in model.graph.nodes:
        source = node.inputs[0]
        keeps_sign = not isinstance(node.op, (*WEIGHTED, Add))
        if isinstance(node.op, Relu) or (keeps_sign and source in nonnegative):
            nonnegative.add(node.name)
        match node.op:
            case Relu(ceiling) if source in ranges:
                lo, hi = ranges[source]
                ranges[node.name] = jnp.clip(lo, 0.0, ceiling), jnp.clip(hi, 0.0, ceiling)
            case MaxPool() | Slice() | Pad() | Flatten() if source in ranges:
                ranges[node.name] = ranges[source]
            case _ if node.name in known:
                rectified = node.name in nonnegative
                ranges[node.name] = normal_range(known[node.name], sigmas, rectified=rectified)
            case _:
                pass
    return ranges


def correct_biases_analytically(
    model: Model, quantized_kernels: Mapping[str, Float[Array, "..."]]
) -> Model:
    """Removes the mean output shift that rounding the kernels causes, without any image.

    Args:
      model: folded float network with moments.
      quantized_kernels: {layer: kernel after quantization, as floats}.

    Returns:
      The network with `b -= sum (W_q - W) E[x]` in every layer whose input moments are known.

    Reference:
      Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
      Eq. 17-18.
    """
    known = expected_moments(model)
    biases = {}
    for node in model.graph.nodes:
        if not isinstance(node.op, WEIGHTED) or node.name not in quantized_kernels:
            continue
        if node.inputs[0] not in known:
            continue
        slots = model.params[node.name]
        gap = quantized_kernels[node.name] - slots["kernel"]
        groups = node.op.groups if isinstance(node.op, Conv2d) else 1
        shift = expected_output(gap, known[node.inputs[0]].mean, groups)
        biases[node.name] = {"bias": slots.get("bias", jnp.zeros_like(shift)) - shift}
    return with_params(model, biases)


def expected_output(
    kernel: Float[Array, "..."], mean: Float[Array, " cin"], groups: int = 1
) -> Float[Array, " cout"]:
    """Mean output of a layer for inputs of constant `mean`, borders ignored."""
    flat = kernel.reshape(-1, *kernel.shape[-2:]).sum(0)
    cin, cout = flat.shape
    per_group = flat.reshape(cin, groups, cout // groups)
    return jnp.einsum("kgo,gk->go", per_group, mean.reshape(groups, cin)).reshape(cout)
