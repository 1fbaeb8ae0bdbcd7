"""PyTorch's pooling, reductions and resampling: what each becomes."""

from collections.abc import Sequence
from typing import Any, Literal

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.importing import layers, pools, volumes
from dfq_jax.io.importing.aten import needs
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.pointwise import Number
from dfq_jax.io.importing.values import Value

PerAxis = Sequence[int] | int


def max_pool(
    b: Builder,
    x: Value,
    kernel_size: PerAxis,
    stride: PerAxis = (),
    padding: PerAxis = 0,
    dilation: PerAxis = 1,
    ceil_mode: bool = False,
) -> Value:
    """max_pool1d, max_pool2d."""
    rank = len(x.dims)
    window = layers.pair(kernel_size, rank, 1)
    strides = layers.pair(stride or kernel_size, rank, 1)
    dilations = layers.pair(dilation, rank, 1)
    pads = layers.pads(padding, rank)
    return pools.max_pool(b, x, window, strides, pads, dilations, ceil_mode)


def max_pool_with_indices(b: Builder, x: Value, *given: Any, **named: Any) -> tuple[Value, None]:
    """The maximum; nobody may read the indices."""
    return max_pool(b, x, *given, **named), None


def avg_pool(
    b: Builder,
    x: Value,
    kernel_size: PerAxis,
    stride: PerAxis = (),
    padding: PerAxis = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    """avg_pool1d, avg_pool2d."""
    rank = len(x.dims)
    return pools.avg_pool(
        b,
        x,
        layers.pair(kernel_size, rank, 1),
        layers.pair(stride or kernel_size, rank, 1),
        layers.pads(padding, rank),
        ceil=ceil_mode,
        count_padding=count_include_pad,
        divisor=divisor_override,
    )


def max_pool_of_volumes(
    b: Builder,
    x: Value,
    kernel_size: PerAxis,
    stride: PerAxis = (),
    padding: PerAxis = 0,
    dilation: PerAxis = 1,
    ceil_mode: bool = False,
) -> Value:
    """max_pool3d."""
    size, steps, spread = map(volumes.triple, (kernel_size, stride or kernel_size, dilation))
    a, c, e = ((n, n) for n in volumes.triple(padding))
    return volumes.max_volumes(b, x, size, steps, (a, c, e), spread, ceil_mode)


def max_pool_of_volumes_with_indices(
    b: Builder, x: Value, *given: Any, **named: Any
) -> tuple[Value, None]:
    """max_pool3d_with_indices; nobody may read the indices."""
    return max_pool_of_volumes(b, x, *given, **named), None


def avg_pool_of_volumes(
    b: Builder,
    x: Value,
    kernel_size: PerAxis,
    stride: PerAxis = (),
    padding: PerAxis = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    """avg_pool3d."""
    needs(divisor_override is None, "volumes divided by another number than their window has.")
    size, steps = volumes.triple(kernel_size), volumes.triple(stride or kernel_size)
    a, c, e = ((n, n) for n in volumes.triple(padding))
    how = {"ceil": ceil_mode, "count_padding": count_include_pad}
    return volumes.mean_volumes(b, x, size, steps, (a, c, e), **how)


def adaptive_avg_pool_of_volumes(b: Builder, x: Value, output_size: PerAxis) -> Value:
    """adaptive_avg_pool3d to one value, or to windows that divide the volume."""
    wanted, have = volumes.triple(output_size), x.shape[2:]
    if wanted == (1, 1, 1):
        return pools.reduced(b, x, "mean", (2, 3, 4), keepdims=True)
    needs(
        all(n % m == 0 for n, m in zip(have, wanted, strict=True)),
        f"adaptive pooling from {have} to {wanted}: windows would differ in size.",
    )
    a, c, e = (n // m for n, m in zip(have, wanted, strict=True))
    return volumes.mean_volumes(b, x, (a, c, e), (a, c, e), ((0, 0), (0, 0), (0, 0)))


def adaptive_avg_pool(b: Builder, x: Value, output_size: PerAxis) -> Value:
    """adaptive_avg_pool1d, adaptive_avg_pool2d."""
    return pools.adaptive_avg_pool(b, x, listed(output_size))


def adaptive_max_pool(b: Builder, x: Value, output_size: PerAxis) -> tuple[Value, None]:
    """adaptive_max_pool1d, adaptive_max_pool2d; nobody may read the indices."""
    return pools.adaptive_max_pool(b, x, listed(output_size)), None


def listed(size: PerAxis) -> list[int]:
    """A number as a list of one."""
    return [size] if isinstance(size, int) else list(size)


def reduction(
    kind: Literal["mean", "sum", "max"],
    b: Builder,
    x: Value,
    dim: Any = None,
    keepdim: bool = False,
    dtype: Any = None,
) -> Value:
    """mean, sum, amax over some axes."""
    axes = () if dim is None else tuple(listed(dim))
    needs(bool(axes), "a reduction over all axes, the batch among them.")
    return pools.reduced(b, x, kind, axes, keepdims=keepdim)


def vector_norm(
    b: Builder,
    x: Value,
    ord: Number = 2,
    dim: PerAxis | None = None,
    keepdim: bool = False,
    dtype: Any = None,
) -> Value:
    """Euclidean norm over some axes."""
    if ord != 2 or dim is None:
        raise UnsupportedModelError(f"norm of order {ord} over axes {dim}.")
    return pools.reduced(b, x, "l2", listed(dim), keepdims=keepdim)


def upsample(
    method: Literal["nearest", "bilinear", "bicubic"],
    exact: bool,
    b: Builder,
    x: Value,
    output_size: Any = None,
    align_corners: bool = False,
    scale_factors: Any = None,
) -> Value:
    """upsample_nearest2d (or exact), upsample_bilinear2d, upsample_bicubic2d, `.vec` overloads."""
    scales: Any = scale_factors or (None, None)
    size = output_size or [int(n * s) for n, s in zip(x.shape[2:], scales, strict=True)]
    return upsample_sized(method, exact, b, x, size, align_corners, *scales)


def upsample_sized(
    method: Literal["nearest", "bilinear", "bicubic"],
    exact: bool,
    b: Builder,
    x: Value,
    output_size: Any,
    align_corners: bool = False,
    scales_h: Number | None = None,
    scales_w: Number | None = None,
) -> Value:
    """The overloads with one scale for each axis."""
    if align_corners:
        return pools.resized(b, x, output_size, (None, None), method, "align_corners")
    if exact:
        return pools.resized(b, x, output_size, (scales_h, scales_w), method, "half_pixel")
    shortcuts = (1, 2) if method == "nearest" else (1,)  # times the size, whatever the scale
    scales = [
        None if out in [n * have for n in shortcuts] else scale
        for have, out, scale in zip(x.shape[2:], output_size, (scales_h, scales_w), strict=True)
    ]
    place = "asymmetric" if method == "nearest" else "half_pixel"
    return pools.resized(b, x, output_size, scales, method, place)
