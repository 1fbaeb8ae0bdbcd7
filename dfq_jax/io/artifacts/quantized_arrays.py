"""Quantized arrays by name in one .safetensors file: codes, parameters, and what levels they have.

`NAME` holds codes, `NAME:PART` the parameters of its levels; the levels themselves are JSON in the
header of the file, so that it can be read without the network that it came from.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy

from dfq_jax.base.files import write_atomically
from dfq_jax.errors import DataError
from dfq_jax.io.artifacts.graph_json import BROKEN, levels_from_json, levels_to_json
from dfq_jax.io.artifacts.quantized_tensors import PARAMETERS
from dfq_jax.numerics.levels import QuantizedArray


def save_arrays(path: str | Path, arrays: Mapping[str, QuantizedArray]) -> None:
    """Writes arrays, whole or not at all.

    Args:
      path: of the file; one that is there is replaced.
      arrays: by name; names without a colon.

    Raises:
      DataError: for a name with a colon.
      ResourceError: if the disk is full.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if ":" in name:
            raise DataError(f"array {name!r} cannot be saved: its name has a colon; rename it.")
        tensors[name] = np.array(array.codes, order="C")
        for part, value in array.parameters._asdict().items():
            tensors[f"{name}:{part}"] = np.array(value, order="C")
    levels = {name: json.dumps(levels_to_json(array.levels)) for name, array in arrays.items()}
    data = safetensors.numpy.save(tensors, levels)
    write_atomically(path, data)


def load_arrays(path: str | Path) -> dict[str, QuantizedArray]:
    """The arrays that `save_arrays` wrote.

    Raises:
      DataError: if the file is missing, damaged, or another.
    """
    try:
        with safetensors.safe_open(Path(path), framework="numpy") as file:
            told = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {name: read(name, json.loads(text), tensors) for name, text in told.items()}
    except (*BROKEN, OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} holds no quantized arrays: {error}") from error


def read(name: str, levels: Mapping, tensors: Mapping[str, np.ndarray]) -> QuantizedArray:
    """One array out of the tensors of a file.

    Raises:
      ValueError: if its codes are of another type than its levels have.
    """
    known, codes = levels_from_json(levels), tensors[name]
    if codes.dtype != known.dtype:
        raise ValueError(f"codes of {name!r} are {codes.dtype}, not {known.dtype}")
    kind = PARAMETERS[type(known)]
    parts = {part: jax.device_put(tensors[f"{name}:{part}"]) for part in kind._fields}
    return QuantizedArray(jax.device_put(codes), kind(**parts), known)
