"""The table of ONNX's operators, and of those that only move values."""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import Add, Div, Maximum, Minimum, Mul, Sub
from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.io.importing import (
    arrange,
    aten_views,
    choices,
    gathers,
    layers,
    one_hot,
    onnx_ops,
    onnx_pools,
    onnx_resize,
    pointwise,
    recurrent,
)
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.engine import Fold, Lower, OperatorTable
from dfq_jax.io.importing.limits import affordable, affordable_broadcast, affordable_shape
from dfq_jax.io.importing.onnx_attributes import told_attributes
from dfq_jax.io.importing.onnx_ops import constant
from dfq_jax.io.importing.values import Value

Ints = Sequence[int]
ELEMENTWISE = """
Add And Clip Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Or Pow Sub Sum Where
Xor
"""


def axes_of(given: Any, axes: Ints | None) -> tuple[int, ...] | None:
    """Axes from an input or an attribute."""
    if given is None:
        return None if axes is None else tuple(axes)
    return tuple(int(a) for a in constant(given, "axes").reshape(-1))


def integers(given: Any, what: str) -> list[int]:
    """Integers from an input or an attribute."""
    return [int(n) for n in (given if isinstance(given, tuple) else constant(given, what))]


def flatten(b: Builder, x: Value, axis: int = 1) -> Value:
    """Flatten to two axes."""
    at = axis % len(x.dims) if axis < len(x.dims) else axis
    return arrange.viewed(b, x, (math.prod(x.shape[:at]), math.prod(x.shape[at:])))


def reshape(b: Builder, x: Value, shape: Any, allowzero: int = 0) -> Value:
    """Reshape; a 0 keeps the size at its place."""
    wanted = [int(n) for n in constant(shape, "shape")]
    kept = [x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(wanted)]
    return arrange.viewed(b, x, kept)


def transpose(b: Builder, x: Value, perm: Ints | None = None) -> Value:
    """Transpose; all axes reversed by default."""
    return arrange.permuted(x, perm if perm is not None else range(len(x.dims))[::-1])


def squeeze(b: Builder, x: Value, given: Any = None, axes: Ints | None = None) -> Value:
    """Squeeze; axes as an attribute before opset 13, as an input since."""
    return arrange.squeezed(x, axes_of(given, axes))


def unsqueeze(b: Builder, x: Value, given: Any = None, axes: Ints | None = None) -> Value:
    """Unsqueeze; axes as an attribute before opset 13, as an input since."""
    chosen = axes_of(given, axes) or ()
    rank = len(x.dims) + len(chosen)
    for axis in sorted(a % rank for a in chosen):
        x = arrange.unsqueezed(x, axis)
    return x


def concat(b: Builder, *parts: Any, axis: int) -> Value:
    """Concat."""
    return arrange.joined(b, [p for p in parts if math.prod(p.shape)], axis)


