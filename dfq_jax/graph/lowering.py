"""How a convolution is computed, by backend and shape; the only file that chooses.

On CPU, XLA runs depthwise convolutions 10-20 times slower than need be and 1x1 convolutions 2-4
times: there, shifted multiply-adds and matrix products win. And inside a `lax.scan` it leaves the
fast path for any convolution whose kernel is not laid out HWIO, which is what the gradient with
respect to the input asks for: written with an explicitly transposed kernel it runs 2-9 times
faster. GPU and TPU keep XLA's own choices. `benchmarks/lowering.py` has the measurements.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from dfq_jax.graph.depthwise import depthwise_by_shifts
from dfq_jax.graph.ops import Conv2d, ConvTranspose2d, Pads, Pair
from dfq_jax.graph.phases import shifts
from dfq_jax.graph.volume_ops import Conv3d
from dfq_jax.graph.winograd import (
    FEWEST,
    TILE,
    convolve_by_tiles,
    tileable,
    tiled_kernel_gradient,
    winnable,
)

Images = Shaped[Array, "n h w cin"]
Kernel = Shaped[Array, "kh kw cin_per_group cout"]
Output = Shaped[Array, "n oh ow cout"]


def convolve(
    x: Images, kernel: Kernel, op: Conv2d, precision: lax.Precision | None = None
) -> Output:
    """Convolution of `x` with `kernel`, without bias.

    Args:
      x: activations, NHWC.
      kernel: HWIO; input channels are `cin / op.groups`.
      op: strides, padding, groups and dilation.
      precision: as in `lax.conv_general_dilated`; matters on accelerators only.

    Returns:
      The convolution, in the dtype of `x`. Differentiable in reverse mode, to any order.
    """
    native = lambda x, kernel: convolve_native(x, kernel, op, precision)
    special = cpu_special_case(x.shape, kernel.shape, op)
    if special is None:
        return native(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=special, default=native)


def convolve_tiled(x: Images, kernel: Kernel, op: Conv2d) -> Output:
    """`convolve` where a relative error of 1e-5 does not matter: on CPU faster by up to 4."""
    if x.dtype != jnp.float32 or not tileable(x.shape, kernel.shape, op):
        return convolve(x, kernel, op)
    tiled = lambda x, kernel: convolve_by_tiles(x, kernel, op.padding)
    plain = lambda x, kernel: convolve(x, kernel, op)
    return lax.platform_dependent(x, kernel, cpu=tiled, default=plain)


def convolve_transposed(
    x: Images, kernel: Kernel, op: ConvTranspose2d, precision: lax.Precision | None = None
) -> Output:
    """Transposed convolution of `x` with `kernel`, without bias: each pixel paints one kernel.

    Args:
      x: activations, NHWC.
      kernel: HWIO; input channels are `cin / op.groups`.
      op: strides, padding, groups, dilation and extra rows and columns.
      precision: as in `lax.conv_general_dilated`; matters on accelerators only.

    Returns:
      The transposed convolution, `(h - 1) * stride - padding + dilation * (kh - 1) + extra + 1`
      rows high, in the dtype of `x`.
    """
    reach = [d * (k - 1) for d, k in zip(op.dilation, kernel.shape[:2], strict=True)]
    padding = [
        (r - low, r - high + extra)
        for r, (low, high), extra in zip(reach, op.padding, op.extra, strict=True)
    ]
    return lax.conv_general_dilated(
        x,
        jnp.flip(kernel, (0, 1)),
        (1, 1),
        padding,
        lhs_dilation=op.strides,
        rhs_dilation=op.dilation,
        feature_group_count=op.groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


def convolve_volume(
    x: Shaped[Array, "n d h w cin"],
    kernel: Shaped[Array, "kd kh kw cin_per_group cout"],
    op: Conv3d,
    precision: lax.Precision | None = None,
) -> Shaped[Array, "n od oh ow cout"]:
    """Convolution of volumes, without bias, in the dtype of `x`; see `convolve`."""
    return xla_convolution(x, kernel, op, precision)


def cpu_special_case(
    x: tuple[int, ...], kernel: tuple[int, ...], op: Conv2d
) -> Callable[[Images, Kernel], Output] | None:
    """The faster CPU formulation for these static shapes, or None for a general convolution."""
    cin, cout = x[3], kernel[3]
    if op.groups == cin and cout % cin == 0 and op.groups > 1:
        return partial(depthwise, op=op)
    pointwise = kernel[:2] == (1, 1) and op.padding == ((0, 0), (0, 0))
    if pointwise and op.groups == 1:
        return partial(pointwise_by_matmul, op=op)
    return None


def pointwise_by_matmul(x: Images, kernel: Kernel, *, op: Conv2d) -> Output:
    """A 1x1 convolution as one matrix product over all pixels."""
    sh, sw = op.strides
    x = x[:, ::sh, ::sw]
    n, h, w, c = x.shape
    return (x.reshape(n * h * w, c) @ kernel[0, 0]).reshape(n, h, w, kernel.shape[3])


def depthwise(x: Images, kernel: Kernel, *, op: Conv2d) -> Output:
    """A depthwise convolution by shifts; of several outputs a channel, each reads its own copy."""
    if kernel.shape[3] != x.shape[3]:
        x = jnp.repeat(x, kernel.shape[3] // x.shape[3], axis=3)
    return depthwise_by_shifts(x, kernel, op)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve_native(
    x: Images, kernel: Kernel, op: Conv2d, precision: lax.Precision | None
) -> Output:
    """XLA's convolution; its input gradient is written so that CPU loops run it fast."""
    return xla_convolution(x, kernel, op, precision)


