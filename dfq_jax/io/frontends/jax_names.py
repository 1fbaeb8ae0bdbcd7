"""What tensors of a function of JAX are called, and which line of whose code makes them."""

import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.readers.pickle_policy import show

ENDINGS = {
    "kernel": "weight",
    "w": "weight",
    "b": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
"""Names of parameters in Flax and Haiku, and what they are called here."""
COLLECTIONS = ("params", "batch_stats")


def as_array(value: Any, name: str) -> np.ndarray:
    """A weight in the host's memory.

    Raises:
      UnsupportedModelError: for a key of random numbers.
    """
    if jnp.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.prng_key):
        raise UnsupportedModelError(
            f"the network reads the random key {show(name)!r}, as dropout does in training; "
            "load it in evaluation mode (train=False, deterministic=True, nnx: model.eval())."
        )
    return np.asarray(value)


def line_of(equation: Any) -> str:
    """The line of the user's code that an equation comes from; empty if unknown."""
    traceback = getattr(equation.source_info, "traceback", None)
    library = Path(sysconfig.get_path("stdlib"))
    here = Path(__file__).parents[1]
    for frame in getattr(traceback, "frames", ()):
        path = Path(frame.file_name)
        if path.is_relative_to(here):
            break  # beyond is who called us
        installed = "site-packages" in path.parts or path.is_relative_to(library)
        if path.suffix in (".py", "") and not installed:
            return f"{show(path.name)}:{frame.line_num}, in {show(frame.function_name)}"
    return ""


def dotted(path: Iterable[Any]) -> str:
    """A path in a pytree as PyTorch would write it: `layer1.0.conv.weight`."""
    parts = []
    for key in path:
        name = next((getattr(key, k) for k in ("key", "idx", "name") if hasattr(key, k)), key)
        parts += [p for p in str(name).replace("~", "").split("/") if p]
    if parts and parts[-1] == "value":  # of a variable of nnx
        parts.pop()
    return renamed(parts)


def renamed(parts: Sequence[str]) -> str:
    """Parts of a path without the collection, with the last one as PyTorch calls it."""
    if len(parts) > 1 and parts[0] in COLLECTIONS:
        parts = parts[1:]
    return ".".join((*parts[:-1], ENDINGS.get(parts[-1], parts[-1]))) if parts else ""
