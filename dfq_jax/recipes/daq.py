"""DAQ: every channel of every image has steps of its own deviation; nothing is calibrated.

Hong et al. 2022, "DAQ: Channel-Wise Distribution-Aware Quantization for Deep Image Super-Resolution
Networks", in simulation: no file holds it. Its training on images of users is not here. Whether
values come from a ReLU is read from the graph, where released code looks for a smallest value of 0.

    x:  MR(x - mean, G sigma) + mean,  of each image and channel;   w:  MR(w, G sigma)
    sigma <- m + MR(sigma - m, G' std sigma),   m = mean of sigma over channels
"""

import jax

from dfq_jax.graph.evaluate import Hook
from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import Conv2d, Relu
from dfq_jax.graph.semantics import Slots, Tensor
from dfq_jax.numerics.channel_steps import (
    UNTOUCHED,
    StepTable,
    channelwise,
    deviation_weights,
    step_multiplier,
)


def daq(
    graph: Graph,
    *,
    weight_bits: int = 4,
    bits: int = 4,
    sigma_bits: int = 4,
    table: StepTable = "gaussian",
    bounded: bool = True,
) -> Hook:
    """A hook of `evaluate` that quantizes the convolutions of a network's body.

    Slopes pass through rounding.

    Args:
      graph: of the network; its first and last convolution stay as they are.
      weight_bits: of kernels, 1..8.
      bits: of what convolutions read.
      sigma_bits: of deviations; 32 for all of them.
      table: `released` for the coarser steps of its code.
      bounded: as of `channelwise`.

    Raises:
      UsageError: for bits that there is no step for.
    """
    for asked in (weight_bits, bits, *(() if sigma_bits == UNTOUCHED else (sigma_bits,))):
        step_multiplier(asked, table)
    body = body_of(graph)
    rectified = {node.name for node in graph.nodes if isinstance(node.op, Relu)}
    how = {"sigma_bits": sigma_bits, "table": table, "bounded": bounded}

    def hook(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        if node.name not in body:
            return slots, args
        kernel, x = slots["kernel"], args[0]
        lower = deviation_weights(kernel, weight_bits, table)
        read = channelwise(x, bits, behind_relu=node.inputs[0] in rectified, **how)
        slots = {**slots, "kernel": passing(kernel, lower)}
        return slots, (passing(x, read), *args[1:])

    return hook


def passing(x: Tensor, rounded: Tensor) -> Tensor:
    """The rounded values, with the slope of those before."""
    return x + jax.lax.stop_gradient(rounded - x)


def body_of(graph: Graph) -> frozenset[str]:
    """All convolutions but the first and the last."""
    found = [node.name for node in graph.nodes if isinstance(node.op, Conv2d)]
    return frozenset(found[1:-1])
