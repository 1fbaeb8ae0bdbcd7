"""The table of JAX's primitives: what each becomes, and what it gives on constants."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import Add, Maximum, Minimum, Sub
from dfq_jax.io.importing import choices, jax_layers, jax_ops, jax_views, jax_windows
from dfq_jax.io.importing.builder import Builder
from dfq_jax.io.importing.engine import Fold, Lower, OperatorTable
from dfq_jax.io.importing.jax_makers import PREFIX
from dfq_jax.io.importing.limits import affordable, affordable_shape
from dfq_jax.io.readers.pickle_policy import show

HARMLESS = frozenset(
    (
        *("accuracy", "precision", "preferred_element_type"),  # everything is float32
        *("weak_type", "exponent_bits", "mantissa_bits"),
        *("out_sharding", "sharding"),  # one device computes it
        *("indices_are_sorted", "unique_indices", "fill_value"),  # constant ones are looked at
        "mode",
    )
)
"""Parameters that change nothing that is read here."""
LOWER: dict[str, Lower] = {
    "conv_general_dilated": jax_windows.convolution,
    "dot_general": jax_views.dot_general,
    "batchnorm": jax_layers.batch_norm,
    "namedbatchnorm": jax_layers.named_batch_norm,
    "layernorm": jax_layers.layer_norm,
    "groupnorm": jax_layers.group_norm,
    "softmax": jax_ops.softmax,
    "log_softmax": partial(jax_ops.softmax, logarithm=True),
    "window_mean": jax_windows.window_mean,
    "add_bias": jax_ops.biased,
    "reduce_window_max": jax_windows.max_pool,
    "reduce_window_min": jax_windows.min_pool,
    "reduce_window_sum": jax_windows.sum_pool,
    "reduce_sum": jax_windows.total,
    "reduce_max": jax_windows.largest,
    "reduce_min": jax_windows.smallest,
    "add": partial(jax_ops.combined, Add()),
    "add_any": partial(jax_ops.combined, Add()),
    "sub": partial(jax_ops.combined, Sub()),
    "max": partial(jax_ops.combined, Maximum()),
    "min": partial(jax_ops.combined, Minimum()),
    "mul": jax_ops.multiplied,
    "div": jax_ops.divided,
    "neg": jax_ops.negated,
    "exp": partial(jax_ops.curve, "exp"),
    "exp2": jax_ops.exp2,
    "expm1": jax_ops.expm1,
    "log": partial(jax_ops.curve, "log"),
    "log1p": jax_ops.log1p,
    "tanh": partial(jax_ops.curve, "tanh"),
    "logistic": partial(jax_ops.curve, "sigmoid"),
    "erf": partial(jax_ops.curve, "erf"),
    "erfc": jax_ops.erfc,
    "abs": partial(jax_ops.curve, "abs"),
    "sqrt": partial(jax_ops.curve, "sqrt"),
    "rsqrt": partial(jax_ops.power, exponent=-0.5),
    "square": partial(jax_ops.power, exponent=2.0),
    "integer_pow": jax_ops.whole_power,
    "pow": jax_ops.any_power,
    "round": jax_ops.rounded,
    "clamp": jax_ops.clamped,
    "select_n": jax_ops.selected,
    "gt": partial(jax_ops.compared, "greater"),
    "ge": partial(jax_ops.compared, "greater_equal"),
    "lt": partial(jax_ops.compared, "less"),
    "le": partial(jax_ops.compared, "less_equal"),
    "eq": partial(jax_ops.compared, "equal"),
    "ne": lambda b, x, y: choices.unequal(b, jax_ops.compact(x), jax_ops.compact(y)),
    "and": choices.both,
    "or": choices.either,
    "xor": choices.unequal,
    "not": choices.opposite,
    "sign": choices.sign,
    "convert_element_type": jax_ops.cast,
    "reduce_precision": jax_ops.same,
    "copy": jax_ops.same,
    "copy_p": jax_ops.same,
    "stop_gradient": jax_ops.same,
    "optimization_barrier": jax_ops.barrier,
    "reshape": jax_views.reshape,
    "transpose": jax_views.transpose,
    "squeeze": jax_views.squeeze,
    "expand_dims": jax_views.expand_dims,
    "broadcast_in_dim": jax_views.broadcast_in_dim,
    "rev": jax_views.reverse,
    "concatenate": jax_views.concatenate,
    "pad": jax_views.pad,
    "slice": jax_views.sliced,
    "dynamic_slice": jax_views.sliced_at,
    "split": jax_views.split,
    "gather": jax_views.gather,
}
FOUND = frozenset(
    (
        *("batchnorm", "namedbatchnorm", "layernorm", "groupnorm", "softmax", "log_softmax"),
        *("window_mean", "add_bias"),
    )
)
"""What is no primitive but a pattern of them."""


def lower(target: str) -> Lower | None:
    """What a primitive becomes."""
    kind = target.removeprefix(PREFIX)
    known = target.startswith(PREFIX) and kind in LOWER
    return partial(lowered, kind, LOWER[kind]) if known else None


def lowered(kind: str, function: Callable[..., Any], b: Builder, *args: Any, **params: Any) -> Any:
    """One call lowered.

    Raises:
      UnsupportedModelError: if it cannot be, or has a parameter that nobody here handles.
    """
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {}
    for name, value in params.items():
        if name in parameters or (takes_all and name != "primitive" and name not in HARMLESS):
            given[name] = value
        elif name != "primitive" and name not in HARMLESS and value is not None:
            raise UnsupportedModelError(
                f"parameter {show(name)} = {show(value, 60)} is not supported; write that part "
                "without it."
            )
    return function(b, *args, **given)


def fold(target: str) -> Fold | None:
    """What a primitive computes on constants: all of them can."""
    kind = target.removeprefix(PREFIX)
    if not target.startswith(PREFIX) or kind in FOUND:
        return None
    return FOLD.get(kind, bound)


def repeated(x: np.ndarray, shape: Any, broadcast_dimensions: Any, **_: Any) -> np.ndarray:
    """broadcast_in_dim: a view, in which repeated values are stored once."""
    placed = [1] * len(shape)
    for size, axis in zip(np.shape(x), broadcast_dimensions, strict=True):
        placed[axis] = size
    return np.broadcast_to(np.asarray(x).reshape(placed), affordable_shape(shape))


def bound(*args: Any, primitive: Any, **params: Any) -> Any:
    """A primitive computed by JAX.

    Raises:
      UnsupportedModelError: if it would make a constant beyond reason.
    """
    shapes = jax.eval_shape(lambda *given: primitive.bind(*given, **params), *args)
    affordable(max(math.prod(s.shape) for s in jax.tree.leaves(shapes)))
    found = primitive.bind(*map(jax.numpy.asarray, args), **params)
    if not primitive.multiple_results:
        return np.asarray(found)
    return tuple(np.asarray(f) for f in found)


FOLD: dict[str, Fold] = {
    "broadcast_in_dim": repeated,
    "reshape": lambda x, new_sizes, dimensions=None, **_: np.reshape(
        x if dimensions is None else np.transpose(x, dimensions), new_sizes
    ),
    "transpose": lambda x, permutation, **_: np.transpose(x, permutation),
    "squeeze": lambda x, dimensions, **_: np.squeeze(x, tuple(dimensions)),
    "copy": lambda x, **_: x,
    "stop_gradient": lambda x, **_: x,
}
"""Views, without moving a byte; everything else is computed by JAX."""
ACCEPTED = (
    "Primitives that are understood where they read images: "
    + ", ".join(sorted(set(LOWER) - FOUND))
    + "; any primitive on parameters alone."
)
JAX = OperatorTable(lower, fold, ACCEPTED)