def split(
    b: Builder,
    x: Value,
    given: Any = None,
    axis: int = 0,
    split: Ints | None = None,
    num_outputs: int | None = None,
    outputs: int | None = None,
) -> tuple[Value, ...]:
    """Split into the given lengths, or evenly, the last one shorter."""
    lengths = split if given is None else [int(n) for n in constant(given, "split")]
    size, count = x.shape[axis], num_outputs or outputs
    if lengths is None:
        if count is None:
            raise UnsupportedModelError("a split into an unknown number of pieces.")
        each = -(-size // count)
        lengths = [min(each, size - i) for i in range(0, size, each)]
    return arrange.split(b, x, axis, list(lengths))


def sliced(
    b: Builder, x: Value, starts: Any, ends: Any, axes: Any = None, steps: Any = None
) -> Value | np.ndarray:
    """Slice, by attributes before opset 10; an empty one is a constant, which Concat leaves out."""
    rank = len(x.dims)
    first, last = integers(starts, "starts"), integers(ends, "ends")
    over = list(range(len(first))) if axes is None else integers(axes, "axes")
    step = [1] * len(first) if steps is None else integers(steps, "steps")
    for axis, start, end, by in zip(over, first, last, step, strict=True):
        size = x.shape[axis % rank]
        stop = None if end >= size or (by < 0 and end < -size) else end
        if not range(size)[start:stop:by]:
            return np.zeros([0 if i == axis % rank else n for i, n in enumerate(x.shape)])
        x = arrange.sliced(b, x, axis % rank, min(start, size), stop, by)
    return x


def gather(b: Builder, x: Any, indices: Any, axis: int = 0) -> Value:
    """Gather by ids of tokens, or with constant indices: one of them, or evenly spaced ones."""
    if not isinstance(x, Value):
        if axis != 0:
            raise UnsupportedModelError("columns of a table at places that the network computes.")
        return gathers.looked_up(b, x, indices)
    at, size = constant(indices, "indices"), x.shape[axis]
    if at.ndim == 0:
        return arrange.selected(b, x, axis, int(at))
    index = [int(i) % size for i in at.reshape(-1)]
    steps = {j - i for i, j in itertools.pairwise(index)} or {1}
    if at.ndim != 1 or len(steps) != 1 or 0 in steps:
        picked = [arrange.sliced(b, x, axis, i, i + 1) for i in index]
        if at.ndim != 1:
            raise UnsupportedModelError(f"gathering with indices of shape {at.shape}.")
        return arrange.joined(b, picked, axis)
    step = steps.pop()
    end = index[-1] + (1 if step > 0 else -1)
    return arrange.sliced(b, x, axis, index[0], None if end < 0 else end, step)


def marked(b: Builder, ids: Value, depth: Any, values: Any, axis: int = -1) -> Value:
    """OneHot: two values for each id that there is, the second of them for that given."""
    off, on = (float(v) for v in constant(values, "values").reshape(-1))
    found = one_hot.marked(b, ids, int(constant(depth, "depth").reshape(())), axis)
    return pointwise.affine(b, found, on - off, off)


def expand(b: Builder, x: Value, shape: Any) -> Value:
    """Expand: NumPy's rule, sizes of 1 keep what is there."""
    wanted = [int(n) for n in constant(shape, "shape")]
    while len(x.dims) < len(wanted):
        x = arrange.unsqueezed(x, 0)
    lead = len(x.dims) - len(wanted)
    full = [*x.shape[:lead], *(max(n, h) for n, h in zip(wanted, x.shape[lead:], strict=True))]
    return arrange.expanded(b, x, full)


def tile(b: Builder, x: Value, repeats: Any) -> Value:
    """Tile."""
    return aten_views.repeat(b, x, [int(n) for n in constant(repeats, "repeats")])


def depth_to_space(b: Builder, x: Value, blocksize: int, mode: str = "DCR") -> Value:
    """DepthToSpace: channels to pixels, block first (DCR) or channel first (CRD)."""
    return layers.depth_to_space(b, x, DepthToSpace(blocksize, inner=mode == "CRD"))


def space_to_depth(b: Builder, x: Value, blocksize: int, mode: str = "DCR") -> Value:
    """SpaceToDepth: pixels to channels, block first (DCR) or channel first (CRD)."""
    n, c, h, w = x.shape
    y = arrange.viewed(b, x, (n, c, h // blocksize, blocksize, w // blocksize, blocksize))
    y = arrange.permuted(y, (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4))
    return arrange.viewed(b, y, (n, c * blocksize**2, h // blocksize, w // blocksize))


def shape_of(b: Builder, x: Value, start: int = 0, end: int | None = None) -> np.ndarray:
    """Shape: known when the network is imported."""
    return np.array(x.shape[start:end], np.int64)


def size_of(b: Builder, x: Value) -> np.ndarray:
    """Size."""
    return np.array(math.prod(x.shape), np.int64)


def einsum(b: Builder, *tensors: Any, equation: str) -> Value:
    """Einsum of two tensors."""
    return aten_views.einsum(b, equation, tensors)


LOWER: dict[str, Lower] = {
    "Conv": onnx_ops.conv,
    "ConvTranspose": onnx_ops.conv_transpose,
    "Gemm": onnx_ops.gemm,
    "MatMul": onnx_ops.matmul,
    "BatchNormalization": onnx_ops.batch_normalization,
    "LayerNormalization": onnx_ops.layer_normalization,
    "GroupNormalization": onnx_ops.group_normalization,
    "InstanceNormalization": onnx_ops.instance_normalization,
    "Relu": onnx_ops.relu,
    "Clip": onnx_ops.clip,
    "LeakyRelu": onnx_ops.leaky_relu,
    "PRelu": onnx_ops.prelu,
    "HardSigmoid": onnx_ops.hard_sigmoid,
    "HardSwish": partial(onnx_ops.curve, "hard_swish"),
    "Sigmoid": partial(onnx_ops.curve, "sigmoid"),
    "Tanh": partial(onnx_ops.curve, "tanh"),
    "Softplus": partial(onnx_ops.curve, "softplus"),
    "Exp": partial(onnx_ops.curve, "exp"),
    "Sqrt": partial(onnx_ops.curve, "sqrt"),
    "Abs": partial(onnx_ops.curve, "abs"),
    "Erf": partial(onnx_ops.curve, "erf"),
    "Mish": onnx_ops.mish,
    "Gelu": onnx_ops.gelu,
    "Elu": onnx_ops.elu,
    "Selu": onnx_ops.selu,
    "Celu": onnx_ops.celu,
    "Log": partial(onnx_ops.curve, "log"),
    "Round": partial(onnx_ops.curve, "round"),
    "Swish": onnx_ops.swish,
    "Pow": onnx_ops.power,
    "Reciprocal": partial(onnx_ops.raised, -1.0),
    "Neg": onnx_ops.negated,
    "Add": partial(onnx_ops.binary, Add()),
    "Sum": partial(onnx_ops.binary, Add()),
    "Sub": partial(onnx_ops.binary, Sub()),
    "Mul": partial(onnx_ops.binary, Mul()),
    "Div": partial(onnx_ops.binary, Div()),
    "Max": partial(onnx_ops.binary, Maximum()),
    "Min": partial(onnx_ops.binary, Minimum()),
    "Softmax": partial(onnx_ops.softmax, False),
    "LogSoftmax": partial(onnx_ops.softmax, True),
    **{kind: partial(recurrent.onnx_layer, kind) for kind in ("LSTM", "GRU", "RNN")},
    "LRN": onnx_ops.local_norm,
    "Where": choices.selected,
    "Equal": partial(choices.compared, "equal"),
    "Greater": partial(choices.compared, "greater"),
    "GreaterOrEqual": partial(choices.compared, "greater_equal"),
    "Less": partial(choices.compared, "less"),
    "LessOrEqual": partial(choices.compared, "less_equal"),
    "Not": choices.opposite,
    "And": choices.both,
    "Or": choices.either,
    "Xor": choices.unequal,
    "Sign": choices.sign,
    "IsNaN": onnx_ops.is_nan,
    "MaxPool": onnx_pools.max_pool,
    "AveragePool": onnx_pools.average_pool,
    "LpPool": onnx_pools.lp_pool,
    "GlobalAveragePool": partial(onnx_pools.global_pool, "mean"),
    "GlobalMaxPool": partial(onnx_pools.global_pool, "max"),
    "ReduceMean": partial(onnx_pools.reduction, "mean"),
    "ReduceSum": partial(onnx_pools.reduction, "sum"),
    "ReduceMax": partial(onnx_pools.reduction, "max"),
    "ReduceMin": onnx_pools.least,
    "ReduceL2": partial(onnx_pools.reduction, "l2"),
    "Resize": onnx_resize.resize,
    "Upsample": onnx_resize.upsample,
    "Pad": onnx_pools.pad,
    "Identity": onnx_ops.same,
    "Dropout": onnx_ops.dropout,
    "Cast": onnx_ops.cast,
    "Flatten": flatten,
    "Reshape": reshape,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Concat": concat,
    "Split": split,
    "Slice": sliced,
    "Gather": gather,
    "OneHot": marked,
    "Expand": expand,
    "Tile": tile,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "Shape": shape_of,
    "Size": size_of,
    "Einsum": einsum,
}
FOLDED = """
Abs Add And ArgMax BatchNormalization Cast Ceil Clip Concat ConstantOfShape Cos CumSum Div Equal Erf
Exp Expand Flatten Floor Gather GatherElements GatherND Gemm Greater GreaterOrEqual Identity Less
LessOrEqual Log MatMul Max Min Mod Mul Neg Not OneHot Or Pow Range Reciprocal ReduceMax ReduceMean
ReduceMin ReduceProd ReduceSum Relu Reshape Round ScatterElements ScatterND Shape Sigmoid Sign Sin
Size Slice Split Sqrt Squeeze Sub Sum Tanh Tile Transpose Trilu Unsqueeze Where Xor
"""


def lower(target: str) -> Lower | None:
    """What an operator becomes."""
    kind = target.removeprefix("onnx.")
    known = target.startswith("onnx.") and kind in LOWER
    return partial(lowered, kind) if known else None


def lowered(kind: str, b: Builder, *inputs: Any, **attributes: Any) -> Any:
    """One node lowered.

    Raises:
      UnsupportedModelError: if it cannot be, or has an attribute that nobody here handles.
    """
    function = LOWER[kind]
    return function(b, *inputs, **told_attributes(kind, function, attributes))


def fold(target: str) -> Fold | None:
    """What an operator computes on constants."""
    kind = target.removeprefix("onnx.")
    return (
        partial(reference, kind) if kind in FOLDED.split() and target.startswith("onnx.") else None
    )


def reference(kind: str, *inputs: Any, opset_version: int, outputs: int = 1, **attributes: Any):
    """One node computed by ONNX's reference implementation.

    Raises:
      UnsupportedModelError: if it cannot be, or would make a tensor beyond reason.
    """
    check_growth(kind, inputs, attributes.get("axis", 0))
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    given = {n: x for n, x in zip(names, inputs, strict=True) if x is not None}
    results = [f"y{i}" for i in range(outputs)]
    for name, value in attributes.items():
        if isinstance(value, np.ndarray):
            attributes[name] = onnx.numpy_helper.from_array(value)
    try:
        node = onnx.helper.make_node(kind, names, results, **attributes)
        types = list(map(any_type, given)), list(map(any_type, results))
        graph = onnx.helper.make_graph([node], "constant", *types)
        opset = [onnx.helper.make_opsetid("", opset_version)]
        proto = onnx.helper.make_model(graph, opset_imports=opset)
        found = ReferenceEvaluator(proto).run(None, given)
    except Exception as error:  # the reference implementation raises whatever it meets
        raise UnsupportedModelError(f"it cannot be computed on constants: {error}") from error
    arrays = tuple(np.asarray(a) for a in found)
    return arrays[0] if len(arrays) == 1 else arrays


def any_type(name: str) -> onnx.ValueInfoProto:
    """A value whose type nobody states."""
    return onnx.helper.make_empty_tensor_value_info(name)


def check_growth(kind: str, inputs: Sequence[Any], axis: int = 0) -> None:
    """Refuses constants that would fill the memory, before they are computed."""
    arrays = [x for x in inputs if isinstance(x, np.ndarray)]
    match kind:
        case "ConstantOfShape":
            affordable_shape(arrays[0].tolist())
        case "Range":
            start, end, step = (float(x.reshape(())) for x in arrays)
            affordable(abs((end - start) / step) if step else 0)
        case "Expand" | "Tile":
            affordable(arrays[0].size * math.prod(max(int(n), 1) for n in arrays[1]))
        case "MatMul" | "Gemm":
            affordable(arrays[0].size * arrays[1].size / max(arrays[0].shape[-1:] or (1,)))
        case "Gather" | "GatherND" | "OneHot":
            width = int(arrays[1].reshape(-1)[0]) if kind == "OneHot" else arrays[0].size
            indices = arrays[0] if kind == "OneHot" else arrays[1]
            share = arrays[0].shape[axis] if kind == "Gather" and arrays[0].ndim else 1
            affordable(indices.size * width / max(share, 1))
        case "Concat":
            affordable(sum(x.size for x in arrays))
        case _ if kind in ELEMENTWISE.split():
            affordable_broadcast(*arrays)
        case _:
            pass


ONNX = OperatorTable(lower, fold)
