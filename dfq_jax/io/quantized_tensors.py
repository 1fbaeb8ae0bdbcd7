"""A quantized network's numbers as .safetensors: integer codes, scales, zero points.

Keys are `{node}.{slot}`, with `{node}.{slot}_scale` and `{node}.{slot}_zero_point` for every site
of the plan. Kernels are HWIO or (in, out) codes; a bias is int32 where its layer is integer.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array

from dfq_jax.errors import DataError
from dfq_jax.graph.graph import Graph
from dfq_jax.numerics.affine import (
    Affine,
    Grid,
    bias_scale,
    dequantize,
    quantize,
    quantize_bias,
)
from dfq_jax.quantize.plan import Plan, Site
from dfq_jax.quantize.simulate import QuantizedModel

Tables = tuple[dict[str, dict[str, Array]], dict[Site, Affine]]
to_codes = jax.jit(quantize, static_argnames="grid")
"""`numerics.affine.quantize`, compiled once for each shape."""
to_bias_codes = jax.jit(quantize_bias)
"""`numerics.affine.quantize_bias`, compiled once for each shape."""
from_codes = jax.jit(dequantize)
"""`numerics.affine.dequantize`, compiled once for each shape."""

NEIGHBOURS = 2
"""How many float32 neighbours away from `code * scale` the value of a code may lie."""


def codes(quantized: QuantizedModel) -> dict[Site, np.ndarray]:
    """{site: integers} of every quantized kernel, and of every bias that is int32.

    Biases appear under `Site(layer, "bias")`.
    """
    table, qparams, params = quantized.plan.table, quantized.qparams, quantized.model.params
    found = {}
    for site, spec in table.items():
        if site.argument is None:
            kernel = params[site.node][site.slot]
            found[site] = np.asarray(to_codes(kernel, qparams[site], grid=spec.grid))
            data = Site(site.node, "input0")
            if data in table and "bias" in params[site.node]:
                scales = qparams[data].scale, qparams[site].scale
                bias = to_bias_codes(params[site.node]["bias"], *scales)
                found[Site(site.node, "bias")] = np.asarray(bias)
    return found


def pack(quantized: QuantizedModel) -> bytes:
    """The network's numbers as the bytes of a .safetensors file."""
    integers = codes(quantized)
    tensors = {
        f"{node}.{slot}": integers.get(Site(node, slot), np.asarray(value))
        for node, slots in quantized.model.params.items()
        for slot, value in slots.items()
    }
    for site in quantized.plan.table:
        affine = quantized.qparams[site]
        tensors[f"{site.node}.{site.slot}_scale"] = np.asarray(affine.scale)
        tensors[f"{site.node}.{site.slot}_zero_point"] = np.asarray(affine.zero_point)
    return safetensors.numpy.save({k: np.array(v, order="C") for k, v in tensors.items()})


def unpack(data: bytes, graph: Graph, plan: Plan, path: Path) -> Tables:
    """Parameters and scales that `pack` wrote; kernels and biases are dequantized.

    Args:
      data: content of the file.
      graph: of the network.
      plan: what is quantized.
      path: for messages.

    Returns:
      ({node: {slot: array}}, {site: scale and zero point}). Rounding the parameters to their grids
      gives the stored codes again, bit by bit.

    Raises:
      DataError: if a tensor is missing, of a wrong type or not finite.
    """
    try:
        tensors = safetensors.numpy.load(data)
    except Exception as error:  # NumPy knows fewer types than the format
        raise DataError(f"{path} is damaged: {error}") from error
    kernels = {site: tensors.get(f"{site.node}.{site.slot}") for site in plan.table}
    qparams = {site: read_affine(tensors, site, plan, path) for site in plan.table}
    params: dict[str, dict[str, Array]] = {}
    nodes = {n.name for n in graph.nodes}
    for key, value in tensors.items():
        node, _, slot = key.rpartition(".")
        if node not in nodes:
            raise DataError(f"{path} holds {key!r}, but the network has no node {node!r}.")
        params.setdefault(node, {})[slot] = jnp.asarray(checked(value, key, path))
    for site, affine in qparams.items():
        check_scales(site, affine, kernels[site], plan.table[site].grid, path)
    for site, spec in plan.table.items():
        if site.argument is None:
            slots = params.get(site.node, {})
            dequantize_slots(slots, site, qparams, spec.grid.dtype, path)
    return params, qparams


