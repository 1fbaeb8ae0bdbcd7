"""A PyTorch module in memory as a `Program`: exported, saved to memory, and read as a file is."""

import contextlib
import io
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.io.frontends.program import Program
from dfq_jax.io.frontends.pt2_graph import read_pt2
from dfq_jax.io.readers.pickle_policy import show

OLDEST = (2, 9)  # PyTorch; older ones pickle the weights of exported programs
REASON_LINES = 3


def exported_program(module: Any, example: Any, *, where: str) -> Program:
    """The program of a live module, as if it had been exported to a file.

    Args:
      module: a `torch.nn.Module`, exported in eval mode and left as it was, or a
        `torch.export.ExportedProgram`.
      example: an input tensor, or the shape of one image, such as (3, 224, 224). Ignored for an
        exported program.
      where: what messages call the module.

    Returns:
      The network in the operators of ATen.

    Raises:
      ImportError: if PyTorch is missing or too old.
      UnsupportedModelError: if PyTorch cannot export the module, or it is of a kind that cannot be
        read.
      UsageError: if it is no module, or the example no tensor or shape.
    """
    torch = _torch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = module
        if isinstance(module, torch.nn.Module):
            exported = _export(torch, module, _example(torch, module, example), where)
        elif not isinstance(module, torch.export.ExportedProgram):
            raise UsageError(
                f"{where} is {type(module).__name__}; expected a torch.nn.Module or a "
                "torch.export.ExportedProgram."
            )
        buffer = io.BytesIO()
        try:
            torch.export.save(exported, buffer)
        except Exception as error:  # whatever PyTorch's serializer raises
            raise _refusal(where, "saved", error) from error
    return read_pt2(buffer.getvalue(), where)


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError("reading a live module needs PyTorch: pip install dfq-jax[torch]") from (
            error
        )
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST:
        raise ImportError(
            f"reading a live module needs PyTorch 2.9 or newer, not {torch.__version__}: "
            "pip install -U dfq-jax[torch]"
        )
    return torch


def _example(torch: Any, module: Any, example: Any) -> Any:
    if isinstance(example, torch.Tensor):
        return example
    if not isinstance(example, tuple | list) or not all(
        type(size) is int and size > 0 for size in example
    ):
        raise UsageError(
            f"the example is {show(repr(example))}; expected an input tensor or the shape of one "
            "image, such as (3, 224, 224)."
        )
    floats = (p for p in module.parameters() if p.is_floating_point())
    like = next(floats, torch.empty(0))
    return torch.zeros((1, *example), dtype=like.dtype, device=like.device)


def _export(torch: Any, module: Any, example: Any, where: str) -> Any:
    with _evaluating(module):
        try:
            return torch.export.export(module, (example,))
        except Exception as error:  # whatever the network or the tracer raises
            reason = error
        try:
            return torch.export.export(module, (example,), strict=True)
        except Exception:
            raise _refusal(where, "exported", reason) from reason


@contextlib.contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _refusal(where: str, action: str, error: Exception) -> UnsupportedModelError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(show(line, 200) for line in lines[:REASON_LINES]) or "no reason given"
    return UnsupportedModelError(
        f"{where} cannot be {action} by torch.export{_place(error)}: {type(error).__name__}: "
        f"{reason} See https://docs.pytorch.org/docs/stable/export.html for what can be."
    )


def _place(error: Exception) -> str:
    """Where in the network's own code an error arose; empty if nowhere."""
    library = Path(sysconfig.get_path("stdlib"))
    here = Path(__file__).parents[1]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        standard = path.is_relative_to(library) and "site-packages" not in path.parts
        inside = path.is_relative_to(here) or "site-packages/torch/" in path.as_posix()
        if path.suffix == ".py" and not standard and not inside:
            return f" at {show(path.name)}:{frame.lineno}, in {show(frame.name)}"
    return ""
