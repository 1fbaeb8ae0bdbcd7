"""Parameters in the layouts their ONNX operators read."""

from collections.abc import Mapping
from typing import Literal, assert_never

import numpy as np

from dfq_jax.graph.graph import Node
from dfq_jax.graph.ops import (
    BatchNorm,
    Conv2d,
    ConvTranspose2d,
    GroupNorm,
    Linear,
    PRelu,
    Recurrent,
    Weighted,
)
from dfq_jax.graph.token_ops import Rotary
from dfq_jax.graph.volume_ops import Conv3d
from dfq_jax.io.onnx.layout import FIRST, VOLUMES, Layout
from dfq_jax.io.onnx.recurrent import filed_recurrent

Form = Literal["convolution", "transposed", "rows", "columns"]
"""OIHW; IOHW; (out, in); (in, out)."""


def kernel_form(op: Weighted, rank: int, layout: Layout, integer: bool) -> Form:
    """How a kernel lies in the file.

    ONNX Runtime would multiply a float input with integer weights given to a MatMul in 8 bits,
    approximately, and cannot add an int32 bias to one: integer kernels are for Gemm.
    """
    match op:
        case Conv2d() | Conv3d():
            return "convolution"
        case ConvTranspose2d():
            return "transposed"
        case Linear():
            if rank == 4 and layout == FIRST:
                return "convolution"
            return "rows" if rank == 2 or integer else "columns"
        case _:
            assert_never(op)


def output_axis(form: Form) -> int:
    """The axis of output channels; of one group's where there are several."""
    return 1 if form in ("transposed", "columns") else 0


def kernel_layout(op: Weighted, kernel: np.ndarray, form: Form, layout: Layout) -> np.ndarray:
    """A kernel in the layout its ONNX operator reads.

    Args:
      op: the layer.
      kernel: HWIO, or (in, out).
      form: see `kernel_form`.
      layout: of the layer's input; where that is an image flattened channels first, the rows of
        the kernel follow.

    Returns:
      The same numbers, rearranged.
    """
    if isinstance(op, ConvTranspose2d):
        kh, kw, cin, cout = kernel.shape
        split = kernel.reshape(kh, kw, cin, op.groups, cout // op.groups)
        return split.transpose(3, 2, 4, 0, 1).reshape(-1, cout // op.groups, kh, kw)
    if isinstance(layout, tuple):
        kernel = kernel.reshape(*layout, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
    if kernel.ndim > 2:
        space = range(kernel.ndim - 2)
        return kernel.transpose(kernel.ndim - 1, kernel.ndim - 2, *space)
    if form == "convolution":
        return kernel.T[:, :, None, None]
    return kernel.T if form == "rows" else kernel


def filed_slots(
    node: Node, slots: Mapping[str, np.ndarray], rank: int, layout: Layout
) -> dict[str, np.ndarray]:
    """The float parameters of a node, kernels excepted, as its ONNX operators read them.

    Args:
      node: whose parameters.
      slots: as stored.
      rank: of the node's first argument.
      layout: of the node's arguments of rank 4 and above.

    Returns:
      {slot: array}. A batch norm that ONNX's cannot compute gets `gain` and `shift` instead.
    """
    per_channel = lambda v: v.reshape(-1, 1, 1) if layout == FIRST else v
    match node.op:
        case BatchNorm(eps):
            scale = slots.get("scale", np.ones_like(slots["mean"]))
            bias = slots.get("bias", np.zeros_like(slots["mean"]))
            if rank in (2, VOLUMES) or layout == FIRST:
                return {**slots, "scale": scale, "bias": bias}
            gain = scale / np.sqrt(slots["var"] + np.float32(eps))
            return {"gain": gain, "shift": bias - slots["mean"] * gain}
        case Recurrent():
            return filed_recurrent(slots)
        case Rotary():
            return {k: np.concatenate([v, v], axis=-1)[:, None] for k, v in slots.items()}
        case GroupNorm() | PRelu():
            return {slot: per_channel(v) for slot, v in slots.items()}
        case _:
            return dict(slots)
