"""Files of `torch.export.save`, whole or with members changed."""

import functools
import io
import json
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dfq_jax.io.frontends.pt2_graph import read_pt2

WEIGHTS = "data/weights/model_weights_config.json"
MODEL = "models/model.json"
Change = Callable[[Any], Any]


def exported(module: torch.nn.Module, *inputs: torch.Tensor) -> bytes:
    """What torch.export.save writes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module.eval(), inputs), buffer)
    return buffer.getvalue()


def members(data: bytes) -> dict[str, bytes]:
    """Contents of the members, by name without the root."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def packed(
    contents: dict[str, bytes | None], root: str = "net/", method: int = zipfile.ZIP_STORED
) -> bytes:
    """An archive of any content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as target:
        for name, content in contents.items():
            if content is not None:
                target.writestr(root + name, content)
    return buffer.getvalue()


def changed(data: bytes, changes: dict[str, bytes | None]) -> bytes:
    """The same archive with members replaced, added or left out."""
    return packed({**members(data), **changes})


def edited(data: bytes, path: str, change: Change) -> bytes:
    """The same archive with one JSON member changed in place."""
    record = json.loads(members(data)[path])
    change(record)
    return changed(data, {path: json.dumps(record).encode()})


@functools.cache
def small() -> bytes:
    """A convolution and a batch norm."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    return exported(net, torch.zeros(1, 3, 8, 8))


def arrays(data: bytes | memoryview) -> dict[str, np.ndarray]:
    """All weights by path."""
    program = read_pt2(data, "net.pt2")
    return {path: program.arrays[name] for name, path in program.paths.items()}
