"""Fixtures for importers: the networks to compare with."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Any]:
    """Makes the PyTorch network of that name with random weights: `torch_nets.Reference`."""
    pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    return module_beside("torch_nets.py").Reference


@pytest.fixture(scope="session")
def onnx_nets() -> Any:
    """The module `onnx_nets.py`: small networks and their quantized versions."""
    return module_beside("onnx_nets.py")


def module_beside(name: str) -> Any:
    """The module in a file of this folder."""
    path = Path(__file__).with_name(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
