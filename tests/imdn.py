"""IMDN x4 with its published weights, and Set5 to judge it by."""

from pathlib import Path
from typing import Any

import task_networks
from tasks_images import set5

__all__ = ["imdn", "set5"]


def imdn(weights: Path) -> Any:
    """The network of PyTorch with its published weights, in evaluation mode."""
    import torch

    network = task_networks.imdn()
    saved = torch.load(weights, map_location="cpu", weights_only=True)
    network.load_state_dict({name.removeprefix("module."): v for name, v in saved.items()})
    return network
