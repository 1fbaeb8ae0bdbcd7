"""Small random networks that exercise every operator and shape of edge."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

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
from dfq_jax.io.onnx_out import quantized_onnx, serialize
from dfq_jax.numerics.ranges import MinMax
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantize.calibrate import calibrate
from dfq_jax.quantize.plan import LayerPreset, parse_scheme, resolve
from dfq_jax.quantize.simulate import QuantizedModel
from dfq_jax.types import InputContract

ONE = ((1, 1), (1, 1))


class Net:
    """Collects nodes with random parameters."""

    def __init__(self, seed: int = 0, size: int = 16) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Node] = []
        self.params: dict[str, dict] = {}
        self.contract = InputContract(size, size)

    def normal(self, *shape: int, scale: float = 1.0):
        return jnp.asarray(self.rng.normal(size=shape) * scale, jnp.float32)

    def op(self, name: str, op, *inputs: str) -> str:
        self.nodes.append(Node(name, op, inputs))
        return name

    def conv(self, name, x, cin, cout, kernel=3, stride=1, groups=1, bias=True, **how) -> str:
        how.setdefault("padding", ((kernel // 2,) * 2,) * 2)
        fan = kernel * kernel * cin // groups
        self.params[name] = {
            "kernel": self.normal(kernel, kernel, cin // groups, cout, scale=(2 / fan) ** 0.5)
        }
        if bias:
            self.params[name]["bias"] = self.normal(cout, scale=0.3)
        return self.op(name, Conv2d((stride, stride), groups=groups, **how), x)

    def bn(self, name, x, chan, affine=True) -> str:
        self.params[name] = {
            "mean": self.normal(chan, scale=0.3),
            "var": self.normal(chan) ** 2 + 0.5,
        }
        if affine:
            self.params[name] |= {"scale": self.normal(chan) ** 2 + 0.3, "bias": self.normal(chan)}
        return self.op(name, BatchNorm(), x)

    def linear(self, name, x, cin, cout, bias=True) -> str:
        self.params[name] = {"kernel": self.normal(cin, cout, scale=cin**-0.5)}
        if bias:
            self.params[name]["bias"] = self.normal(cout, scale=0.3)
        return self.op(name, Linear(), x)

    def finish(self, *outputs: str) -> Model:
        graph = Graph(tuple(self.nodes), ("images",), outputs)
        return Model(graph, self.params, self.contract)


def residual() -> Model:
    """Relu, Relu6, depthwise, strides, residual additions, max pooling, global pooling, linear."""
    n = Net(1)
    x = n.op("relu1", Relu(), n.bn("bn1", n.conv("conv1", "images", 3, 16, bias=False), 16))
    x = n.op("maxpool", MaxPool((3, 3), (2, 2), ONE), x)
    y = n.op("relu2", Relu(6.0), n.bn("bn2", n.conv("expand", x, 16, 32, 1, bias=False), 32))
    y = n.conv("depthwise", y, 32, 32, groups=32, bias=False)
    y = n.op("relu3", Relu(6.0), n.bn("bn3", y, 32))
    y = n.bn("bn4", n.conv("project", y, 32, 16, 1, bias=False), 16)
    x = n.op("add1", Add(), x, y)
    y = n.op("relu4", Relu(), n.bn("bn5", n.conv("conv2", x, 16, 24, 3, 2, bias=False), 24))
    y = n.bn("bn6", n.conv("conv3", y, 24, 24, bias=False), 24)
    skip = n.bn("bn7", n.conv("down", x, 16, 24, 1, 2, bias=False), 24)
    x = n.op("relu5", Relu(), n.op("add2", Add(), y, skip))
    x = n.op("pool", GlobalAvgPool(), x)
    return n.finish(n.linear("fc", x, 24, 10))


def option_a() -> Model:
    """A parameter-free shortcut: strided slice and zero channels."""
    n = Net(2)
    x = n.op("relu1", Relu(), n.bn("bn1", n.conv("conv1", "images", 3, 8, bias=False), 8))
    y = n.op("relu2", Relu(), n.conv("conv2", x, 8, 16, 3, 2))
    y = n.conv("conv3", y, 16, 16)
    skip = n.op("slice", Slice(((0, None, 1), (0, None, 2), (0, None, 2), (0, None, 1))), x)
    skip = n.op("pad", Pad(((0, 0), (0, 0), (0, 0), (4, 4))), skip)
    x = n.op("relu3", Relu(), n.op("add", Add(), y, skip))
    return n.finish(n.linear("fc", n.op("pool", GlobalAvgPool(), x), 16, 7))


def vgg() -> Model:
    """Convolutions, pooling, then flattened images into linear layers."""
    n = Net(3)
    x = n.op("relu1", Relu(), n.bn("bn1", n.conv("features.0", "images", 3, 8), 8))
    x = n.op("max1", MaxPool((2, 2), (2, 2)), x)
    x = n.op("relu2", Relu(), n.conv("features.1", x, 8, 12))
    x = n.op("max2", MaxPool((2, 2), (2, 2)), x)
    x = n.op("flat", Flatten(), x)
    x = n.op("relu3", Relu(), n.linear("classifier.0", x, 192, 24))
    return n.finish(n.linear("classifier.1", x, 24, 5, bias=False))


def odd() -> Model:
    """Asymmetric padding, dilation, groups, both average poolings, a linear layer over pixels."""
    n = Net(4, size=15)
    x = n.conv("conv1", "images", 3, 8, 3, 2, padding=((0, 1), (1, 2)))
    x = n.op("relu1", Relu(6.0), x)
    x = n.conv("conv2", x, 8, 8, 3, groups=4, dilation=(2, 2), padding=((2, 2), (2, 2)))
    x = n.op("avg1", AvgPool((3, 3), (2, 2), ((1, 1), (0, 1)), count_padding=True), x)
    x = n.linear("mix", x, 8, 8)
    x = n.op("avg2", AvgPool((2, 2), (1, 1), ONE, count_padding=False), n.op("relu2", Relu(), x))
    x = n.op("shift", Pad(((0, 0), (1, 0), (0, 1), (0, 0)), 0.5), x)
    x = n.bn("lone", x, 8, affine=False)
    x = n.op("corner", Slice(((0, None, 1), (-1, None, -2), (1, 4, 1), (0, 8, 3))), x)
    x = n.op("relu3", Relu(), n.op("flat", Flatten(), x))
    return n.finish(n.linear("fc", x, 27, 4))


def extreme() -> Model:
    """A dead output channel, and a bias far larger than its weights."""
    n = Net(5)
    x = n.conv("conv1", "images", 3, 8)
    kernel, bias = n.params["conv1"]["kernel"], n.params["conv1"]["bias"]
    n.params["conv1"] = {
        "kernel": kernel.at[..., 2].set(0.0).at[..., 5].multiply(1e-9),
        "bias": bias.at[2].set(0.0).at[5].set(8.0),
    }
    x = n.op("relu1", Relu(), x)
    x = n.op("relu2", Relu(), n.conv("conv2", x, 8, 8))
    return n.finish(n.linear("fc", n.op("pool", GlobalAvgPool(), x), 8, 6))


NETS = {"residual": residual, "option_a": option_a, "vgg": vgg, "odd": odd, "extreme": extreme}


def images(model: Model, count: int = 8, seed: int = 0):
    """Normal images of the network's size."""
    return jax.random.normal(jax.random.key(seed), (count, *model.contract.shape))


@functools.cache
def quantized(
    net: str, scheme: str = "w8a8", layers: LayerPreset = "qdrop_8bit_ends"
) -> QuantizedModel:
    """A network of `NETS`, folded and calibrated on normal images."""
    model = fold_batch_norm(NETS[net]())
    plan = resolve(model.graph, parse_scheme(scheme), layers)
    entries = tuple((s, dataclasses.replace(spec, observer=MinMax())) for s, spec in plan.entries)
    return calibrate(model, dataclasses.replace(plan, entries=entries), images(model))


@functools.cache
def integer_file(net: str, scheme: str = "w8a8", layers: LayerPreset = "qdrop_8bit_ends") -> bytes:
    """The bytes of the quantized network as ONNX."""
    return serialize(quantized_onnx(quantized(net, scheme, layers)))
