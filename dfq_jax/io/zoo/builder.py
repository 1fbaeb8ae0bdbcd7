"""Writes an architecture down node by node, keeping track of every tensor's size.

A `NetworkBuilder` lives only while an architecture is being built; what leaves it is immutable.
Every method adds one node, named like the PyTorch module it stands for, and returns that name.
"""

from dfq_jax.errors import GraphError, UsageError
from dfq_jax.graph.graph import Graph, Node
from dfq_jax.graph.ops import (
    Add,
    AvgPool,
    BatchNorm,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool,
    Op,
    Pad,
    Pads,
    Relu,
    Slice,
)
from dfq_jax.io.zoo.architecture import Architecture, Parameter, WeightLayout
from dfq_jax.types import InputContract


class NetworkBuilder:
    """Collects nodes and expected parameters of one architecture.

    Attributes:
      name: of the architecture.
      contract: what an input image must be.
      shapes: {tensor: shape of one image's share}: (h, w, c), or (features,) once flat.
    """

    def __init__(self, name: str, contract: InputContract) -> None:
        """Starts with the network's input, the tensor `images`."""
        self.name = name
        self.contract = contract
        self.shapes: dict[str, tuple[int, ...]] = {"images": contract.shape}
        self._nodes: list[Node] = []
        self._expected: list[Parameter] = []
        self._flattened: dict[str, tuple[int, int, int]] = {}

    @property
    def images(self) -> str:
        """Name of the network's input."""
        return "images"

    def channels(self, x: str) -> int:
        """Number of channels of a tensor."""
        return self.shapes[x][-1]

    def finish(self, output: str) -> Architecture:
        """The architecture that returns `output`."""
        graph = Graph(tuple(self._nodes), ("images",), (output,))
        return Architecture(self.name, graph, self.contract, tuple(self._expected))

    def conv(
        self,
        name: str,
        x: str,
        out: int,
        kernel: int,
        stride: int = 1,
        padding: Pads | None = None,
        groups: int = 1,
        bias: bool = False,
    ) -> str:
        """A square convolution; without `padding`, half the kernel on every side."""
        pads = half(kernel) if padding is None else padding
        size = self.windows(name, x, kernel, stride, pads)
        self.expect(
            name, "weight", "kernel", "conv", out, self.channels(x) // groups, kernel, kernel
        )
        if bias:
            self.expect(name, "bias", "bias", "vector", out)
        op = Conv2d((stride, stride), pads, groups)
        return self.add_node(name, op, (x,), (*size, out))

    def bn(self, name: str, x: str, eps: float = 1e-5) -> str:
        """Batch norm with scale and bias."""
        for torch_slot, slot in BATCH_NORM_SLOTS:
            self.expect(name, torch_slot, slot, "vector", self.channels(x))
        return self.add_node(name, BatchNorm(eps), (x,), self.shapes[x])

    def relu(self, name: str, x: str, ceiling: float | None = None) -> str:
        """ReLU, capped at `ceiling` when given."""
        return self.add_node(name, Relu(ceiling), (x,), self.shapes[x])

    def add(self, name: str, x: str, y: str) -> str:
        """Sum of two tensors of one shape.

        Raises:
          GraphError: if the shapes differ.
        """
        if self.shapes[x] != self.shapes[y]:
            raise GraphError(
                f"{self.name}: {name!r} adds {x!r} of shape {self.shapes[x]} "
                f"to {y!r} of shape {self.shapes[y]}."
            )
        return self.add_node(name, Add(), (x, y), self.shapes[x])

    def max_pool(self, name: str, x: str, window: int, stride: int, padding: int = 0) -> str:
        """Maximum over square windows."""
        pads = ((padding, padding), (padding, padding))
        size = self.windows(name, x, window, stride, pads)
        op = MaxPool((window, window), (stride, stride), pads)
        return self.add_node(name, op, (x,), (*size, self.channels(x)))

    def avg_pool(self, name: str, x: str, window: tuple[int, int]) -> str:
        """Mean over windows that do not overlap."""
        h, w, c = self.shapes[x]
        shape = (h // window[0], w // window[1], c)
        return self.add_node(name, AvgPool(window, window), (x,), shape)

    def global_avg_pool(self, name: str, x: str) -> str:
        """Mean over all pixels: (h, w, c) to (c,)."""
        return self.add_node(name, GlobalAvgPool(), (x,), (self.channels(x),))

    def flatten(self, name: str, x: str) -> str:
        """(h, w, c) to (h * w * c,); the next linear layer's kernel is permuted when bound."""
        h, w, c = self.shapes[x]
        self._flattened[name] = (c, h, w)
        return self.add_node(name, Flatten(), (x,), (h * w * c,))

    def linear(self, name: str, x: str, out: int) -> str:
        """Linear layer with bias, on a flat tensor."""
        flattened = self._flattened.get(x)
        shape = (out, self.channels(x))
        self._expected.append(
            Parameter(f"{name}.weight", shape, name, "kernel", "linear", flattened)
        )
        self.expect(name, "bias", "bias", "vector", out)
        return self.add_node(name, Linear(), (x,), (out,))

    def slice(self, name: str, x: str, *steps: tuple[int, int | None, int]) -> str:
        """x[start:stop:step], one triple for each of (h, w, c)."""
        sizes = zip(self.shapes[x], steps, strict=True)
        shape = tuple(len(range(*slice(*step).indices(size))) for size, step in sizes)
        return self.add_node(name, Slice(((0, None, 1), *steps)), (x,), shape)

    def pad(self, name: str, x: str, *widths: tuple[int, int]) -> str:
        """Zeros (before, after), one pair for each of (h, w, c)."""
        sizes = zip(self.shapes[x], widths, strict=True)
        shape = tuple(size + before + after for size, (before, after) in sizes)
        return self.add_node(name, Pad(((0, 0), *widths)), (x,), shape)

    def same(self, x: str, kernel: int, stride: int) -> Pads:
        """TensorFlow's "same" padding of `x`: the odd pixel goes after, not before."""
        h, w, _ = self.shapes[x]
        return same_pads(h, kernel, stride), same_pads(w, kernel, stride)

    def windows(self, name: str, x: str, window: int, stride: int, pads: Pads) -> tuple[int, int]:
        """How many windows fit in each direction.

        Raises:
          UsageError: if none does, because the network's input is too small.
        """
        h, w, _ = self.shapes[x]
        rows = (h + sum(pads[0]) - window) // stride + 1
        columns = (w + sum(pads[1]) - window) // stride + 1
        if rows < 1 or columns < 1:
            raise UsageError(
                f"{self.name} cannot read images of {self.contract.height}x{self.contract.width}: "
                f"at {name!r} only {h}x{w} pixels are left, fewer than its window of {window}. "
                f"Choose a larger size."
            )
        return rows, columns

    def expect(
        self, node: str, torch_slot: str, slot: str, layout: WeightLayout, *shape: int
    ) -> None:
        """Notes that a checkpoint must hold `{node}.{torch_slot}`."""
        self._expected.append(Parameter(f"{node}.{torch_slot}", shape, node, slot, layout))

    def add_node(self, name: str, op: Op, inputs: tuple[str, ...], shape: tuple[int, ...]) -> str:
        """Appends a node whose output has this shape."""
        self._nodes.append(Node(name, op, inputs))
        self.shapes[name] = shape
        return name


BATCH_NORM_SLOTS = (
    ("weight", "scale"),
    ("bias", "bias"),
    ("running_mean", "mean"),
    ("running_var", "var"),
)
"""(name in PyTorch, slot of `BatchNorm`)."""


def half(kernel: int) -> Pads:
    """PyTorch's usual padding: `kernel // 2` on every side."""
    side = (kernel // 2, kernel // 2)
    return side, side


def same_pads(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """(before, after) such that `ceil(size / stride)` windows fit."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def divisible(width: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `width`, at most 10 % below it."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * width else rounded + divisor
