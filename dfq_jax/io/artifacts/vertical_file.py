"""A network of many widths as a file beside the one of all bits: planes of its codes.

Keys are `{layer}.plane{k}` (the sign first, eight codes a byte), `{layer}.shape`, and for each
width `{layer}.step{bits}` and `{layer}.bias{bits}`. The first planes suffice to read a width.
"""

from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from dfq_jax.errors import DataError, UsageError
from dfq_jax.io.artifacts.artifact import Artifact
from dfq_jax.numerics.bit_planes import TOP, cut_from_planes, planes_from
from dfq_jax.quantization.vertical import VerticalNetwork, WidthParameters, cut_codes

VERTICAL = "vertical.safetensors"


def pack_vertical(network: VerticalNetwork) -> bytes:
    """All widths of a network as the bytes of a .safetensors file."""
    tensors: dict[str, np.ndarray] = {}
    layers = next(iter(network.widths.values())).steps
    for layer in layers:
        codes = network.top.codes(layer)
        tensors[f"{layer}.shape"] = np.array(codes.shape, np.int64)
        tensors |= {f"{layer}.plane{k}": plane for k, plane in enumerate(planes_from(codes))}
    for bits, own in network.widths.items():
        tensors |= {f"{layer}.step{bits}": np.asarray(v) for layer, v in own.steps.items()}
        tensors |= {f"{layer}.bias{bits}": np.asarray(v) for layer, v in own.biases.items()}
    return safetensors.numpy.save({k: np.array(v, order="C") for k, v in tensors.items()})


def unpack_vertical(artifact: Artifact) -> VerticalNetwork:
    """The network of all widths of an output folder.

    Raises:
      UsageError: if it holds one width only.
      DataError: if planes are not those of its kernels.
    """
    path = artifact.folder / VERTICAL
    if VERTICAL not in artifact.manifest["files"]:
        raise UsageError(
            f'{artifact.folder} holds one width only: train with `method="vertical_layered"` for '
            "a network of which any can be read."
        )
    tensors = safetensors.numpy.load(path.read_bytes())
    layers = [key.removesuffix(".shape") for key in tensors if key.endswith(".shape")]
    for layer in layers:
        check_planes(artifact, layer, tensors, path)
    widths = {bits: width_of(tensors, layers, bits) for bits in widths_in(tensors, layers)}
    return VerticalNetwork(artifact.quantized, widths)


def widths_in(names: Iterable[str], layers: Iterable[str]) -> list[int]:
    """The widths that tensors of these names belong to, the widest first."""
    starts = tuple(f"{layer}.step" for layer in layers)
    ends = {name.removeprefix(start) for name in names for start in starts}
    return sorted((int(end) for end in ends if end.isdecimal()), reverse=True)


def width_of(tensors: dict[str, np.ndarray], layers: list[str], bits: int) -> WidthParameters:
    """What is a width's own."""
    own = lambda name: {
        layer: jax.device_put(tensors[f"{layer}.{name}{bits}"])
        for layer in layers
        if f"{layer}.{name}{bits}" in tensors
    }
    return WidthParameters(own("step"), own("bias"))


def check_planes(
    artifact: Artifact, layer: str, tensors: dict[str, np.ndarray], path: Path
) -> None:
    """Refuses planes that do not make the codes of a kernel.

    Raises:
      DataError: naming the layer.
    """
    planes = tuple(tensors.get(f"{layer}.plane{k}", np.zeros(0, np.uint8)) for k in range(TOP))
    shape = tuple(int(n) for n in tensors[f"{layer}.shape"])
    whole = cut_codes(artifact.quantized, layer, TOP)
    bytes_needed = -(-int(np.prod(shape)) // 8)
    fits = shape == whole.shape and all(len(plane) == bytes_needed for plane in planes)
    if not fits or (cut_from_planes(planes, shape) != whole).any():
        raise DataError(f"{path} is damaged: its planes are not the kernel of {layer}.")