def checked(value: np.ndarray, key: str, path: Path) -> np.ndarray:
    """A parameter, which is codes or finite numbers.

    Raises:
      DataError: for anything else.
    """
    floats = value.dtype == np.float32 and np.isfinite(value).all()
    if floats or value.dtype in (np.int8, np.uint8, np.int32):
        return value
    what = "NaN or infinities" if value.dtype == np.float32 else str(value.dtype)
    raise DataError(f"{path}: {key!r} holds {what}; expected finite float32, or codes.")


def check_scales(
    site: Site, affine: Affine, kernel: np.ndarray | None, grid: Grid, path: Path
) -> None:
    """Refuses scales of another shape than the grid says.

    Raises:
      DataError: naming the site.
    """
    if site.argument is not None or grid.axis is None or kernel is None or not kernel.ndim:
        fits = affine.scale.size == 1
    else:
        fits = affine.scale.shape == (1,) * (kernel.ndim - 1) + kernel.shape[grid.axis :]
    if not fits or affine.zero_point.shape != affine.scale.shape:
        raise DataError(
            f"{path}: {site.node}.{site.slot} has scales of shape {affine.scale.shape} and zero "
            f"points of shape {affine.zero_point.shape}, which do not fit it."
        )


def read_affine(tensors: dict[str, Any], site: Site, plan: Plan, path: Path) -> Affine:
    """Takes scale and zero point of a site out of `tensors`."""
    stem = f"{site.node}.{site.slot}"
    found = [tensors.pop(f"{stem}_{part}", None) for part in ("scale", "zero_point")]
    scale, zero_point = found
    wanted = plan.table[site].grid.dtype
    if scale is None or zero_point is None:
        raise DataError(f"{path} is incomplete: no scale or zero point for {stem}.")
    positive = scale.dtype == np.float32 and np.isfinite(scale).all() and (scale > 0).all()
    if not positive or zero_point.dtype != wanted:
        raise DataError(
            f"{path}: {stem} needs finite, positive float32 scales and {wanted} zero points."
        )
    return Affine(jnp.asarray(scale), jnp.asarray(zero_point))


def dequantize_slots(
    slots: dict[str, Array], site: Site, qparams: dict[Site, Affine], dtype: np.dtype, path: Path
) -> None:
    """Replaces a kernel's codes, and its bias's where it is int32, by their values, in place."""
    kernel = slots.get(site.slot)
    if kernel is None or kernel.dtype != dtype:
        raise DataError(f"{path} is incomplete: no {dtype} codes for {site.node}.{site.slot}.")
    if "bias" in slots and slots["bias"].shape != kernel.shape[-1:]:
        raise DataError(
            f"{path}: the bias of {site.node} has shape {slots['bias'].shape}, its kernel "
            f"{kernel.shape}."
        )
    slots[site.slot] = from_codes(kernel, qparams[site])
    data = Site(site.node, "input0")
    if "bias" in slots and data in qparams:
        if slots["bias"].dtype != np.int32:
            raise DataError(f"{path}: the bias of {site.node} is not int32.")
        slots["bias"] = value_of_bias(slots["bias"], qparams[data], qparams[site])


@jax.jit
def value_of_bias(bias: Array, data: Affine, kernel: Affine) -> Array:
    """The float32 bias that rounds to these codes.

    The product of code and scale is that number, or one of its neighbours where codes exceed
    float32's 24 bits of precision.
    """
    scales = data.scale, kernel.scale
    found = product = bias.astype(jnp.float32) * bias_scale(*scales)
    for end in (jnp.inf, -jnp.inf):
        near = product
        for _ in range(NEIGHBOURS):
            near = jnp.nextafter(near, jnp.float32(end))
            found = jnp.where(quantize_bias(found, *scales) == bias, found, near)
    return found
