"""Hand-built networks with realistic statistics, and a float64 NumPy evaluator to judge by."""

from collections.abc import Callable

import jax
import numpy as np
from numpy_ops import CURVES as CURVES
from numpy_ops import conv as conv
from numpy_ops import conv_transposed as conv_transposed
from numpy_ops import reference

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import (
    Activation,
    AdaptiveAvgPool,
    Add,
    AvgPool,
    BatchNorm,
    Clip,
    Concat,
    Constant,
    Conv2d,
    ConvTranspose2d,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    LeakyRelu,
    Linear,
    MatMul,
    MaxPool,
    Mul,
    Pad,
    PRelu,
    Reduce,
    Relu,
    Reshape,
    Resize,
    Scale,
    Slice,
    Softmax,
    Transpose,
)
from dfq_jax.types import InputContract

SAME = ((1, 1), (1, 1))

run = lambda model, x: evaluate(model, x)[0][0]
"""First output of a network, from a program for each operator, which tests share."""


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

    def constant(self, name, value) -> str:
        """A tensor of its own."""
        return self.op(name, Constant(), value=value)

    def upscale(self, name, x, cout, kernel=2, stride=2, groups=1, **how) -> str:
        """Transposed convolution with He-scaled weights and a bias."""
        cin = self.seen[x].shape[-1] // groups
        slots = {"kernel": self.rng.normal(size=(kernel, kernel, cin, cout)) * (2 / cin) ** 0.5}
        slots["bias"] = self.rng.normal(size=cout) * 0.2
        return self.op(name, ConvTranspose2d((stride, stride), groups=groups, **how), x, **slots)

    def norm(self, name, x, op=None) -> str:
        """Layer norm, or another norm with a scale and a bias."""
        c = self.seen[x].shape[-1]
        slots = {"scale": self.rng.uniform(0.5, 1.5, c), "bias": self.rng.normal(size=c) * 0.3}
        return self.op(name, op or LayerNorm(), x, **slots)

    def unit(self, name, x, cout, act=None, **how) -> str:
        """Convolution `name`, batch norm `name.bn` and an activation `name.act`."""
        x = self.bn(f"{name}.bn", self.conv(name, x, cout, **how))
        return self.op(f"{name}.act", act or Relu(), x)

    def shape(self, x) -> tuple[int, ...]:
        """Shape of one row of a tensor."""
        return self.seen[x].shape[1:]

    def part(self, name, x, first, last, axis=-1) -> str:
        """A slice along one axis."""
        bounds: list[tuple[int, int | None, int]] = [(0, None, 1)] * self.seen[x].ndim
        bounds[axis] = (first, last, 1)
        return self.op(name, Slice(tuple(bounds)), x)

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
            name: {slot: jax.device_put(np.float32(v)) for slot, v in slots.items()}
            for name, slots in self.params.items()
        }
        return Model(Graph(tuple(self.nodes), ("images",), outputs), params, (self.contract,))


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


def wide(seed: int = 0) -> Model:
    """Enough channels for a CPU to convolve by tiles."""
    b = Builder(InputContract(12, 12), seed)
    x = b.op("relu1", Relu(), b.bn("bn1", b.conv("conv1", "images", 32)))
    y = b.op("relu2", Relu(), b.bn("bn2", b.conv("conv2", x, 32)))
    x = b.op("relu3", Relu(), b.op("add", Add(), b.bn("bn3", b.conv("conv3", y, 32)), x))
    x = b.op("relu4", Relu(), b.bn("bn4", b.conv("conv4", x, 48, stride=2)))
    x = b.op("relu5", Relu(), b.bn("bn5", b.conv("conv5", x, 48)))
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


def dense(seed: int = 0) -> Model:
    """DenseNet: concatenations, batch norms that follow them, a transition, average pooling."""
    b = Builder(InputContract(8, 8), seed)
    x = b.unit("stem", "images", 4)
    for i in range(3):
        y = b.op(f"norm{i}.act", Relu(), b.bn(f"norm{i}", x))
        y = b.unit(f"squeeze{i}", y, 6, kernel=1)
        x = b.op(f"join{i}", Concat(3), x, b.conv(f"grow{i}", y, 3))
    x = b.op("norm3.act", Relu(), b.bn("norm3", x))
    x = b.op("halve", AvgPool((2, 2), (2, 2)), b.conv("transition", x, 6, kernel=1))
    x = b.op("norm4.act", Relu(), b.bn("norm4", x))
    return b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), x), 5))


