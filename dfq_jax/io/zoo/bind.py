"""Puts the tensors of a PyTorch `state_dict` where an architecture wants them, or says why not."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np

from dfq_jax.errors import CheckpointError
from dfq_jax.graph.graph import Model
from dfq_jax.io.readers.pickle_policy import show
from dfq_jax.io.zoo.architecture import Architecture, Parameter
from dfq_jax.io.zoo.stored import Stored

Tensors = Mapping[str, np.ndarray]

MAX_ROWS = 20
MAX_NAMES = 5
COUNTER = "num_batches_tracked"
MEAN, VARIANCE = ".running_mean", ".running_var"

NO_STATISTICS = (
    "no batch-norm statistics: synthesis from batch-norm statistics is not available for it"
)


class BoundNetwork(NamedTuple):
    """A network with its weights.

    Attributes:
      model: the network.
      notes: one line for each thing about the weights the user should know.
    """

    model: Model
    notes: tuple[str, ...]


class Misfit(NamedTuple):
    """One row of the table of what does not fit: texts, `-` where there is nothing to say."""

    kind: str
    name: str
    found: str
    expected: str
    nearest: str


def bind(architecture: Architecture, tensors: Tensors) -> BoundNetwork:
    """The architecture with the weights of a checkpoint.

    Args:
      architecture: what the checkpoint is said to hold.
      tensors: {PyTorch name: array in PyTorch's layout}, float16, bfloat16, float32 or float64;
        the counters `num_batches_tracked` are ignored.

    Returns:
      The model, in float32 and in this library's layouts, and notes about its statistics.
      Negative running variances are raised to 0.

    Raises:
      CheckpointError: listing every parameter that is missing, unexpected or of the wrong shape
        or type; or every tensor with NaN or infinite values.
    """
    check_fit(architecture, tensors)
    arrays = {p.torch_name: as_float32(tensors[p.torch_name]) for p in architecture.expected}
    check_finite(arrays)
    notes = statistics_notes(*statistics(arrays))
    params: dict[str, dict] = {}
    for parameter in architecture.expected:
        array = arrays.pop(parameter.torch_name)
        if parameter.slot == "var":
            array = np.maximum(array, 0.0)
        params.setdefault(parameter.node, {})[parameter.slot] = jax.device_put(
            np.array(native_layout(parameter, array))
        )
    return BoundNetwork(Model(architecture.graph, params, (architecture.contract,)), notes)


def is_float(array: np.ndarray) -> bool:
    """Whether the values are float16, bfloat16, float32 or float64, in any byte order."""
    return array.dtype == ml_dtypes.bfloat16 or np.issubdtype(array.dtype, np.floating)


def as_float32(array: np.ndarray) -> np.ndarray:
    """The array in float32; float64 values beyond its range become infinite."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def native_layout(parameter: Parameter, array: np.ndarray) -> np.ndarray:
    """OIHW to HWIO, (out, in) to (in, out), with (c, h, w) features reordered to (h, w, c)."""
    match parameter.layout:
        case "vector":
            return array
        case "conv":
            return array.transpose(2, 3, 1, 0)
        case "linear":
            if parameter.flattened is None:
                return array.T
            out = array.shape[0]
            return array.reshape(out, *parameter.flattened).transpose(2, 3, 1, 0).reshape(-1, out)


def check_fit(architecture: Architecture | Stored, tensors: Tensors) -> None:
    """Raises CheckpointError with one table of everything that does not fit."""
    expected = {p.torch_name: p.torch_shape for p in architecture.expected}
    found = {name: array for name, array in tensors.items() if not name.endswith(COUNTER)}
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shapes = [n for n, shape in expected.items() if n in found and found[n].shape != shape]
    types = [n for n in expected if n in found and n not in shapes and not is_float(found[n])]
    kinds = {"missing": missing, "unexpected": unexpected, "shape": shapes, "type": types}
    if not any(kinds.values()):
        return
    rows = [(kind, name) for kind, names in kinds.items() for name in names]
    others = {"missing": unexpected, "unexpected": missing}
    table = [
        describe(kind, name, expected, found, others.get(kind, ()))
        for kind, name in rows[:MAX_ROWS]
    ]
    counts = ", ".join(f"{len(names)} {KINDS[kind]}" for kind, names in kinds.items() if names)
    raise CheckpointError(
        f"the checkpoint does not fit {architecture.name}: {counts}.\n"
        f"{aligned(table, len(rows) - len(table))}\n"
        f"Check the name of the architecture, or rename the tensors of the checkpoint."
    )


KINDS = {
    "missing": "missing",
    "unexpected": "unexpected",
    "shape": "of another shape",
    "type": "not of floating point",
}
"""How the summary names each kind of misfit."""


def describe(
    kind: str,
    name: str,
    expected: Mapping[str, tuple[int, ...]],
    found: Tensors,
    others: Sequence[str],
) -> Misfit:
    """One row of the table; `others` are the names it may have been confused with."""
    near = difflib.get_close_matches(name, others, n=1)
    have = "-"
    if name in found:
        have = str(found[name].dtype) if kind == "type" else str(found[name].shape)
    want = str(expected[name]) if name in expected else "-"
    if kind == "type":
        want = "floating point"
    return Misfit(kind, show(name), have, want, show(near[0]) if near else "-")


def aligned(table: Sequence[Misfit], left_out: int) -> str:
    """The rows as text in columns, and how many more there are."""
    rows = [("kind", "name", "found", "expected", "nearest name"), *table]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  " + "  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *([f"  … and {left_out} more"] if left_out else [])])


