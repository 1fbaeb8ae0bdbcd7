"""Hand-built networks with realistic statistics, and a float64 NumPy evaluator to judge by."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import (
    Add,
    AvgPool,
    BatchNorm,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool,
    Pad,
    Relu,
    Slice,
)
from dfq_jax.types import InputContract

SAME = ((1, 1), (1, 1))

run = jax.jit(lambda model, x: evaluate(model, x)[0][0])
"""First output of a network, compiled."""


def conv(x, kernel, strides=(1, 1), padding=((0, 0), (0, 0)), groups=1, dilation=(1, 1)):
    """Convolution as six nested loops, the two over pixels written as slices."""
    kh, kw, per_group, cout = kernel.shape
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    oh = (x.shape[1] - dilation[0] * (kh - 1) - 1) // strides[0] + 1
    ow = (x.shape[2] - dilation[1] * (kw - 1) - 1) // strides[1] + 1
    out = np.zeros((x.shape[0], oh, ow, cout), x.dtype)
    for o in range(cout):
        first = o // (cout // groups) * per_group
        for i, j, c in np.ndindex(kh, kw, per_group):
            top, left = i * dilation[0], j * dilation[1]
            rows = slice(top, top + (oh - 1) * strides[0] + 1, strides[0])
            columns = slice(left, left + (ow - 1) * strides[1] + 1, strides[1])
            out[..., o] += x[:, rows, columns, first + c] * kernel[i, j, c, o]
    return out


def windows(x, op, fill):
    """Values under each pooling window: (kh * kw, n, oh, ow, c)."""
    x = np.pad(x, ((0, 0), *op.padding, (0, 0)), constant_values=fill)
    (kh, kw), (sh, sw) = op.window, op.strides
    oh, ow = (x.shape[1] - kh) // sh + 1, (x.shape[2] - kw) // sw + 1
    return np.stack(
        [
            x[:, i : i + (oh - 1) * sh + 1 : sh, j : j + (ow - 1) * sw + 1 : sw]
            for i, j in np.ndindex(kh, kw)
        ]
    )


def average(x, op):
    """Average pooling."""
    total = windows(x, op, 0.0).sum(0)
    if op.count_padding:
        return total / (op.window[0] * op.window[1])
    return total / windows(np.ones_like(x), op, 0.0).sum(0)


def reference(op, p, *xs):  # one line per operator
    """One operator in NumPy."""
    x = xs[0]
    bias = p.get("bias", 0.0)
    if isinstance(op, Conv2d):
        return conv(x, p["kernel"], op.strides, op.padding, op.groups, op.dilation) + bias
    if isinstance(op, Linear):
        return x @ p["kernel"] + bias
    if isinstance(op, BatchNorm):
        return (x - p["mean"]) / np.sqrt(p["var"] + op.eps) * p.get("scale", 1.0) + bias
    if isinstance(op, Relu):
        return np.minimum(np.maximum(x, 0), np.inf if op.ceiling is None else op.ceiling)
    if isinstance(op, Pad):
        return np.pad(x, op.widths, constant_values=op.value)
    simple = {
        Add: lambda: x + xs[1],
        MaxPool: lambda: windows(x, op, -np.inf).max(0),
        AvgPool: lambda: average(x, op),
        GlobalAvgPool: lambda: x.mean((1, 2)),
        Flatten: lambda: x.reshape(len(x), -1),
        Slice: lambda: x[tuple(slice(*b) for b in op.bounds)],
    }
    return simple[type(op)]()


def forward(
    model: Model,
    images,
    edge: Callable = lambda node, index, x: x,
    slots: Callable = lambda node, p: p,
) -> dict[str, np.ndarray]:
    """Every tensor of a network in float64; `edge` and `slots` edit what a node reads."""
    env = {model.graph.inputs[0]: np.asarray(images, np.float64)}
    for node in model.graph.nodes:
        p = {k: np.asarray(v, np.float64) for k, v in model.params.get(node.name, {}).items()}
        args = [edge(node, i, env[source]) for i, source in enumerate(node.inputs)]
        env[node.name] = reference(node.op, slots(node, p), *args)
    return env


class Builder:
    """Collects nodes; batch norms record (almost) the statistics of what they really see."""

    def __init__(self, contract: InputContract, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.contract = contract
        self.nodes: list[Node] = []
        self.params: dict[str, dict[str, np.ndarray]] = {}
        self.seen = {"images": self.rng.normal(size=(16, *contract.shape))}

    def op(self, name, op, *inputs, **slots) -> str:
        """Adds a node and runs it."""
        self.nodes.append(Node(name, op, inputs))
        if slots:
            self.params[name] = slots
        self.seen[name] = reference(op, slots, *(self.seen[i] for i in inputs))
        return name

    def conv(self, name, x, cout, kernel=3, stride=1, groups=1, bias=False, **how) -> str:
        """Convolution with He-scaled weights and half padding."""
        cin = self.seen[x].shape[-1] // groups
        how.setdefault("padding", ((kernel // 2,) * 2,) * 2)
        shape = (kernel, kernel, cin, cout)
        slots = {"kernel": self.rng.normal(size=shape) * (2 / (kernel * kernel * cin)) ** 0.5}
        if bias:
            slots["bias"] = self.rng.normal(size=cout) * 0.2
        return self.op(name, Conv2d((stride, stride), groups=groups, **how), x, **slots)

    def bn(self, name, x, affine=True) -> str:
        """Batch norm; its first scale is negative."""
        values = self.seen[x]
        axes = tuple(range(values.ndim - 1))
        slots = {"mean": values.mean(axes), "var": values.var(axes) * self.rng.uniform(0.9, 1.1)}
        if affine:
            slots["scale"] = self.rng.uniform(0.5, 1.5, values.shape[-1])
            slots["scale"][0] *= -1
            slots["bias"] = self.rng.normal(size=values.shape[-1]) * 0.4
        return self.op(name, BatchNorm(), x, **slots)

    def linear(self, name, x, cout, bias=True) -> str:
        """Linear layer."""
        cin = self.seen[x].shape[-1]
        slots = {"kernel": self.rng.normal(size=(cin, cout)) / cin**0.5}
        if bias:
            slots["bias"] = self.rng.normal(size=cout) * 0.2
        return self.op(name, Linear(), x, **slots)

    def done(self, *outputs) -> Model:
        """The network, in float32."""
        params = {
            name: {slot: jnp.asarray(v, jnp.float32) for slot, v in slots.items()}
            for name, slots in self.params.items()
        }
        return Model(Graph(tuple(self.nodes), ("images",), outputs), params, self.contract)


def tiny(seed: int = 0, size: int = 8) -> Model:
    """A residual network: conv, depthwise, pointwise, addition, strides, pooling, linear."""
    b = Builder(InputContract(size, size), seed)
    x = b.op("relu1", Relu(), b.bn("bn1", b.conv("conv1", "images", 6)))
    y = b.op("relu2", Relu(6.0), b.bn("bn2", b.conv("depthwise", x, 6, groups=6)))
    y = b.bn("bn3", b.conv("project", y, 6, kernel=1))
    x = b.op("relu3", Relu(), b.op("add", Add(), y, x))
    x = b.op("maxpool", MaxPool((2, 2), (2, 2)), x)
    x = b.op("relu4", Relu(), b.bn("bn4", b.conv("conv2", x, 8, stride=2, bias=True)))
    return b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), x), 5))


def stem(seed: int = 0) -> Model:
    """The smallest network with two batch norms, for whatever compiles often."""
    b = Builder(InputContract(6, 6), seed)
    x = b.op("relu1", Relu(), b.bn("bn1", b.conv("conv1", "images", 4, stride=2)))
    x = b.op("relu2", Relu(), b.bn("bn2", b.conv("conv2", x, 5, kernel=1)))
    return b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), x), 5))


def mixed() -> Model:
    """What `tiny` lacks: groups, dilation, uneven padding, other pooling, slices, flattening."""
    b = Builder(InputContract(9, 7), 3)
    x = b.conv("conv1", "images", 4, stride=2, padding=((0, 1), (2, 1)), bias=True)
    x = b.bn("lone", b.op("relu1", Relu(), x), affine=False)
    x = b.conv("conv2", x, 6, groups=2, dilation=(2, 1), padding=((2, 1), (0, 2)))
    x = b.op("avg1", AvgPool((3, 2), (1, 1), ((1, 0), (1, 1)), count_padding=False), x)
    x = b.op("avg2", AvgPool((2, 2), (2, 1), ((1, 0), (0, 1)), count_padding=True), x)
    x = b.op("max", MaxPool((2, 3), (1, 1), ((1, 0), (1, 1))), x)
    x = b.op("cut", Slice(((0, None, 1), (0, None, 1), (-1, None, -2), (0, 6, 1))), x)
    x = b.op("pad", Pad(((0, 0), (0, 1), (0, 0), (1, 1))), x)
    x = b.op("relu2", Relu(6.0), b.linear("mix", x, 5))
    return b.done(b.linear("fc", b.op("flat", Flatten(), x), 4, bias=False))


def images(model: Model, count: int = 6, seed: int = 0):
    """Normal images of the network's size."""
    return jax.random.normal(jax.random.key(seed), (count, *model.contract.shape))