def inception(seed: int = 0) -> Model:
    """Branches of different depths and pools, joined; adaptive pooling; flattening."""
    b = Builder(InputContract(9, 9), seed)
    x = b.unit("stem", "images", 4, stride=2, padding=((0, 0), (0, 0)))
    one = b.unit("one", x, 3, kernel=1)
    three = b.unit("three", b.unit("before", x, 3, kernel=1), 4)
    pooled = b.op("same", AvgPool((3, 3), (1, 1), SAME, count_padding=True), x)
    pooled = b.unit("after", pooled, 2, kernel=1)
    most = b.op("most", MaxPool((3, 3), (1, 1), SAME), x)
    x = b.op("join", Concat(3), one, three, pooled, most)
    x = b.op("even", AdaptiveAvgPool((3, 3)), b.unit("mix", x, 4, kernel=1))
    return b.done(b.linear("fc", b.op("flat", Flatten(), x), 5))


def shuffle(seed: int = 0) -> Model:
    """ShuffleNet: halves, a branch, concatenation, channels shuffled by reshaping."""
    b = Builder(InputContract(8, 8), seed)
    x = b.unit("stem", "images", 6)
    for i in range(2):
        left, right = b.part(f"left{i}", x, 0, 3), b.part(f"right{i}", x, 3, None)
        y = b.unit(f"enter{i}", right, 3, kernel=1)
        y = b.bn(f"depthwise{i}.bn", b.conv(f"depthwise{i}", y, 3, groups=3))
        y = b.unit(f"leave{i}", y, 3, kernel=1)
        x = b.op(f"join{i}", Concat(3), left, y)
        x = b.op(f"split{i}", Reshape((8, 8, 2, 3)), x)
        x = b.op(f"swap{i}", Transpose((0, 1, 2, 4, 3)), x)
        x = b.op(f"merge{i}", Reshape((8, 8, 6)), x)
    return b.done(b.linear("fc", b.op("pool", Reduce("mean", (1, 2)), x), 5))


def excite(seed: int = 0) -> Model:
    """Squeeze and excite: gates by sigmoid and hard sigmoid, SiLU and hard swish, a residual."""
    b = Builder(InputContract(8, 8), seed)
    x = b.unit("stem", "images", 4, Activation("hard_swish"))
    kinds = [(Activation("silu"), Activation("sigmoid"))]
    kinds += [(Activation("hard_swish"), Activation("hard_sigmoid"))]
    for i, (act, gate) in enumerate(kinds):
        y = b.unit(f"expand{i}", x, 8, act, kernel=1)
        y = b.unit(f"depthwise{i}", y, 8, act, groups=8)
        g = b.op(f"pool{i}", GlobalAvgPool(keepdims=True), y)
        g = b.op(f"reduce{i}.act", Relu(), b.conv(f"reduce{i}", g, 3, kernel=1, bias=True))
        g = b.op(f"gate{i}", gate, b.conv(f"restore{i}", g, 8, kernel=1, bias=True))
        y = b.op(f"excite{i}", Mul(), y, g)
        x = b.op(f"add{i}", Add(), b.bn(f"project{i}.bn", b.conv(f"project{i}", y, 4, 1)), x)
    return b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), x), 5))


def vit(seed: int = 0) -> Model:
    """A vision transformer of two blocks with two heads, four patches and a class token."""
    b = Builder(InputContract(8, 8), seed)
    x = b.conv("patches", "images", 8, kernel=4, stride=4, padding=((0, 0), (0, 0)), bias=True)
    x = b.op("tokens", Reshape((4, 8)), x)
    x = b.op("joined", Concat(1), b.constant("token", b.rng.normal(size=(1, 1, 8))), x)
    x = b.op("placed", Add(), x, b.constant("places", b.rng.normal(size=(1, 5, 8)) * 0.3))
    for i in range(2):
        x = b.op(f"attended{i}", Add(), x, attention(b, f"attention{i}", b.norm(f"before{i}", x)))
        y = b.linear(f"wide{i}", b.norm(f"between{i}", x), 16)
        y = b.linear(f"narrow{i}", b.op(f"gelu{i}", Activation("gelu"), y), 8)
        x = b.op(f"block{i}", Add(), x, y)
    x = b.op("first", Reshape((8,)), b.part("cut", b.norm("last", x), 0, 1, axis=1))
    return b.done(b.linear("head", x, 5))