def xla_convolution(
    x: Shaped[Array, "n *spatial cin"],
    kernel: Shaped[Array, "*window cin_per_group cout"],
    op: Conv2d | Conv3d,
    precision: lax.Precision | None,
) -> Shaped[Array, "n *out_spatial cout"]:
    """`lax.conv_general_dilated` with channels last."""
    axes = "DHW"[-len(op.strides) :]
    return lax.conv_general_dilated(
        x,
        kernel,
        op.strides,
        op.padding,
        rhs_dilation=op.dilation,
        feature_group_count=op.groups,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        precision=precision,
    )


def native_forward(x: Images, kernel: Kernel, op: Conv2d, precision: lax.Precision | None):
    """Output, and what the gradient needs."""
    return xla_convolution(x, kernel, op, precision), (x, kernel)


def native_backward(
    op: Conv2d, precision: lax.Precision | None, saved: tuple[Images, Kernel], g: Output
) -> tuple[Images, Kernel]:
    """Gradients with respect to input and kernel."""
    x, kernel = saved

    def xla_input_gradient(g: Output, kernel: Kernel) -> Images:
        return jax.vjp(lambda x: xla_convolution(x, kernel, op, precision), x)[1](g)[0]

    explicit = partial(explicit_input_gradient, op=op, shape=x.shape, precision=precision)
    dx = lax.platform_dependent(g, kernel, cpu=explicit, default=xla_input_gradient)

    def xla_kernel_gradient(x: Images, g: Output) -> Kernel:
        return jax.vjp(lambda k: xla_convolution(x, k, op, precision), kernel)[1](g)[0]

    if op.groups > 1:
        return dx, xla_kernel_gradient(x, g)
    by_entries = partial(explicit_kernel_gradient, op=op, window=(kernel.shape[0], kernel.shape[1]))
    return dx, lax.platform_dependent(x, g, cpu=by_entries, default=xla_kernel_gradient)


convolve_native.defvjp(native_forward, native_backward)


