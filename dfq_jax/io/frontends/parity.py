"""An imported network beside the ONNX file it came from: both run once, on noise.

No import is believed unchecked: an attribute read wrongly changes what is computed, and nothing
else would show it. How large a difference may be is taken from the file itself: as much as its
outputs change when its input changes by what rounding could.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx
from jaxtyping import Float, Num, Shaped

from dfq_jax.errors import ImportParityError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.io.readers.pickle_policy import show
from dfq_jax.io.runtime.session import as_fed, feed, open_session, read_onnx
from dfq_jax.types import NHWC, InputContract

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""One image is run once: compiling is what takes the time."""
ROUNDING = 1e-6
"""Relative change of the input that shows how the network answers to rounding in float32."""
HALF_ROUNDING = 2e-4
"""Likewise where the file computes in half precision."""
TOLERANCE = 100
"""Largest difference there may be, in units of rounding of the largest value."""
ANSWERS = 30
"""Largest difference there may be, in units of what that change of the input does."""
FEW = 1e-3
"""Share of values that may differ all the same: those behind a jump, as of Round."""
MIXED = (
    "Networks are imported as functions of one image: what mixes the images of a batch, as a batch "
    "norm in training mode does, cannot be. "
)
HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
TYPES = {"tensor(float16)": np.float16, "tensor(double)": np.float64}


@dataclasses.dataclass(frozen=True)
class FileRun:
    """What a file computes.

    Attributes:
      names: of its outputs.
      outputs: for the noise.
      answers: for the noise a little changed.
      rounding: relative precision it computes in.
    """

    names: tuple[str, ...]
    outputs: Sequence[Num[np.ndarray, "..."]]
    answers: Sequence[Num[np.ndarray, "..."]]
    rounding: float


def check_import(model: Model, path: Path) -> tuple[str, ...]:
    """Compares an imported network with its ONNX file in ONNX Runtime.

    Args:
      model: what was imported.
      path: the file.

    Returns:
      A note where the file could not be run, and why; otherwise nothing.

    Raises:
      ImportParityError: naming the output that differs.
    """
    try:
        given, theirs = run_file(path, model)
    except Exception as error:  # whatever a runtime raises says nothing about the import
        kind = "" if str(error) else type(error).__name__
        return (f"the import is not checked against its source: {show(str(error) or kind, 600)}",)
    run = jax.jit(lambda m, x: evaluate(m, x)[0], compiler_options=QUICK)
    with jax.default_matmul_precision("highest"):
        ours = run(model, given)
    for name, mine, *pair in zip(theirs.names, ours, theirs.outputs, theirs.answers, strict=True):
        found = as_filed(np.asarray(mine), model.input.layout)
        reason = difference(found, pair[0], pair[1], theirs.rounding)
        if reason:
            raise ImportParityError(
                f"{show(path.name)}: what was imported does not compute what the file computes in "
                f"ONNX Runtime: on noise, output {show(name)!r} {reason}. Nothing was made. Please "
                "report it with the file; exporting it with another opset may avoid the operator, "
                "and `unchecked=True` goes on all the same."
            )
    return ()


def check_function(
    model: Model,
    function: Callable[[Float[jax.Array, "..."]], Sequence[Any]],
    shape: tuple[int, ...],
    where: str,
    *,
    halves: bool,
) -> tuple[str, ...]:
    """Compares an imported network with the function it was imported from.

    Args:
      model: what was imported.
      function: of images as the source reads them; gives the outputs.
      shape: of these images, a batch of one.
      where: what messages call it.
      halves: whether it computes in half precision.

    Returns:
      A note where it could not be run, and why; otherwise nothing.

    Raises:
      ImportParityError: naming the output that differs.
    """
    rounding, layout = HALF_ROUNDING if halves else ROUNDING, model.contract.layout
    rng = np.random.default_rng(0)
    count = 2 if takes_batches(function, shape) else 1
    images = rng.normal(size=(count, *model.contract.shape)).astype(np.float32)
    nudged = images * (1 + np.float32(rounding) * rng.choice((-1, 1), size=images.shape))
    given = [jax.device_put(as_fed(x, len(shape), np.float32, layout)) for x in (images, nudged)]
    with jax.default_matmul_precision("highest"):
        try:
            source = jax.jit(function, compiler_options=QUICK)
            theirs, answers = ([np.asarray(y, np.float32) for y in source(x)] for x in given)
        except Exception as error:  # whatever the user's function raises
            kind = type(error).__name__
            return (f"the import is not checked against {where}: {kind}: {show(str(error), 300)}",)
        run = jax.jit(lambda m, x: evaluate(m, x)[0], compiler_options=QUICK)
        ours = run(model, jax.device_put(images))
    for at, (mine, wanted, answer) in enumerate(zip(ours, theirs, answers, strict=True)):
        reason = difference(as_filed(np.asarray(mine), layout), wanted, answer, rounding)
        if reason:
            raise ImportParityError(
                f"{where}: what was imported does not compute what it computes: on noise, output "
                f"{at} {reason}. Nothing was made. {MIXED if count > 1 else ''}Please report it "
                "with the function; unchecked=True goes on all the same."
            )
    return ()


