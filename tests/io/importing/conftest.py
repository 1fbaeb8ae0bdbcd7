"""Networks sent through an exporter and an importer, and compared with PyTorch."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import currently_in_test_context, reject

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Model
from dfq_jax.io.frontends.graph_files import prepared
from dfq_jax.io.frontends.onnx_graph import read_onnx_program
from dfq_jax.io.frontends.program import Program
from dfq_jax.io.frontends.pt2_graph import read_pt2
from dfq_jax.io.importing.aten_table import ATEN
from dfq_jax.io.importing.engine import Imported, import_program
from dfq_jax.io.importing.onnx_table import ONNX
from dfq_jax.types import plain_contract

torch = pytest.importorskip("torch")

Shape = tuple[int, ...]
Network = Any
"""A `torch.nn.Module`, or a function of one tensor."""


Route = tuple[int | None, int | str | None]
"""Images the network is exported with, None for any number; ONNX opset, None for `.pt2`, `core` for
one after `run_decompositions()`."""
PLAIN: Route = (1, None)


class Wrapped(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Exporters warn, log and print; nothing of that is of interest here."""
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def exported(
    network: Network, shape: Shape, batch: int | None = 1, decompose: bool = False
) -> Program:
    """The program of a network in PyTorch's operators."""
    problem = None
    file = io.BytesIO()
    with quietly():
        free = {"dynamic_shapes": ({0: torch.export.Dim("n", min=1, max=64)},)}
        example = torch.randn(2 if batch is None else batch, *shape)
        try:
            program = torch.export.export(network, (example,), **(free if batch is None else {}))
            torch.export.save(program.run_decompositions() if decompose else program, file)
        except Exception as error:
            problem = f"torch.export: {type(error).__name__}: {str(error)[:300]}"
    if problem:
        pytest.fail(problem, pytrace=False)
    return read_pt2(file.getvalue(), "net.pt2")


def exported_to_onnx(network: Network, shape: Shape, opset: int, batch: int | None = 1) -> Program:
    """The program of a network in ONNX's operators; the example is void if that cannot be made."""
    file = io.BytesIO()
    with quietly():
        example = torch.randn(batch or 1, *shape)
        free = {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
        try:
            torch.onnx.export(
                network,
                (example,),
                file,
                dynamo=False,
                opset_version=opset,
                training=torch.onnx.TrainingMode.PRESERVE,
                do_constant_folding=False,
                **(free if batch is None else {}),
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError):
            refused = True
        else:
            refused = False
    if refused and currently_in_test_context():
        reject()
    assert not refused, "torch.onnx.export refuses"
    return prepared(read_onnx_program(file.getvalue(), "net.onnx", None))


def as_module(network: Network) -> Any:
    """The network as a module at inference."""
    module = network if isinstance(network, torch.nn.Module) else Wrapped(network)
    return module.eval()


def imported(network: Network, shape: Shape, route: Route = PLAIN) -> Imported:
    """The graph of a network that reads images (or lines, or features) of `shape`."""
    module = as_module(network)
    batch, opset = route
    if opset is None or isinstance(opset, str):
        return import_program(exported(module, shape, batch, opset == "core"), ATEN)
    return import_program(exported_to_onnx(module, shape, opset, batch), ONNX)


run = jax.jit(lambda model, images: evaluate(model, images)[0])
"""One program a network: each is drawn once, so none would share those of its operators."""


def outputs_of(found: Imported, x: np.ndarray) -> list[np.ndarray]:
    """What an imported graph computes, in PyTorch's axis order."""
    images = x.reshape(*x.shape[:2], *(1,) * (4 - x.ndim), *x.shape[2:]).transpose(0, 2, 3, 1)
    params = jax.device_put(found.params)
    model = Model(found.graph, params, (plain_contract(found.shape),))
    arrays = [np.asarray(r) for r in run(model, images)]
    return [a.transpose(0, 3, 1, 2) if a.ndim == 4 else a for a in arrays]


def agree(network: Network, shape: Shape, route: Route = PLAIN, tolerance: float = 1e-5) -> Graph:
    """Asserts that an imported network computes what it did in PyTorch, on three images.

    Args:
      network: what to export.
      shape: of one image in PyTorch's order.
      route: how it is exported.
      tolerance: of the largest difference, in units of the largest output.

    Returns:
      The graph.
    """
    module = as_module(network)
    found = imported(module, shape, route)
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    with torch.no_grad():
        wanted = module(torch.from_numpy(x.copy()))
    wanted = [wanted] if isinstance(wanted, torch.Tensor) else list(wanted)
    got = outputs_of(found, x)
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        theirs = theirs.numpy()
        assert mine.shape == theirs.shape, f"{found.graph}"
        gap = np.abs(mine - theirs).max()
        assert gap <= tolerance * np.abs(theirs).max(), f"{route} gap {gap}\n{found.graph}"
    return found.graph


class Kit(NamedTuple):
    """What the tests of this folder use."""

    agree: Callable[..., Graph]
    imported: Callable[..., Imported]
    exported: Callable[..., Program]
    exported_to_onnx: Callable[..., Program]
    outputs_of: Callable[..., list[np.ndarray]]


@pytest.fixture(scope="session")
def kit() -> Kit:
    """The functions of this module."""
    return Kit(agree, imported, exported, exported_to_onnx, outputs_of)
