"""High-bias absorption: what a ReLU lets through anyway moves into the bias of the next layer."""

import dataclasses

import jax.numpy as jnp

from dfq_jax.graph.channels import Joint, joints
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import Conv2d, Linear, Relu
from dfq_jax.graph.rewrite import with_params
from dfq_jax.passes.moments import mean_output
from dfq_jax.types import Moments


def absorb_high_biases(model: Model, *, sigmas: float = 3.0, padded: bool = True) -> Model:
    """Lowers biases before a ReLU by what stays above zero anyway, and raises those behind it.

    Where a channel is above `c = max(0, mean - sigmas * std)`, `relu(x - c) = relu(x) - c`; for a
    normal variable and three deviations that is 99.87 % of the time. The rest changes the function
    a little, and so do the borders of layers that pad with zeros, where some taps read no `c`.

    Args:
      model: folded network; layers without moments are left alone.
      sigmas: how many deviations below its mean a channel counts as always positive.
      padded: whether to absorb into layers that pad as well, as the paper does.

    Returns:
      The network with smaller activations; `moments` follow.

    Reference:
      Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization ...", section 4.1.3.
    """
    for joint in joints(model.graph):
        if absorbs(joint, padded) and joint.first.name in model.moments:
            model = absorbed(model, joint, sigmas)
    return model


def absorbs(joint: Joint, padded: bool) -> bool:
    """Whether constants move through a joint: a ReLU, then the same taps at every position."""
    rectified = joint.between is not None and joint.between.op == Relu()
    match joint.second.op:
        case Conv2d(padding=padding):
            return rectified and (padded or padding == ((0, 0), (0, 0)))
        case Linear():
            return rectified
        case _:
            return False


def absorbed(model: Model, joint: Joint, sigmas: float) -> Model:
    """The network with the bias of one layer absorbed into the other."""
    first, second = joint.first.name, joint.second.name
    slots, later = model.params[first], model.params[second]
    mean, var = model.moments[first]
    c = jnp.maximum(mean - sigmas * jnp.sqrt(var), 0.0)
    shift = mean_output(joint.second, later["kernel"], c)
    model = with_params(
        model,
        {
            first: {"bias": slots.get("bias", jnp.zeros_like(c)) - c},
            second: {"bias": later.get("bias", jnp.zeros_like(shift)) + shift},
        },
    )
    return dataclasses.replace(model, moments={**model.moments, first: Moments(mean - c, var)})
