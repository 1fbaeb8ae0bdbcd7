"""A quantized network's numbers as .safetensors: integer codes, scales, zero points.

Keys are `{node}.{slot}`, with `{node}.{slot}_scale` and `{node}.{slot}_zero_point` (or what else
its levels have) for every site of the plan. Kernels are HWIO or (in, out) codes; a bias is int32
where its layer is integer.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array

from dfq_jax.errors import DataError
from dfq_jax.graph.graph import Graph, Node
from dfq_jax.numerics.affine import Affine, Grid, NumpyOrJax, bias_scale, quantize_bias
from dfq_jax.numerics.basis import Basis, LearnedLevels
from dfq_jax.numerics.levels import Levels, Parameters, codes_of, scales_of, values_of
from dfq_jax.numerics.signs import Alpha, Signs
from dfq_jax.quantization.plan import Plan, Site
from dfq_jax.quantization.simulate import QuantizedModel

Tables = tuple[dict[str, dict[str, Array]], dict[Site, Parameters]]
PARAMETERS: dict[type[Levels], type[Parameters]] = {
    Grid: Affine,
    Signs: Alpha,
    LearnedLevels: Basis,
}


def to_codes(x: NumpyOrJax, parameters: Parameters, *, levels: Levels) -> np.ndarray:
    """`numerics.levels.codes_of`, in NumPy for grids: kernels have many shapes."""
    run = codes_of if isinstance(levels, Grid) else codes_at_once
    return np.asarray(run(np.asarray(x), levels, jax.device_get(parameters)))


def from_codes(codes: NumpyOrJax, parameters: Parameters, *, levels: Levels) -> np.ndarray:
    """`numerics.levels.values_of`, in NumPy for grids."""
    run = values_of if isinstance(levels, Grid) else values_at_once
    return np.asarray(run(np.asarray(codes), levels, jax.device_get(parameters)))


def to_bias_codes(bias: NumpyOrJax, data: NumpyOrJax, kernel: NumpyOrJax) -> np.ndarray:
    """`numerics.affine.quantize_bias` in NumPy."""
    return quantize_bias(np.asarray(bias), np.asarray(data), np.asarray(kernel))


codes_at_once = jax.jit(codes_of, static_argnames="levels")
values_at_once = jax.jit(values_of, static_argnames="levels")
NEIGHBOURS = 2
"""How many float32 neighbours away from `code * scale` the value of a code may lie."""


def stored_codes(quantized: QuantizedModel) -> dict[str, dict[str, np.ndarray]]:
    """{layer: integers of its kernel, and of its bias if that is int32} where one is quantized."""
    plan, qparams, params = quantized.plan, quantized.qparams, quantized.model.params
    found: dict[str, dict[str, np.ndarray]] = {}
    for site, node in kernels_of(quantized.model.graph, plan):
        levels, slots = plan.table[site].levels, params[site.node]
        kernel = to_codes(slots["kernel"], qparams[site], levels=levels)
        found[site.node] = {"kernel": np.asarray(kernel)}
        if plan.multiplies(node) and "bias" in slots:
            scales = scales_of(qparams[Site(site.node, 0)]), scales_of(qparams[site])
            found[site.node]["bias"] = np.asarray(to_bias_codes(slots["bias"], *scales))
    return found


def kernels_of(graph: Graph, plan: Plan) -> list[tuple[Site, Node]]:
    """The quantized kernels of a network with their layers, in execution order."""
    sites = [(Site(node.name), node) for node in graph.nodes]
    table = plan.table
    return [(site, node) for site, node in sites if site in table]


def pack_network(quantized: QuantizedModel) -> bytes:
    """The network's numbers as the bytes of a .safetensors file."""
    integers = stored_codes(quantized)
    tensors = {
        f"{node}.{slot}": np.asarray(value)
        for node, slots in quantized.model.params.items()
        for slot, value in {**slots, **integers.get(node, {})}.items()
    }
    for site in quantized.plan.table:
        for part, value in quantized.qparams[site]._asdict().items():
            tensors[f"{site.path}_{part}"] = np.asarray(value)
    return safetensors.numpy.save({k: np.array(v, order="C") for k, v in tensors.items()})


