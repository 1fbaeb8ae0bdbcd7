"""The canonical operators: a closed union of small frozen dataclasses.

Activations are NHWC, convolution kernels HWIO, linear kernels (in, out). Adding an operator means:
a class here, a case in `evaluate.apply_op`, a case in `io/onnx_nodes.py`; the type checker points
at every `match` that misses it.
"""

import dataclasses

Pair = tuple[int, int]
Pads = tuple[tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True, slots=True)
class Conv2d:
    """Convolution. Slots: kernel Float[kh kw cin/groups cout], optional bias Float[cout]."""

    strides: Pair = (1, 1)
    padding: Pads = ((0, 0), (0, 0))
    groups: int = 1
    dilation: Pair = (1, 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Linear:
    """Matrix product over the last axis. Slots: kernel Float[in out], optional bias Float[out]."""


@dataclasses.dataclass(frozen=True, slots=True)
class BatchNorm:
    """Inference-time batch norm. Slots: mean, var Float[c], optional scale, bias Float[c]."""

    eps: float = 1e-5


@dataclasses.dataclass(frozen=True, slots=True)
class Relu:
    """max(x, 0), capped at `ceiling` when given (6.0 is ReLU6)."""

    ceiling: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Add:
    """Elementwise sum of two tensors of one shape."""


@dataclasses.dataclass(frozen=True, slots=True)
class MaxPool:
    """Maximum over windows; padding never wins."""

    window: Pair
    strides: Pair
    padding: Pads = ((0, 0), (0, 0))


@dataclasses.dataclass(frozen=True, slots=True)
class AvgPool:
    """Mean over windows; `count_padding` divides by the full window at the border."""

    window: Pair
    strides: Pair
    padding: Pads = ((0, 0), (0, 0))
    count_padding: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class GlobalAvgPool:
    """Mean over height and width: Float[n h w c] -> Float[n c]."""


@dataclasses.dataclass(frozen=True, slots=True)
class Flatten:
    """All axes but the first into one, in NHWC order (importers permute the next kernel)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """x[start:stop:step] along each axis; `stop` None runs to the end. One triple per axis."""

    bounds: tuple[tuple[int, int | None, int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Pad:
    """Constant padding, (before, after) for each axis."""

    widths: tuple[tuple[int, int], ...]
    value: float = 0.0


Op = (
    Conv2d
    | Linear
    | BatchNorm
    | Relu
    | Add
    | MaxPool
    | AvgPool
    | GlobalAvgPool
    | Flatten
    | Slice
    | Pad
)

WEIGHTED = (Conv2d, Linear)
"""Operators with a `kernel` slot: what quantization, folding and pruning act on."""

SAME_VALUES = (MaxPool, Flatten, Slice, Relu)
"""Operators whose outputs are among their inputs (or a clip of them): they need no new scale."""
