"""The canonical operators: a closed union of small frozen dataclasses.

Images are NHWC, convolution kernels HWIO, linear kernels (in, out); axes count from the batch, 0.
An operator has a class here, its meaning in `graph/semantics.py`, its form in `io/onnx/nodes.py`.
"""

import dataclasses
from typing import Literal

from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.graph.token_ops import OfTokens, RmsNorm
from dfq_jax.graph.volume_ops import Conv3d

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
class ConvTranspose2d:
    """Transposed convolution: `padding` is cut from the full result, `extra` added at its end.

    Slots: kernel Float[kh kw cin/groups cout] as it is applied to one input pixel (not flipped),
    optional bias Float[cout].
    """

    strides: Pair = (1, 1)
    padding: Pads = ((0, 0), (0, 0))
    groups: int = 1
    dilation: Pair = (1, 1)
    extra: Pair = (0, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Linear:
    """Matrix product over the last axis. Slots: kernel Float[in out], optional bias Float[out]."""


@dataclasses.dataclass(frozen=True, slots=True)
class MatMul:
    """Matrix product of two tensors over their last two axes, the others broadcast.

    With `transposed` the second one is given as (…, columns, inner).
    """

    transposed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class BatchNorm:
    """Inference-time batch norm. Slots: mean, var Float[c], optional scale, bias Float[c]."""

    eps: float = 1e-5


@dataclasses.dataclass(frozen=True, slots=True)
class LayerNorm:
    """Normalisation over the last axis. Optional slots: scale, bias Float[c]."""

    eps: float = 1e-5


@dataclasses.dataclass(frozen=True, slots=True)
class GroupNorm:
    """Normalisation over positions and groups of channels. Optional slots: scale, bias Float[c]."""

    groups: int
    eps: float = 1e-5


@dataclasses.dataclass(frozen=True, slots=True)
class LocalNorm:
    """x / (offset + alpha * mean of x^2 over `size` neighbouring channels) ^ beta.

    Channels are the last axis; those beyond its ends count as zeros. `size` is odd.
    """

    size: int
    alpha: float = 1e-4
    beta: float = 0.75
    offset: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Relu:
    """max(x, 0), capped at `ceiling` when given (6.0 is ReLU6)."""

    ceiling: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class LeakyRelu:
    """x where positive, `slope * x` elsewhere."""

    slope: float = 0.01


@dataclasses.dataclass(frozen=True, slots=True)
class PRelu:
    """x where positive, `slope * x` elsewhere. Slot: slope Float[c] or Float[1]."""


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
    """Values limited to [low, high]; None leaves an end open."""

    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Elu:
    """`scale * x` where positive, `scale * alpha * (exp(x) - 1)` elsewhere."""

    alpha: float = 1.0
    scale: float = 1.0


Curve = Literal[
    "sigmoid",
    "tanh",
    "silu",
    "gelu",
    "gelu_tanh",
    "hard_sigmoid",
    "hard_swish",
    "mish",
    "softplus",
    "elu",
    "exp",
    "sqrt",
    "abs",
    "erf",
    "log",
    "round",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise curve without parameters, by its usual name.

    `gelu` is exact, `gelu_tanh` its approximation; `hard_sigmoid` is `relu6(x + 3) / 6`; `round`
    takes halves to the even number.
    """

    curve: Curve


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """`factor * x + offset` with two numbers."""

    factor: float = 1.0
    offset: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Power:
    """x ** exponent."""

    exponent: float


@dataclasses.dataclass(frozen=True, slots=True)
class Softmax:
    """Softmax along one axis."""

    axis: int = -1


@dataclasses.dataclass(frozen=True, slots=True)
class LogSoftmax:
    """Logarithm of a softmax along one axis."""

    axis: int = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Add:
    """Elementwise sum; axes of size 1 broadcast."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sub:
    """Elementwise difference; axes of size 1 broadcast."""


@dataclasses.dataclass(frozen=True, slots=True)
class Mul:
    """Elementwise product; axes of size 1 broadcast."""


@dataclasses.dataclass(frozen=True, slots=True)
class Div:
    """Elementwise quotient; axes of size 1 broadcast."""


@dataclasses.dataclass(frozen=True, slots=True)
class Maximum:
    """Elementwise maximum; axes of size 1 broadcast."""


@dataclasses.dataclass(frozen=True, slots=True)
class Minimum:
    """Elementwise minimum; axes of size 1 broadcast."""


Relation = Literal["equal", "greater", "greater_equal", "less", "less_equal"]


@dataclasses.dataclass(frozen=True, slots=True)
class Compare:
    """1 where a relation holds between two tensors, 0 elsewhere; axes of size 1 broadcast."""

    relation: Relation


@dataclasses.dataclass(frozen=True, slots=True)
class Select:
    """The second argument where the first is not 0, the third elsewhere; axes of 1 broadcast."""


@dataclasses.dataclass(frozen=True, slots=True)
class MaxPool:
    """Maximum over windows; padding never wins, and may be negative (a crop)."""

    window: Pair
    strides: Pair
    padding: Pads = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)


@dataclasses.dataclass(frozen=True, slots=True)
class AvgPool:
    """Mean over windows; `count_padding` divides by the full window at the border."""

    window: Pair
    strides: Pair
    padding: Pads = ((0, 0), (0, 0))
    count_padding: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class AdaptiveAvgPool:
    """Mean over `size` windows that cover the image evenly; they overlap where they must."""

    size: Pair


@dataclasses.dataclass(frozen=True, slots=True)
class GlobalAvgPool:
    """Mean over height and width: Float[n h w c] -> Float[n c], or Float[n 1 1 c]."""

    keepdims: bool = False


Cell = Literal["lstm", "gru", "tanh", "relu"]


@dataclasses.dataclass(frozen=True, slots=True)
class Recurrent:
    """One direction of a recurrent layer: Float[n t in] -> Float[n t hidden].

    It starts from a state of zeros, with `reverse` at the last step. Of a GRU `reset_after` tells
    whether the reset gate acts on the product of the state or on the state. Slots: input
    Float[in gates*hidden], state Float[hidden gates*hidden], bias and state_bias
    Float[gates*hidden]. Gates in ONNX's order: of an LSTM input, output, forget, cell; of a GRU
    update, reset, new. With `remembers`, what an LSTM keeps to itself after its last step instead:
    Float[n hidden].
    """

    cell: Cell
    reverse: bool = False
    reset_after: bool = True
    remembers: bool = False


Reduction = Literal["mean", "sum", "max", "l2"]


@dataclasses.dataclass(frozen=True, slots=True)
class Reduce:
    """Mean, sum, maximum or Euclidean norm over some axes."""

    kind: Reduction
    axes: tuple[int, ...]
    keepdims: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Flatten:
    """All axes but the first into one, in NHWC order (importers permute the next kernel)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reshape:
    """The same values in row-major order as (n, *shape); one size may be -1, whatever is left."""

    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Transpose:
    """Axes in another order; `order[i]` is the axis that becomes axis i, and `order[0]` is 0."""

    order: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """x[start:stop:step] along each axis; `stop` None runs to the end. One triple per axis."""

    bounds: tuple[tuple[int, int | None, int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Concat:
    """Tensors joined along one axis; one of a single row serves every image of the batch."""

    axis: int


@dataclasses.dataclass(frozen=True, slots=True)
class Broadcast:
    """Axes of size 1 repeated to (n, *shape); -1 keeps a size."""

    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Pad:
    """Padding, (before, after) for each axis, with a constant, or with what the image shows."""

    widths: tuple[tuple[int, int], ...]
    value: float = 0.0
    mode: Literal["constant", "reflect", "edge"] = "constant"


@dataclasses.dataclass(frozen=True, slots=True)
class Resize:
    """Height and width resampled.

    Output pixel i reads the input at `(i + 0.5) / scale - 0.5` (`half_pixel`), `i / scale`
    (`asymmetric`) or so that the corners meet (`align_corners`), clamped to the image. `nearest`
    takes the pixel below with `asymmetric`, else the closest one (halves upward). `bicubic` weighs
    four pixels by Keys' kernel with parameter `cubic`; with `smooth` the kernel of `bilinear` is as
    wide as the image shrinks. Both take the pixel at the border for those beyond, or with `inside`
    leave them out and weigh the others more. Size None: `scale` times that read, rounded down.
    """

    size: Pair | None
    scale: tuple[float, float]
    method: Literal["nearest", "bilinear", "bicubic"] = "nearest"
    coordinates: Literal["half_pixel", "asymmetric", "align_corners"] = "asymmetric"
    cubic: float = -0.75
    inside: bool = False
    smooth: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
    """A tensor of its own, the same for every image. Slot: value Float[1 ...]."""


Weighted = Conv2d | ConvTranspose2d | Conv3d | Linear
Norm = BatchNorm | LayerNorm | RmsNorm | GroupNorm | LocalNorm
Pointwise = Relu | LeakyRelu | PRelu | Clip | Elu | Activation | Scale | Power
Combine = Add | Sub | Mul | Div | Maximum | Minimum | Compare
Pool = MaxPool | AvgPool | AdaptiveAvgPool | GlobalAvgPool
Arrange = Flatten | Reshape | Transpose | Slice | Concat | Broadcast | Pad | DepthToSpace
Op = (
    Weighted
    | MatMul
    | Recurrent
    | Norm
    | Pointwise
    | Softmax
    | LogSoftmax
    | Combine
    | Select
    | Pool
    | Reduce
    | Arrange
    | Resize
    | OfTokens
    | Constant
)

WEIGHTED = (Conv2d, ConvTranspose2d, Conv3d, Linear)
"""Operators with a `kernel` slot: what quantization, folding and pruning act on."""