def unpack_network(data: bytes, graph: Graph, plan: Plan, path: Path) -> Tables:
    """Parameters and scales that `pack_network` wrote; kernels and biases are dequantized.

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
    table = plan.table
    kernels = {site: tensors.get(site.path) for site in table}
    qparams = {site: read_parameters(tensors, site, table[site].levels, path) for site in table}
    params: dict[str, dict[str, Array]] = {}
    nodes = {n.name for n in graph.nodes}
    for key, value in tensors.items():
        node, _, slot = key.rpartition(".")
        if node not in nodes:
            raise DataError(f"{path} holds {key!r}, but the network has no node {node!r}.")
        params.setdefault(node, {})[slot] = jax.device_put(checked(value, key, path))
    for site, parameters in qparams.items():
        check_scales(site, parameters, kernels[site], table[site].levels, path)
    for site, node in kernels_of(graph, plan):
        slots = params.get(site.node, {})
        read = qparams[Site(site.node, 0)] if plan.multiplies(node) else None
        dequantize_slots(slots, site, table[site].levels, qparams[site], read, path)
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
    site: Site, parameters: Parameters, kernel: np.ndarray | None, levels: Levels, path: Path
) -> None:
    """Refuses scales of another shape than the levels say.

    Raises:
      DataError: naming the site.
    """
    shapes = [part.shape for part in parameters]
    if site.argument is not None or levels.axis is None or kernel is None or kernel.ndim < 2:
        fits = all(part.size == 1 for part in parameters)
    else:
        group = levels.group if isinstance(levels, Grid) else None
        rows = 1 if group is None else -(-kernel.shape[-2] // group)
        fits = set(shapes) == {(1,) * (kernel.ndim - 2) + (rows, kernel.shape[-1])}
    if not fits or len(set(shapes)) > 1:
        points = f" and zero points of shape {shapes[1]}" if len(shapes) > 1 else ""
        raise DataError(
            f"{path}: {site.path} has scales of shape {shapes[0]}{points}, which do not fit it."
        )


def read_parameters(tensors: dict[str, Any], site: Site, levels: Levels, path: Path) -> Parameters:
    """Takes scale and zero point of a site, or what else its levels have, out of `tensors`."""
    stem, kind = site.path, PARAMETERS[type(levels)]
    found = {part: tensors.pop(f"{stem}_{part}", None) for part in kind._fields}
    if missing := [part.replace("_", " ") for part, value in found.items() if value is None]:
        raise DataError(f"{path} is incomplete: no {' or '.join(missing)} for {stem}.")
    scales = next(iter(found.values()))
    sound = scales.dtype == np.float32 and np.isfinite(scales).all()
    positive = sound and (isinstance(levels, LearnedLevels) or (scales > 0).all())
    if not positive or ("zero_point" in found and found["zero_point"].dtype != levels.dtype):
        points = f" and {levels.dtype} zero points" if "zero_point" in found else ""
        raise DataError(f"{path}: {stem} needs finite, positive float32 scales{points}.")
    return kind(**{part: jax.device_put(value) for part, value in found.items()})


def dequantize_slots(
    slots: dict[str, Array],
    site: Site,
    levels: Levels,
    parameters: Parameters,
    data: Parameters | None,
    path: Path,
) -> None:
    """Replaces a kernel's codes, and its bias's where it is int32, by their values, in place.

    Args:
      slots: of the layer.
      site: of the kernel.
      levels: of it.
      parameters: of its levels.
      data: those of the layer's input where the bias is int32, else None.
      path: for messages.

    Raises:
      DataError: if codes are missing or of a wrong type or shape.
    """
    kernel = slots.get("kernel")
    if kernel is None or kernel.dtype != levels.dtype:
        raise DataError(f"{path} is incomplete: no {levels.dtype} codes for {site.path}.")
    if "bias" in slots and slots["bias"].shape != kernel.shape[-1:]:
        raise DataError(
            f"{path}: the bias of {site.node} has shape {slots['bias'].shape}, its kernel "
            f"{kernel.shape}."
        )
    slots["kernel"] = jax.device_put(from_codes(kernel, parameters, levels=levels))
    if "bias" in slots and data is not None:
        if slots["bias"].dtype != np.int32:
            raise DataError(f"{path}: the bias of {site.node} is not int32.")
        slots["bias"] = value_of_bias(slots["bias"], data, parameters)


@jax.jit
def value_of_bias(bias: Array, data: Parameters, kernel: Parameters) -> Array:
    """The float32 bias that rounds to these codes.

    The product of code and scale is that number, or one of its neighbours where codes exceed
    float32's 24 bits of precision.
    """
    scales = scales_of(data), scales_of(kernel)
    found = product = bias.astype(jnp.float32) * bias_scale(*scales)
    for end in (jnp.inf, -jnp.inf):
        near = product
        for _ in range(NEIGHBOURS):
            near = jnp.nextafter(near, jnp.float32(end))
            found = jnp.where(quantize_bias(found, *scales) == bias, found, near)
    return found
