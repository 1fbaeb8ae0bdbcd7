"""Fixtures for importers: the networks to compare with."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def reference(torchvision: Any) -> Callable[[str], Any]:
    """Makes the PyTorch network of that name with random weights: `torch_nets.Reference`."""
    del torchvision  # it can only be imported once the fixture has run
    return importlib.import_module("torch_nets").Reference


@pytest.fixture(scope="session")
def onnx_nets() -> Any:
    """The module `onnx_nets.py`: small networks and their quantized versions."""
    return importlib.import_module("onnx_nets")
