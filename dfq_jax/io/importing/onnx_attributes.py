"""Attributes of ONNX's operators: each is handled, known to be harmless, or refused by name.

A lowering function handles those it has parameters for. Nothing else is let through in silence.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.readers.pickle_policy import show

HARMLESS: Mapping[str, tuple[str, ...]] = {
    "BatchNormalization": ("momentum",),  # of training
    "Cast": ("saturate", "round_mode"),  # of 8-bit floats, to which nothing is cast here
    "Conv": ("kernel_shape",),  # the kernel has it
    "ConvTranspose": ("kernel_shape",),
    "Dropout": ("seed",),  # of training
    "GroupNormalization": ("stash_type",),  # everything is float32
    "LayerNormalization": ("stash_type",),
    "MaxPool": ("storage_order",),  # of the indices, which nobody may read
    "GRU": ("hidden_size",),  # weights have it
    "LSTM": ("hidden_size",),
    "RNN": ("hidden_size",),
}
"""{operator: attributes that change nothing that is read}."""

PLAIN_CELLS = {
    name: "export cells with their usual activations, and without clipping"
    for name in ("activation_alpha", "activation_beta", "clip")
}
REFUSED: Mapping[str, Mapping[str, str]] = {
    "GRU": PLAIN_CELLS,
    "LSTM": {**PLAIN_CELLS, "input_forget": "export a cell whose gates are apart"},
    "RNN": PLAIN_CELLS,
    "Resize": {
        "extrapolation_value": "it belongs to tf_crop_and_resize; crop with Slice before resizing",
    },
}
"""{operator: {attribute: remedy}}, unless it has the value that ONNX takes where it is left out."""

OTHERS = "write that part without it, or export again with another opset"
NOT_ATTRIBUTES = ("opset_version", "outputs")
"""What the reader adds."""


def handled(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the parameters of a lowering function."""
    return frozenset(inspect.signature(function).parameters)


def told_attributes(
    kind: str, function: Callable[..., Any], attributes: Mapping[str, Any]
) -> dict[str, Any]:
    """The attributes of one node that its lowering function is to be told.

    Args:
      kind: the operator.
      function: what lowers it.
      attributes: all of them, `opset_version` among them.

    Raises:
      UnsupportedModelError: naming one that is neither handled nor harmless.
    """
    known, harmless = handled(function), HARMLESS.get(kind, ())
    for name, value in attributes.items():
        if name in known or name in harmless or name in NOT_ATTRIBUTES:
            continue
        if not is_default(kind, name, value, attributes.get("opset_version", 0)):
            remedy = REFUSED.get(kind, {}).get(name, OTHERS)
            raise UnsupportedModelError(
                f"attribute {show(name)} = {show(value, 60)} is not supported; {remedy}."
            )
    return {name: value for name, value in attributes.items() if name in known}


def is_default(kind: str, name: str, value: Any, opset: int) -> bool:
    """Whether an attribute says what ONNX takes where it is left out."""
    try:
        schema = onnx.defs.get_schema(kind, opset, "")
    except onnx.defs.SchemaError:
        return False
    if name not in schema.attributes:
        return False
    default = schema.attributes[name].default_value
    if not default.name:
        return False
    stated = onnx.helper.get_attribute_value(default)
    stated = stated.decode() if isinstance(stated, bytes) else stated
    return bool(np.array_equal(np.asarray(stated), np.asarray(value)))