def attention(b: Builder, name: str, x: str) -> str:
    """Attention with two heads among five tokens of width eight."""
    x = b.op(f"{name}.heads", Reshape((5, 3, 2, 4)), b.linear(f"{name}.qkv", x, 24))
    x = b.op(f"{name}.order", Transpose((0, 2, 3, 1, 4)), x)
    q, k, v = (
        b.op(f"{name}.{part}", Reshape((2, 5, 4)), b.part(f"{name}.{part}.cut", x, i, i + 1, 1))
        for i, part in enumerate("qkv")
    )
    scores = b.op(f"{name}.scores", MatMul(True), b.op(f"{name}.scaled", Scale(0.5), q), k)
    x = b.op(f"{name}.values", MatMul(), b.op(f"{name}.weights", Softmax(), scores), v)
    x = b.op(f"{name}.back", Transpose((0, 2, 1, 3)), x)
    return b.linear(f"{name}.out", b.op(f"{name}.flat", Reshape((5, 8)), x), 8)


def convnext(seed: int = 0) -> Model:
    """ConvNeXt: layer norms, wide depthwise convolutions, GELU, layer scale, a downsampling."""
    b = Builder(InputContract(8, 8), seed)
    nothing = ((0, 0), (0, 0))
    x = b.conv("stem", "images", 4, kernel=2, stride=2, padding=nothing, bias=True)
    x = b.norm("stem.norm", x)
    for i in range(3):
        if i == 2:
            x = b.norm("down.norm", x)
            x = b.conv("down", x, 4, kernel=2, stride=2, padding=nothing, bias=True)
        y = b.norm(f"norm{i}", b.conv(f"depthwise{i}", x, 4, kernel=7, groups=4, bias=True))
        y = b.op(f"gelu{i}", Activation("gelu"), b.linear(f"wide{i}", y, 12))
        gain = b.constant(f"gain{i}", b.rng.uniform(0.2, 0.6, (1, 1, 1, 4)))
        y = b.op(f"scaled{i}", Mul(), gain, b.linear(f"narrow{i}", y, 4))
        x = b.op(f"add{i}", Add(), y, x)
    x = b.norm("last", b.op("pool", GlobalAvgPool(), x))
    return b.done(b.linear("fc", x, 5))


def unet(seed: int = 0) -> Model:
    """A U-Net of three scales: transposed convolution, resizing, concatenation; scores a pixel."""
    b = Builder(InputContract(8, 8), seed)
    fine = b.unit("fine", "images", 4, LeakyRelu(0.1))
    middle = b.unit("middle", b.op("pool1", MaxPool((2, 2), (2, 2)), fine), 6)
    low = b.unit("low", b.op("pool2", MaxPool((2, 2), (2, 2)), middle), 8)
    up = b.op("up1.act", Relu(), b.bn("up1.bn", b.upscale("up1", low, 6)))
    x = b.unit("mix1", b.op("join1", Concat(3), up, middle), 6)
    up = b.op("up2", Resize((8, 8), (2.0, 2.0), "bilinear", "half_pixel"), x)
    x = b.unit("mix2", b.op("join2", Concat(3), up, fine), 4)
    up = b.upscale("up3", x, 4, kernel=3, stride=1, groups=2, padding=SAME)
    return b.done(b.conv("scores", up, 3, kernel=1, bias=True))


def two_heads(seed: int = 0) -> Model:
    """One trunk, classes and a number; channels padded, PReLU, a hard limit."""
    b = Builder(InputContract(6, 6), seed)
    x = b.bn("stem.bn", b.conv("stem", "images", 4, stride=2))
    x = b.op("stem.act", PRelu(), x, slope=b.rng.uniform(0.1, 0.3, 4))
    x = b.op("limit", Clip(-1.0, 4.0), b.bn("conv.bn", b.conv("conv", x, 5)))
    x = b.op("pool", GlobalAvgPool(), x)
    return b.done(b.linear("classes", x, 5), b.linear("number", x, 1))


MODERN = (dense, inception, shuffle, excite, vit, convnext, unet, two_heads)
"""Networks of every structure the library knows beside plain residual ones."""


def images(model: Model, count: int = 6, seed: int = 0):
    """Normal images of the network's size."""
    return jax.random.normal(jax.random.key(seed), (count, *model.contract.shape))
