"""Checkpoint files of small networks, and `dfq` as a program that knows one of them.

`python tests/checkpoints.py ARGUMENTS` is `dfq ARGUMENTS` with the architecture `small` added.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from dfq_jax.cli.app import main
from dfq_jax.graph.semantics import apply_op
from dfq_jax.io.zoo import catalog
from dfq_jax.io.zoo.builder import NetworkBuilder
from dfq_jax.types import InputContract

SMALL = "small"
Tensors = dict[str, np.ndarray]


def small(b: NetworkBuilder, classes: int) -> str:
    """A residual network with a depthwise and a strided convolution, for 8x8 images."""
    x = b.relu("relu1", b.bn("bn1", b.conv("conv1", b.images, 8, 3)))
    y = b.relu("relu2", b.bn("bn2", b.conv("depthwise", x, 8, 3, groups=8)), ceiling=6.0)
    x = b.relu("relu3", b.add("add", b.bn("bn3", b.conv("project", y, 8, 1)), x))
    x = b.relu("relu4", b.bn("bn4", b.conv("conv2", x, 12, 3, stride=2)))
    return b.linear("fc", b.global_avg_pool("pool", x), classes)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The architecture `small` in the catalog."""
    catalog.ENTRIES[SMALL] = catalog.Entry(small, InputContract(8, 8), 5)
    try:
        yield
    finally:
        del catalog.ENTRIES[SMALL]


def tensors(arch: str = SMALL, seed: int = 0, size: int | None = None, **how: int) -> Tensors:
    """A `state_dict` with random weights whose batch norms recorded what they see of noise.

    Args:
      arch: an architecture of the catalog.
      seed: of the weights and the noise.
      size: pixels along each side of the noise images; None for the published ones.
      how: `classes` and `channels`, where they differ from the published ones.
    """
    with registered():
        net = catalog.architecture(arch, size=size, **how)
    rng = np.random.default_rng(seed)
    torch = {(p.node, p.slot): (p, random(rng, p.slot, p.torch_shape)) for p in net.expected}
    noise = rng.normal(size=(16, *net.contract.shape))
    seen = {"images": jax.device_put(np.float32(noise))}
    for node in net.graph.nodes:
        slots = {}
        for (name, slot), (parameter, values) in torch.items():
            if name == node.name:
                if slot in ("mean", "var"):
                    x = seen[node.inputs[0]]
                    values[...] = getattr(x, slot)(tuple(range(x.ndim - 1)))
                order = {"conv": (2, 3, 1, 0), "linear": (1, 0), "vector": (0,)}
                slots[slot] = jax.device_put(values.transpose(order[parameter.layout]))
        seen[node.name] = apply_op(node.op, slots, *(seen[i] for i in node.inputs))
    return {p.torch_name: values for p, values in torch.values()}


def random(rng: np.random.Generator, slot: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values that keep a network lively: He-scaled kernels, scales around 1."""
    if slot == "kernel":
        values = rng.normal(size=shape) * (2 / np.prod(shape[1:])) ** 0.5
    elif slot == "scale":
        values = rng.uniform(0.6, 1.4, shape)
    else:
        values = rng.normal(size=shape) * 0.3
    return values.astype(np.float32)


def write(path: Path, values: Mapping[str, np.ndarray] | None = None) -> Path:
    """A `.safetensors` file; without `values`, of `tensors()`."""
    save_file(dict(tensors() if values is None else values), path)
    return path


if __name__ == "__main__":
    with registered():
        main()