def explicit_input_gradient(
    g: Output,
    kernel: Kernel,
    *,
    op: Conv2d,
    shape: tuple[int, ...],
    precision: lax.Precision | None,
) -> Images:
    """The input gradient as a convolution of `g` with the flipped, transposed kernel in HWIO.

    Args:
      g: gradient of the output.
      kernel: of the forward convolution.
      op: the forward convolution.
      shape: of the forward input.
      precision: as in `lax.conv_general_dilated`.

    Returns:
      Gradient of the input.
    """
    kh, kw, cin, cout = kernel.shape
    grouped = jnp.flip(kernel, (0, 1)).reshape(kh, kw, cin, op.groups, cout // op.groups)
    transposed = jnp.transpose(grouped, (0, 1, 4, 3, 2))
    return lax.conv_general_dilated(
        g,
        transposed.reshape(kh, kw, cout // op.groups, op.groups * cin),
        (1, 1),
        transposed_padding(shape[1:3], g.shape[1:3], (kh, kw), op),
        lhs_dilation=op.strides,
        rhs_dilation=op.dilation,
        feature_group_count=op.groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


def explicit_kernel_gradient(x: Images, g: Output, *, op: Conv2d, window: Pair) -> Kernel:
    """The kernel gradient of a convolution with one group, by matrix products.

    3x3 windows of stride 1 over many channels are multiplied as Winograd's tiles, exact to 1e-5 of
    the largest entry.
    """
    few = min(x.shape[-1], g.shape[-1]) < FEWEST
    if not few and winnable(window, op) and min(x.shape[1:3]) >= TILE and x.dtype == jnp.float32:
        return tiled_kernel_gradient(x, g, op.padding)
    padded = jnp.pad(x, ((0, 0), *op.padding, (0, 0)))
    if few and op.strides == (1, 1):
        return kernel_gradient_at_once(padded, g, op.dilation, window)
    flat = lambda v: v.reshape(-1, v.shape[-1])
    entries = [flat(v).T @ flat(g) for v in shifts(padded, op, window).values()]
    return jnp.stack(entries).reshape(*window, x.shape[-1], g.shape[-1])


def kernel_gradient_at_once(padded: Images, g: Output, dilation: Pair, window: Pair) -> Kernel:
    """All entries of the kernel gradient by one matrix product, for few channels.

    With pixels in one line, rows of `width`, entry `(i, j)` is the sum of
    `x[m + j] g[m - i width]` over all `m`: columns of the window are shifted copies of `x`, rows
    shifted copies of `g`. Zeros beside `g` take care of the ends of rows.

    Args:
      padded: inputs with their padding.
      g: gradient of the output.
      dilation: of the window.
      window: its rows and columns.

    Returns:
      The gradient, HWIO.
    """
    (_, height, width, cin), cout = padded.shape, g.shape[-1]
    beside = ((0, 0), (0, height - g.shape[1]), (0, width - g.shape[2]), (0, 0))
    line, slopes = padded.reshape(-1, cin), jnp.pad(g, beside).reshape(-1, cout)
    ahead = [j * dilation[1] for j in range(window[1])]
    behind = [i * dilation[0] * width for i in range(window[0])]
    columns = [jnp.pad(line[d:], ((0, d), (0, 0))) for d in ahead]
    rows = [jnp.pad(slopes[: len(slopes) - d], ((d, 0), (0, 0))) for d in behind]
    product = jnp.concatenate(columns, 1).T @ jnp.concatenate(rows, 1)
    return product.reshape(window[1], cin, window[0], cout).transpose(2, 0, 1, 3)


def transposed_padding(
    inputs: tuple[int, ...], outputs: tuple[int, ...], window: tuple[int, int], op: Conv2d
) -> Pads:
    """Padding with which the transposed convolution gives back the input's size."""
    pads: list[tuple[int, int]] = []
    for axis in range(2):
        reach = op.dilation[axis] * (window[axis] - 1)
        low = reach - op.padding[axis][0]
        spread = (outputs[axis] - 1) * op.strides[axis] + 1
        pads.append((low, inputs[axis] + reach - spread - low))
    return pads[0], pads[1]
