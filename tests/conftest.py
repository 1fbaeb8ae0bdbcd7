"""What every test runs under: 8 host devices, strict dtype promotion, 32-bit numbers."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", False)

SHARED = Path(__file__).resolve().parents[2] / "shared"


def define_torchvision_operators() -> Any:
    """Declares the operators torchvision registers fakes for, where its binary half cannot load.

    Returns:
      The library that must stay alive as long as they are needed; None where there is no need.
    """
    try:
        import torch
    except ImportError:
        return None
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    except ImportError:
        pass
    return None


TORCHVISION_OPERATORS = define_torchvision_operators()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of development data and checkpoints beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the development data in {SHARED.name}/ beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def resnet20(shared: Path) -> Any:
    """`io.load.Loaded`: a CIFAR ResNet-20 that classifies JPEG CIFAR-10."""
    from dfq_jax.io.load import load

    return load(shared / "checkpoints" / "resnet20-cifar10-jpeg.pth", arch="resnet20_cifar")


@pytest.fixture(scope="session")
def nets() -> Any:
    """The module `tests/nets.py`: hand-built networks and a NumPy evaluator."""
    path = Path(__file__).with_name("nets.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_net(nets: Any) -> Any:
    """`Model`: a small residual network with its batch norms in place; see `nets.tiny`."""
    return nets.tiny()


@pytest.fixture(scope="session")
def mixed_net(nets: Any) -> Any:
    """`Model`: the operators that `tiny_net` lacks; see `nets.mixed`."""
    return nets.mixed()
