"""What a gradient step of synthesis costs, and what a chip could make of it: formulas only.

A step is a forward pass and the gradient with respect to the images; weights have none. Time is
bounded by arithmetic and by memory traffic (a roofline); `docs/SCALING.md` says what is assumed.
"""

import math
from typing import Any, NamedTuple

PASSES = 5
"""A tensor is written and read forwards, read again for the gradient, whose own is both too."""
ADAM = 7
"""Reads of pixels, two moments and the gradient; writes of pixels and moments; all float32."""
VECTORS = 3
"""Sums over all rows for each batch norm: mean and variance, and the gradient of the mean."""
BYTES = {"bfloat16": 2, "float32": 4}


class Work(NamedTuple):
    """What a network does with one image.

    Attributes:
      macs: multiply-accumulates of a forward pass.
      depthwise: those of depthwise convolutions among them.
      written: elements of the outputs of all nodes.
      fused: elements of tensors that layers, pools and products of tensors read or write.
      parameters: stored values.
      channels: of all batch norms that synthesis looks at.
      norms: how many those are.
      pixels: values of an image.
    """

    macs: int
    depthwise: int
    written: int
    fused: int
    parameters: int
    channels: int
    norms: int
    pixels: int

    @property
    def step_flops(self) -> int:
        """Forward pass and input gradient, two operations a multiply-accumulate each."""
        return 4 * self.macs

    def step_bytes(self, size: int, batch: int, *, fused: bool = True) -> float:
        """Bytes to and from memory for one image and step.

        Args:
          size: bytes of a weight or activation.
          batch: images that share one reading of the weights, forwards and backwards.
          fused: pointwise operators cost no traffic of their own.
        """
        tensors = self.fused if fused else self.written
        weights = 2 * self.parameters / batch
        return size * (PASSES * tensors + weights) + self.optimizer_bytes

    @property
    def optimizer_bytes(self) -> int:
        """Bytes that Adam moves for one image and step."""
        return 4 * ADAM * self.pixels

    @property
    def reduced_bytes(self) -> int:
        """What an all-reduce of a step adds up, whatever the batch and the number of devices."""
        return 4 * VECTORS * self.channels


class Chip(NamedTuple):
    """Published peaks of one chip.

    Attributes:
      name: as its vendor calls it.
      bfloat16: operations a second with bfloat16 factors, dense.
      float32: the same of float32 arrays at JAX's default precision: TPUs round the factors to
        bfloat16, GPUs to TF32.
      bandwidth: of its memory, bytes a second.
      source: where the figures are from.
    """

    name: str
    bfloat16: float
    float32: float
    bandwidth: float
    source: str

    def peak(self, dtype: str) -> float:
        """Operations a second in a precision."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32


def tpu(name: str, tera: float, giga: float) -> Chip:
    """A TPU, from its page in the Cloud TPU documentation."""
    page = f"Google Cloud, Cloud TPU documentation, page {name}"
    return Chip(name, tera * 1e12, tera * 1e12, giga * 1e9, page)


def gpu(name: str, tera: float, giga: float) -> Chip:
    """A GPU, from its data sheet without sparsity; TF32 runs at half the speed of bfloat16."""
    page = f"NVIDIA, {name.split()[0]} Tensor Core GPU data sheet, without sparsity"
    return Chip(name, tera * 1e12, tera / 2 * 1e12, giga * 1e9, page)


CHIPS = (
    tpu("TPU v4", 275, 1200),
    tpu("TPU v5e", 197, 819),
    tpu("TPU v5p", 459, 2765),
    tpu("TPU v6e", 918, 1638),
    gpu("A100 SXM 80 GB", 312, 2039),
    gpu("H100 SXM", 989, 3350),
    gpu("H200 SXM", 989, 4800),
)


class Ceiling(NamedTuple):
    """Assumed shares of what is published that a good program gets."""

    flops: float = 0.5
    bandwidth: float = 0.8


EXACT = Ceiling(1.0, 1.0)
"""For peaks that were measured."""


def step_seconds(
    work: Work,
    chip: Chip,
    dtype: str,
    batch: int,
    ceiling: Ceiling,
    *,
    fused: bool = True,
) -> float:
    """Seconds of a step of a batch on one chip: arithmetic or traffic, whichever is longer."""
    arithmetic = work.step_flops / (ceiling.flops * chip.peak(dtype))
    moved = work.step_bytes(BYTES[dtype], batch, fused=fused)
    return batch * max(arithmetic, moved / (ceiling.bandwidth * chip.bandwidth))


def pod_seconds(images: int, chips: int, batch: int, steps: int, step_s: float) -> float:
    """Seconds to make images apart: every chip makes batches of its own, in rounds."""
    batches = math.ceil(images / batch)
    return math.ceil(batches / chips) * steps * step_s


def readable(seconds: float) -> str:
    """A duration in the unit that suits it."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def work_of(model: Any, channels: int, norms: int) -> Work:
    """Counts what a network does with one image.

    Args:
      model: the network.
      channels: of the batch norms that synthesis looks at.
      norms: how many those are.
    """
    from dfq_jax.graph.ops import WEIGHTED, Conv2d, MatMul, Pool, Reduce
    from dfq_jax.graph.query import macs, output_shapes, parameter_count

    shapes, each = output_shapes(model), macs(model)
    nodes = {node.name: node for node in model.graph.nodes}
    kept: set[str] = set()
    for node in model.graph.nodes:
        if isinstance(node.op, (*WEIGHTED, MatMul, Pool, Reduce)):
            kept |= {node.name, *(i for i in node.inputs if i in nodes)}
    convolutions = {name: nodes[name].op for name in each}
    apart = {name for name, op in convolutions.items() if isinstance(op, Conv2d) and op.groups > 1}
    depthwise = [n for n in apart if convolutions[n].groups == shapes[nodes[n].inputs[0]][-1]]
    return Work(
        macs=sum(each.values()),
        depthwise=sum(each[name] for name in depthwise),
        written=sum(math.prod(shapes[name]) for name in nodes),
        fused=sum(math.prod(shapes[name]) for name in kept),
        parameters=parameter_count(model),
        channels=channels,
        norms=norms,
        pixels=math.prod(model.contract.shape),
    )
