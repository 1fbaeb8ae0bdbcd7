"""The table of PyTorch's operators: {target: what it becomes}, and what they give on constants."""

from functools import partial

from dfq_jax.graph.ops import Relation
from dfq_jax.io.importing import (
    aten,
    aten_core,
    aten_pools,
    aten_views,
    choices,
    gathers,
    one_hot,
    recurrent,
)
from dfq_jax.io.importing.aten_constants import FOLD
from dfq_jax.io.importing.aten_weights import FOLD_TARGETS, FOLD_WEIGHTS
from dfq_jax.io.importing.engine import Fold, Lower, OperatorTable

IGNORED = (
    "contiguous",
    "clone",
    "detach",
    "detach_",
    "alias",
    "lift_fresh_copy",
    "lift_fresh",
    "identity",
    "feature_dropout",
    "positive",
    "type_as",
)
RELATIONS: dict[str, Relation] = {
    **{"eq": "equal", "gt": "greater", "ge": "greater_equal"},
    **{"lt": "less", "le": "less_equal"},
}
SELU = (1.6732632423543772, 1.0507009873554805)
"""Alpha and scale, Klambauer et al. 2017, "Self-Normalizing Neural Networks"."""
CORE: dict[str, Lower] = {
    "_native_batch_norm_legit_no_training": aten_core.batch_norm_recorded,
    "_batch_norm_no_update": aten_core.batch_norm_recorded,
    "native_batch_norm": aten_core.batch_norm,
    "_native_batch_norm_legit": aten_core.batch_norm,
    "_batch_norm_impl_index": aten_core.batch_norm,
    "cudnn_batch_norm": aten_core.batch_norm_of_a_device,
    "miopen_batch_norm": aten_core.batch_norm_of_a_device,
    "native_layer_norm": aten_core.layer_norm,
    "native_group_norm": aten_core.group_norm,
    "rms_norm": aten_core.rms_norm,
    "_safe_softmax": aten.softmax,
    "full_like": aten_core.full_like,
    "ones_like": partial(aten_core.full_like, fill_value=1.0),
    "as_strided": aten_core.restrided,
    "amin": aten_core.least,
    "lerp": aten_core.interpolated,
    "glu": aten_core.gated,
    "index": gathers.indexed,
    "embedding": gathers.embedding,
    "one_hot": one_hot.of_pytorch,
    "index_select": gathers.index_select,
    "repeat_interleave": gathers.repeat_interleave,
}
"""What is left of a network after `run_decompositions()`, beside operators that keep their name."""
NAMED: dict[str, Lower] = {
    **CORE,
    **{name: partial(aten.curve, curve) for name, curve in aten.CURVES.items()},
    **{name: partial(aten.binary, op) for name, op in aten.BINARY.items()},
    **dict.fromkeys(IGNORED, aten.same),
    "conv1d": aten.plain_convolution,
    "conv2d": aten.plain_convolution,
    "convolution": aten.convolution,
    "conv3d": aten.plain_convolution,
    "conv_transpose1d": aten.transposed_convolution,
    "conv_transpose2d": aten.transposed_convolution,
    "linear": aten.linear,
    "addmm": aten.addmm,
    "baddbmm": lambda b, x, batch1, batch2, **scales: aten.addmm(b, x, batch1, batch2, **scales),
    "batch_norm": aten.batch_norm,
    "layer_norm": aten.layer_norm,
    "group_norm": aten.group_norm,
    "instance_norm": aten.instance_norm,
    "relu": aten.relu,
    "relu6": partial(aten.hardtanh, min_val=0, max_val=6),
    "leaky_relu": aten.leaky_relu,
    "prelu": aten.prelu,
    "where": aten.where,
    **{name: partial(choices.compared, relation) for name, relation in RELATIONS.items()},
    "ne": choices.unequal,
    **dict.fromkeys(("logical_not", "bitwise_not"), choices.opposite),
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__"), choices.both),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), choices.either),
    **dict.fromkeys(("logical_xor", "bitwise_xor", "__xor__"), choices.unequal),
    "sign": choices.sign,
    "threshold": aten_core.above,
    "expm1": lambda b, x: aten.pointwise.affine(b, aten.curve("exp", b, x), 1.0, -1.0),
    "log1p": lambda b, x: aten.curve("log", b, aten.pointwise.affine(b, x, 1.0, 1.0)),
    "log_sigmoid": aten_core.log_sigmoid,
    "hardshrink": aten_core.hard_shrunk,
    "softshrink": aten_core.soft_shrunk,
    "fill_": aten.filled,
    "copy": lambda b, x, src, non_blocking=False: aten.filled(b, x, src),
    "copy_": lambda b, x, src, non_blocking=False: aten.filled(b, x, src),
    "zero_": lambda b, x: aten.filled(b, x, 0.0),
    "masked_fill": aten.masked_fill,
    "hardtanh": aten.hardtanh,
    "clamp": aten.clamp,
    "clip": aten.clamp,
    "clamp_min": aten.clamp,
    "clamp_max": lambda b, x, max: aten.clamp(b, x, None, max),
    "gelu": aten.gelu,
    "elu": aten.elu,
    "selu": partial(aten.elu, alpha=SELU[0], scale=SELU[1]),
    "celu": lambda b, x, alpha=1.0: aten.elu(b, x, alpha, 1, 1 / alpha),
    "softplus": aten.softplus,
    "div": aten.divided,
    "rsub": aten.reversed_sub,
    "addcmul": aten.added_product,
    "neg": lambda b, x: aten.pointwise.affine(b, x, -1.0),
    "pow": aten.power,
    "square": lambda b, x: aten.power(b, x, 2.0),
    "rsqrt": lambda b, x: aten.power(b, x, -0.5),
    "reciprocal": lambda b, x: aten.power(b, x, -1.0),
    "softmax": aten.softmax,
    "_softmax": aten.softmax,
    "log_softmax": partial(aten.softmax, logarithm=True),
    "_log_softmax": partial(aten.softmax, logarithm=True),
    "max_pool1d": aten_pools.max_pool,
    "max_pool2d": aten_pools.max_pool,
    "max_pool2d_with_indices": aten_pools.max_pool_with_indices,
    "max_pool3d": aten_pools.max_pool_of_volumes,
    "max_pool3d_with_indices": aten_pools.max_pool_of_volumes_with_indices,
    "avg_pool3d": aten_pools.avg_pool_of_volumes,
    "adaptive_avg_pool3d": aten_pools.adaptive_avg_pool_of_volumes,
    "_adaptive_avg_pool3d": aten_pools.adaptive_avg_pool_of_volumes,
    "avg_pool1d": aten_pools.avg_pool,
    "avg_pool2d": aten_pools.avg_pool,
    "adaptive_avg_pool1d": aten_pools.adaptive_avg_pool,
    "adaptive_avg_pool2d": aten_pools.adaptive_avg_pool,
    "_adaptive_avg_pool2d": aten_pools.adaptive_avg_pool,
    "adaptive_max_pool1d": aten_pools.adaptive_max_pool,
    "adaptive_max_pool2d": aten_pools.adaptive_max_pool,
    "mean": partial(aten_pools.reduction, "mean"),
    "sum": partial(aten_pools.reduction, "sum"),
    "amax": partial(aten_pools.reduction, "max"),
    "linalg_vector_norm": aten_pools.vector_norm,
    "dropout": aten.dropout,
    "to": aten.converted,
    "_to_copy": aten.converted,
    "view": aten_views.view,
    "reshape": aten_views.view,
    "_unsafe_view": aten_views.view,
    "reshape_as": aten_views.view_as,
    "view_as": aten_views.view_as,
    "flatten": aten_views.flatten,
    "unflatten": aten_views.unflatten,
    "permute": aten_views.permute,
    "transpose": aten_views.transpose,
    "swapaxes": aten_views.transpose,
    "swapdims": aten_views.transpose,
    "t": aten_views.matrix_transpose,
    "mT": aten_views.matrix_transpose,
    "squeeze": aten_views.squeeze,
    "unsqueeze": aten_views.unsqueeze,
    "slice": aten_views.sliced,
    "select": aten_views.select,
    "narrow": aten_views.narrow,
    "chunk": aten_views.chunk,
    "split": aten_views.split,
    "split_with_sizes": aten_views.split_with_sizes,
    "tensor_split": aten_views.tensor_split,
    "unbind": aten_views.unbind,
    "cat": aten_views.cat,
    "concat": aten_views.cat,
    "stack": aten_views.stack,
    "expand": aten_views.expand,
    "expand_as": aten_views.expand_as,
    "repeat": aten_views.repeat,
    "pad": aten_views.pad,
    "constant_pad_nd": aten_views.pad,
    "reflection_pad1d": aten_views.reflection_pad,
    "reflection_pad2d": aten_views.reflection_pad,
    "replication_pad1d": aten_views.replication_pad,
    "replication_pad2d": aten_views.replication_pad,
    "roll": aten_views.roll,
    "slice_scatter": aten_views.slice_scatter,
    "select_scatter": aten_views.select_scatter,
    "flip": aten_views.flip,
    "pixel_shuffle": aten_views.pixel_shuffle,
    "pixel_unshuffle": aten_views.pixel_unshuffle,
    "channel_shuffle": aten_views.channel_shuffle,
    "native_channel_shuffle": aten_views.channel_shuffle,
    "matmul": aten_views.matmul,
    "bmm": aten_views.matmul,
    "mm": aten_views.matmul,
    "einsum": aten_views.einsum,
    "scaled_dot_product_attention": aten_views.attention,
    "sym_size": aten_views.size_of,
    "zeros_like": aten_views.zeros_like,
    "new_zeros": partial(aten_views.new_filled, 0.0),
    "new_ones": partial(aten_views.new_filled, 1.0),
    "new_full": partial(aten_views.new_filled, None),
}
TARGETS: dict[str, Lower] = {
    "aten.upsample_nearest2d.vec": partial(aten_pools.upsample, "nearest", False),
    "aten._upsample_nearest_exact2d.vec": partial(aten_pools.upsample, "nearest", True),
    "aten.upsample_bilinear2d.vec": partial(aten_pools.upsample, "bilinear", False),
    "aten.upsample_bicubic2d.vec": partial(aten_pools.upsample, "bicubic", False),
    "aten.upsample_bicubic2d.default": partial(aten_pools.upsample_sized, "bicubic", False),
    "aten.upsample_nearest2d.default": partial(aten_pools.upsample_sized, "nearest", False),
    "aten._upsample_nearest_exact2d.default": partial(aten_pools.upsample_sized, "nearest", True),
    "aten.upsample_bilinear2d.default": partial(aten_pools.upsample_sized, "bilinear", False),
    "aten._native_batch_norm_legit.no_stats": aten_core.present_norm,
    "aten.var.correction": aten_core.variance,
    "aten.var.dim": aten_core.biased_variance,
    "aten.std.correction": aten_core.deviation,
    "aten.std.dim": aten_core.biased_deviation,
    "aten.var_mean.correction": aten_core.variance_and_mean,
    "aten.max.dim": aten_core.greatest_of,
    "aten.min.dim": aten_core.least_of,
    "aten.lstm.input": partial(recurrent.torch_layer, "lstm"),
    "aten.gru.input": partial(recurrent.torch_layer, "gru"),
    "aten.rnn_tanh.input": partial(recurrent.torch_layer, "tanh"),
    "aten.rnn_relu.input": partial(recurrent.torch_layer, "relu"),
    "_operator.getitem": aten_views.getitem,
    "operator.getitem": aten_views.getitem,
}


def lower(target: str) -> Lower | None:
    """What an operator becomes: by its full name, else without overload, mark and `_copy`."""
    if target in TARGETS:
        return TARGETS[target]
    name = bare(target)
    plain = name.removesuffix("_copy")  # views that an exporter made free of shared memory
    return NAMED.get(name) or NAMED.get(name.removesuffix("_")) or NAMED.get(plain)


def fold(target: str) -> Fold | None:
    """What an operator computes on constants."""
    if target in FOLD_TARGETS:
        return FOLD_TARGETS[target]
    known, name = {**FOLD_WEIGHTS, **FOLD}, bare(target)
    plain = name.removesuffix("_copy")
    return known.get(name) or known.get(name.removesuffix("_")) or known.get(plain)


def bare(target: str) -> str:
    """`aten.add_.Tensor` as `add_`; other targets as they are."""
    parts = target.split(".")
    return parts[1] if parts[0] == "aten" and len(parts) > 1 else target


ATEN = OperatorTable(lower, fold)