def takes_batches(function: Callable[..., Sequence[Any]], shape: tuple[int, ...]) -> bool:
    """Whether a function of one image takes two as well, and gives as many of everything."""
    pair = jax.ShapeDtypeStruct((2, *shape[1:]), np.float32)
    try:
        outputs = jax.eval_shape(function, pair)
    except Exception:  # whatever a function raises that is for one image
        return False
    return all(output.shape[:1] == (2,) for output in outputs)


def run_file(path: Path, model: Model) -> tuple[Shaped[jax.Array, "n ..."], FileRun]:
    """The file on noise, and on noise a little changed; on rows of ids, which cannot be."""
    session = open_session(path, optimize=False)
    source = session.get_inputs()[0]
    rounding = HALF_ROUNDING if computes_in_halves(path, source.type) else ROUNDING
    batch = source.shape[0] if isinstance(source.shape[0], int) else 1
    names = tuple(o.name for o in session.get_outputs())
    if not isinstance(model.input, InputContract):
        rows = np.asarray(model.input.example(jax.random.key(0), batch))
        outputs = session.run(None, feed(session, rows, model.input.layout))
        return jax.device_put(rows), FileRun(names, outputs, outputs, rounding)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, *model.contract.shape)).astype(np.float32)
    kind, layout = TYPES.get(source.type, np.float32), model.contract.layout
    given = lambda x: {source.name: as_fed(x, len(source.shape), kind, layout)}
    nudged = images * (1 + np.float32(rounding) * rng.choice((-1, 1), size=images.shape))
    outputs, answers = (session.run(None, given(x)) for x in (images, nudged))
    return jax.device_put(images), FileRun(names, outputs, answers, rounding)


def as_filed(output: np.ndarray, layout: str) -> np.ndarray:
    """An output with its axes as the file has them: images where it has those of its input."""
    return output.transpose(0, 3, 1, 2) if output.ndim == 4 and layout != NHWC else output


def computes_in_halves(path: Path, type_name: str) -> bool:
    """Whether a file computes in half precision anywhere."""
    graph = read_onnx(path).graph
    casts = (a.i for n in graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to")
    kinds = {t.data_type for t in graph.initializer} | set(casts)
    return type_name == "tensor(float16)" or bool(kinds & set(HALVES))


def difference(ours: np.ndarray, theirs: Any, answers: Any, rounding: float) -> str:
    """How an output differs beyond rounding; empty if it does not.

    Args:
      ours: of the imported network, axes as in the file.
      theirs: of the file.
      answers: of the file, for an input changed by `rounding`.
      rounding: relative precision.
    """
    if np.issubdtype(np.asarray(theirs).dtype, np.integer):
        ours = chosen(ours, theirs)
    if np.size(theirs) != ours.size:
        return f"has shape {ours.shape} instead of {np.shape(theirs)}"
    wanted, changed = (np.asarray(v, np.float64).reshape(-1) for v in (theirs, answers))
    found = ours.astype(np.float64).reshape(-1)
    same = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
    finite = np.isfinite(found) & np.isfinite(wanted)
    scale = np.max(np.abs(wanted), where=finite, initial=0.0)
    steady = finite & np.isfinite(changed)
    with np.errstate(invalid="ignore"):
        answer = np.max(np.abs(changed - wanted), where=steady, initial=0.0)
        gap = np.where(finite, np.abs(found - wanted), np.inf)
    allowed = TOLERANCE * rounding * scale + ANSWERS * answer
    beyond = ~same & (gap > allowed)
    if np.mean(beyond) <= FEW:
        return ""
    return (
        f"is {np.max(gap[beyond]):.3g} apart of {scale:.3g} ({np.mean(beyond):.0%} of its values "
        f"more than {allowed:.2g} apart, which is what rounding explains)"
    )


def chosen(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Indices of the largest scores, along whichever axis comes nearest to what the file chose."""
    along = [np.argmax(ours, axis).reshape(-1) for axis in range(1, ours.ndim)]
    fitting = [found for found in along if found.size == theirs.size]
    agreeing = lambda found: np.mean(found == theirs.reshape(-1))
    return max(fitting, key=agreeing, default=ours)
