"""Depthwise convolutions on CPU as sums of shifted, scaled copies, with a gradient of their own.

XLA fuses a sum of shifts with whatever is around it, and computes what it fused once per shift: in
the gradient of a network that is the batch norm, the activation and the forward convolution, 9 or
81 times over. Barriers keep the fusions apart, and the input gradient gathers from a padded copy
of the output's gradient instead of adding padded copies of it: 3-5 times faster in a network.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from dfq_jax.graph.ops import Conv2d, Pair
from dfq_jax.graph.phases import Sizes, gathered, shifts

Images = Shaped[Array, "n h w c"]
Kernel = Shaped[Array, "kh kw one c"]
Output = Shaped[Array, "n oh ow c"]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_by_shifts(x: Images, kernel: Kernel, op: Conv2d) -> Output:
    """A depthwise convolution with one kernel for each channel.

    Args:
      x: activations, NHWC.
      kernel: HWIO with one input channel.
      op: strides, padding and dilation.

    Returns:
      The convolution. Differentiable in reverse mode, to any order.
    """
    return lax.optimization_barrier(sum_of_shifts(x, kernel, op))


def sum_of_shifts(x: Images, kernel: Kernel, op: Conv2d) -> Output:
    """The convolution as XLA may fuse it."""
    padded = jnp.pad(x, ((0, 0), *op.padding, (0, 0)))
    read = shifts(padded, op, (kernel.shape[0], kernel.shape[1]))
    total = jnp.zeros_like(read[0, 0])
    for entry, value in read.items():
        total = lax.add(total, scaled(value, kernel, entry))
    return total


def scaled(x: Output, kernel: Kernel, entry: Sizes) -> Output:
    """`x * kernel[*entry, 0]`, which is quicker to trace so."""
    (i, j), channels = entry, kernel.shape[3]
    factors = lax.slice(kernel, (i, j, 0, 0), (i + 1, j + 1, 1, channels))
    return lax.mul(x, lax.broadcast_in_dim(factors, x.shape, (0, 1, 2, 3)))


def forward(x: Images, kernel: Kernel, op: Conv2d) -> tuple[Output, tuple[Images, Kernel]]:
    """Output, and what the gradient needs."""
    return depthwise_by_shifts(x, kernel, op), (x, kernel)


def backward(op: Conv2d, saved: tuple[Images, Kernel], g: Output) -> tuple[Images, Kernel]:
    """Gradients with respect to input and kernel."""
    x, kernel = saved
    g = lax.optimization_barrier(g)
    window = (kernel.shape[0], kernel.shape[1])
    share = lambda i, j, read: scaled(read[0], kernel, (i, j))
    dx = gathered((g,), (0,), op, window, (x.shape[1], x.shape[2]), share)
    return dx, kernel_gradient(x, g, op, window)


def kernel_gradient(x: Images, g: Output, op: Conv2d, window: Pair) -> Kernel:
    """The gradient by the kernel, an image at a time: each fits into the cache, all do not."""
    padded = lax.optimization_barrier(jnp.pad(x, ((0, 0), *op.padding, (0, 0))))

    def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        image, slope = pair
        products = (v[0] * slope for v in shifts(image[None], op, window).values())
        return total + jnp.stack([jnp.sum(v, (0, 1)) for v in products]), None

    none = jnp.zeros((window[0] * window[1], x.shape[-1]), x.dtype)
    return lax.scan(add, none, (padded, g))[0].reshape(*window, 1, -1)


depthwise_by_shifts.defvjp(forward, backward)
