"""Depthwise convolutions on CPU as sums of shifted, scaled copies, with a gradient of their own.

XLA fuses a sum of shifts with whatever is around it, and computes what it fused once per shift: in
the gradient of a network that is the batch norm, the activation and the forward convolution, 9 or
81 times over. Barriers keep the fusions apart, and the input gradient gathers from a padded copy
of the output's gradient instead of adding padded copies of it: 3-5 times faster in a network.
"""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from dfq_jax.graph.ops import Conv2d

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
    kh, kw = kernel.shape[:2]
    (sh, sw), (dh, dw) = op.strides, op.dilation
    x = jnp.pad(x, ((0, 0), *op.padding, (0, 0)))
    oh = (x.shape[1] - dh * (kh - 1) - 1) // sh + 1
    ow = (x.shape[2] - dw * (kw - 1) - 1) // sw + 1
    total = jnp.zeros((x.shape[0], oh, ow, x.shape[3]), x.dtype)
    for i, j in product(range(kh), range(kw)):
        top, left = i * dh, j * dw
        window = x[:, top : top + (oh - 1) * sh + 1 : sh, left : left + (ow - 1) * sw + 1 : sw]
        total = total + window * kernel[i, j, 0]
    return total


def forward(x: Images, kernel: Kernel, op: Conv2d) -> tuple[Output, tuple[Images, Kernel]]:
    """Output, and what the gradient needs."""
    return depthwise_by_shifts(x, kernel, op), (x, kernel)


def backward(op: Conv2d, saved: tuple[Images, Kernel], g: Output) -> tuple[Images, Kernel]:
    """Gradients with respect to input and kernel."""
    x, kernel = saved
    g = lax.optimization_barrier(g)
    by_kernel = lambda k: sum_of_shifts(x, k, op)
    return input_gradient(g, kernel, op, x.shape), jax.vjp(by_kernel, kernel)[1](g)[0]


depthwise_by_shifts.defvjp(forward, backward)


def input_gradient(
    g: Output, kernel: Kernel, op: Conv2d, shape: tuple[int, ...]
) -> Shaped[Array, "n h w c"]:
    """`dx[t] = sum_i kernel[i] g[(t + p - d i) / s]` along both axes, over what divides.

    Pixels `t = s q + a` with equal `a` read the same kernel entries, so each phase `a` is a dense
    sum of shifts; the phases are then interleaved.

    Args:
      g: gradient of the output.
      kernel: of the forward convolution.
      op: the forward convolution.
      shape: of its input.

    Returns:
      Gradient of the input.
    """
    (sh, sw), (n, h, w, c) = op.strides, shape
    rows, columns = -(-h // sh), -(-w // sw)
    axes = [
        reads(kernel.shape[axis], op.strides[axis], op.dilation[axis], op.padding[axis][0])
        for axis in (0, 1)
    ]
    (low, high), (left, right) = (
        margins(each, count, size)
        for each, count, size in zip(axes, (rows, columns), g.shape[1:3], strict=True)
    )
    padded = lax.optimization_barrier(jnp.pad(g, ((0, 0), (low, high), (left, right), (0, 0))))

    def phase(a: int, b: int) -> Array:
        total = jnp.zeros((n, rows, columns, c), g.dtype)
        for (i, di), (j, dj) in product(axes[0][a], axes[1][b]):
            top, start = low + di, left + dj
            window = padded[:, top : top + rows, start : start + columns]
            total = total + window * kernel[i, j, 0]
        return total

    if sh == sw == 1:
        return phase(0, 0)
    lines = [jnp.stack([phase(a, b) for b in range(sw)], axis=3) for a in range(sh)]
    return jnp.stack(lines, axis=2).reshape(n, rows * sh, columns * sw, c)[:, :h, :w]


Reads = list[list[tuple[int, int]]]
"""For each phase, (kernel entry, offset into the output's gradient) of what it reads."""


def reads(window: int, stride: int, dilation: int, padding: int) -> Reads:
    """What each phase reads along one axis."""
    found: Reads = [[] for _ in range(stride)]
    for a, i in product(range(stride), range(window)):
        offset, rest = divmod(a + padding - dilation * i, stride)
        if rest == 0:
            found[a].append((i, offset))
    return found


def margins(phases: Reads, count: int, size: int) -> tuple[int, int]:
    """Zeros needed before and after `size` entries so that all reads of `count` pixels exist."""
    offsets = [offset for phase in phases for _, offset in phase]
    return max(0, -min(offsets)), max(0, count - size + max(offsets))