def check_finite(arrays: Tensors) -> None:
    """Raises CheckpointError naming each tensor with NaN or infinite values, and how many."""
    broken = [
        f"{name} ({array.size - finite} of {array.size})"
        for name, array in arrays.items()
        if (finite := int(np.isfinite(array).sum())) < array.size
    ]
    if broken:
        raise CheckpointError(
            f"the checkpoint has NaN or infinite values in {len(broken)} tensors: "
            f"{listed(broken, MAX_ROWS)}. Its training diverged or the file is damaged: "
            f"use another checkpoint."
        )


def statistics(arrays: Tensors) -> tuple[Tensors, Tensors]:
    """Running means and variances by the module that has them."""
    mean, var = (
        {name.removesuffix(end): array for name, array in arrays.items() if name.endswith(end)}
        for end in (MEAN, VARIANCE)
    )
    return mean, var


def statistics_notes(means: Tensors, variances: Tensors) -> tuple[str, ...]:
    """What is odd about the batch-norm statistics, one line for each kind of oddity.

    Args:
      means: {batch norm: its running mean}.
      variances: {batch norm: its running variance}.
    """
    if not means:
        return (NO_STATISTICS,)
    untouched = [n for n in means if np.all(means[n] == 0) and np.all(variances[n] == 1)]
    negative = {n: int((variances[n] < 0).sum()) for n in means}
    zero = {n: int((variances[n] == 0).sum()) for n in means}
    notes = []
    if any(negative.values()):
        notes.append(f"negative running variance raised to 0: {channels_of(negative)}")
    if any(zero.values()):
        notes.append(f"running variance is 0: {channels_of(zero)}")
    if untouched:
        notes.append(
            f"batch norm never updated (mean 0, variance 1), its statistics say nothing: "
            f"{listed(untouched)}"
        )
    if len(untouched) == len(means):
        notes.append(NO_STATISTICS)
    return tuple(notes)


def channels_of(counts: Mapping[str, int]) -> str:
    """The layers that have any such channel, each with their number."""
    return listed(
        [f"{name} ({n} channel{'s' if n > 1 else ''})" for name, n in counts.items() if n]
    )


def listed(items: Iterable[str], most: int = MAX_NAMES) -> str:
    """The items separated by commas, cut after `most`."""
    items = list(items)
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"
