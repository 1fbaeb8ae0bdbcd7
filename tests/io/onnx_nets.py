"""Small random networks that exercise every operator and shape of edge."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import onnx

from dfq_jax.graph.graph import Graph, Model, Node
from dfq_jax.graph.ops import (
    Activation,
    AdaptiveAvgPool,
    Add,
    AvgPool,
    BatchNorm,
    Concat,
    Constant,
    Conv2d,
    ConvTranspose2d,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    LayerNorm,
    LeakyRelu,
    Linear,
    MatMul,
    Maximum,
    MaxPool,
    Mul,
    Pad,
    Power,
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
from dfq_jax.io.onnx.export import quantized_onnx, serialize
from dfq_jax.io.runtime.session import feed, open_session
from dfq_jax.numerics.ranges import MinMax
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import LayerPreset, Store, parse_scheme, resolve, stored_as
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.types import InputContract

ONE = ((1, 1), (1, 1))
NO = ((0, 0), (0, 0))


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

    def constant(self, name, *shape: int, scale: float = 1.0) -> str:
        self.params[name] = {"value": self.normal(1, *shape, scale=scale)}
        return self.op(name, Constant())

    def norm(self, name, op, x, chan) -> str:
        self.params[name] = {"scale": self.normal(chan) ** 2 + 0.3, "bias": self.normal(chan)}
        return self.op(name, op, x)

    def upconv(self, name, x, cin, cout, groups=1) -> str:
        self.params[name] = {
            "kernel": self.normal(2, 2, cin // groups, cout, scale=(groups / cin) ** 0.5),
            "bias": self.normal(cout, scale=0.3),
        }
        return self.op(name, ConvTranspose2d((2, 2), groups=groups), x)

    def linear(self, name, x, cin, cout, bias=True) -> str:
        self.params[name] = {"kernel": self.normal(cin, cout, scale=cin**-0.5)}
        if bias:
            self.params[name]["bias"] = self.normal(cout, scale=0.3)
        return self.op(name, Linear(), x)

    def finish(self, *outputs: str) -> Model:
        graph = Graph(tuple(self.nodes), ("images",), outputs)
        return Model(graph, self.params, (self.contract,))


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


def squeeze() -> Model:
    """Two gates: over pooled pixels by 1x1 convolutions, and over vectors by linear layers."""
    n = Net(6)
    x = n.op("relu1", Relu(), n.conv("conv1", "images", 3, 8))
    g = n.op("pool1", GlobalAvgPool(keepdims=True), x)
    g = n.op("relu2", Relu(), n.conv("down1", g, 8, 4, 1))
    g = n.op("gate1", Activation("hard_sigmoid"), n.conv("up1", g, 4, 8, 1))
    x = n.op("gated1", Mul(), g, x)
    x = n.op("swish", Activation("silu"), n.conv("conv2", x, 8, 12, stride=2))
    g = n.op("relu3", Relu(), n.linear("down2", n.op("pool2", GlobalAvgPool(), x), 12, 4))
    g = n.op("gate2", Activation("sigmoid"), n.linear("up2", g, 4, 12))
    x = n.op("gated2", Mul(), x, n.op("spread", Reshape((1, 1, 12)), g))
    x = n.op("pool3", GlobalAvgPool(), n.conv("conv3", x, 12, 12))
    return n.finish(n.linear("fc", x, 12, 5))


def convnext() -> Model:
    """Channels-last norms and linear layers between depthwise convolutions, scaled branches."""
    n = Net(7)
    x = n.norm("norm0", LayerNorm(1e-6), n.conv("stem", "images", 3, 12, 4, 4, padding=NO), 12)
    for i in (1, 2):
        y = n.conv(f"depthwise{i}", x, 12, 12, 3, groups=12)
        y = n.norm(f"norm{i}", LayerNorm(1e-6), y, 12)
        y = n.op(f"gelu{i}", Activation("gelu"), n.linear(f"wide{i}", y, 12, 24))
        y = n.linear(f"narrow{i}", y, 24, 12)
        y = n.op(f"branch{i}", Mul(), n.constant(f"gamma{i}", 1, 1, 12, scale=0.5), y)
        x = n.op(f"add{i}", Add(), x, y)
    x = n.norm("norm3", LayerNorm(1e-6), n.op("pool", GlobalAvgPool(), x), 12)
    return n.finish(n.linear("fc", x, 12, 5))


def transformer() -> Model:
    """Patches, a class token, positions, attention of two heads, a class read from its token."""
    n = Net(8)
    x = n.op("patches", Reshape((16, 12)), n.conv("embed", "images", 3, 12, 4, 4, padding=NO))
    x = n.op("joined", Concat(1), n.constant("token", 1, 12), x)
    x = n.op("placed", Add(), x, n.constant("position", 17, 12, scale=0.2))
    y = n.norm("norm1", LayerNorm(1e-6), x, 12)
    heads = {}
    for name in ("query", "key", "value"):
        h = n.op(f"{name}.split", Reshape((17, 2, 6)), n.linear(name, y, 12, 12))
        heads[name] = n.op(f"{name}.heads", Transpose((0, 2, 1, 3)), h)
    y = n.op("scores", MatMul(transposed=True), heads["query"], heads["key"])
    y = n.op("biased", Add(), n.op("scaled", Scale(6**-0.5), y), n.constant("bias", 2, 17, 17))
    y = n.op("mixed", MatMul(), n.op("attention", Softmax(), y), heads["value"])
    y = n.op("merged", Reshape((17, 12)), n.op("turned", Transpose((0, 2, 1, 3)), y))
    x = n.op("add1", Add(), x, n.linear("project", y, 12, 12))
    y = n.linear("mlp.wide", n.norm("norm2", LayerNorm(1e-6), x, 12), 12, 24)
    y = n.linear("mlp.narrow", n.op("gelu", Activation("gelu_tanh"), y), 24, 12)
    x = n.norm("norm3", LayerNorm(1e-6), n.op("add2", Add(), x, y), 12)
    x = n.op("class", Slice(((0, None, 1), (0, 1, 1), (0, None, 1))), x)
    return n.finish(n.linear("fc", n.op("flat", Flatten(), x), 12, 5))


def dense() -> Model:
    """Concatenation, then batch norms that no convolution can take up."""
    n = Net(9)
    x = n.conv("conv0", "images", 3, 8)
    for i in (1, 2):
        chan = 4 + 4 * i
        y = n.op(f"relu{i}", Relu(), n.bn(f"bn{i}", x, chan))
        x = n.op(f"cat{i}", Concat(3), x, n.conv(f"conv{i}", y, chan, 4))
    x = n.op("relu3", Relu(), n.bn("bn3", x, 16))
    x = n.op("flat", Flatten(), n.op("pool", AdaptiveAvgPool((3, 3)), x))
    return n.finish(n.linear("fc", x, 144, 5))


def shuffle() -> Model:
    """Grouped convolutions, halves of channels, channels shuffled."""
    n = Net(10)
    x = n.op("relu1", Relu(), n.conv("conv1", "images", 3, 8))
    half = lambda name, a, b: n.op(name, Slice((*((0, None, 1),) * 3, (a, b, 1))), x)
    left, right = half("left", 0, 4), half("right", 4, None)
    right = n.op("prelu", PRelu(), n.conv("conv2", right, 4, 4, groups=2))
    n.params["prelu"] = {"slope": n.normal(4, scale=0.3)}
    x = n.op("split", Reshape((16, 16, 2, 4)), n.op("cat", Concat(-1), left, right))
    x = n.op("joined", Reshape((16, 16, 8)), n.op("shuffled", Transpose((0, 1, 2, 4, 3)), x))
    x = n.op("maximum", Maximum(), n.conv("conv3", x, 8, 8), n.op("leaky", LeakyRelu(0.1), x))
    return n.finish(n.linear("fc", n.op("pool", GlobalAvgPool(), x), 8, 5))


def unet() -> Model:
    """Down and up again, two ways, with skips; a map of classes and one of depths."""
    n = Net(11)
    top = n.op("relu1", Relu(), n.conv("conv1", "images", 3, 8))
    x = n.op("relu2", Relu(), n.conv("conv2", n.op("down1", MaxPool((2, 2), (2, 2)), top), 8, 12))
    low = n.op("relu3", Relu(), n.conv("conv3", n.op("down2", MaxPool((2, 2), (2, 2)), x), 12, 16))
    up = n.op("relu4", Relu(), n.upconv("up1", low, 16, 12))
    x = n.norm("group", GroupNorm(3), n.conv("conv4", n.op("cat1", Concat(3), up, x), 24, 12), 12)
    x = n.op("up2", Resize((16, 16), (2.0, 2.0), "bilinear", "half_pixel"), n.op("r", Relu(), x))
    x = n.op("relu5", Relu(), n.conv("conv5", n.op("cat2", Concat(3), x, top), 20, 8))
    wide = n.op("up3", Resize((16, 16), (4.0, 4.0)), low)
    depth = n.conv(
        "depth", n.upconv("up4", n.op("half", AvgPool((2, 2), (2, 2)), wide), 16, 8, 2), 8, 1
    )
    return n.finish(n.conv("classes", x, 8, 4, 1), depth)


def windows() -> Model:
    """Attention inside windows of an image, and images of tokens back to convolutions."""
    n = Net(12)
    x = n.conv("embed", "images", 3, 8, 2, 2, padding=NO)
    y = n.norm("norm1", LayerNorm(), x, 8)
    y = n.op("cut", Reshape((2, 4, 2, 4, 8)), y)
    y = n.op("grouped", Transpose((0, 1, 3, 2, 4, 5)), y)
    y = n.op("tokens", Reshape((4, 16, 8)), y)
    score = n.op("scores", MatMul(transposed=True), y, n.linear("key", y, 8, 8))
    y = n.op("mixed", MatMul(), n.op("attention", Softmax(-1), score), y)
    y = n.op("cut2", Transpose((0, 1, 3, 2, 4, 5)), n.op("r2", Reshape((2, 2, 4, 4, 8)), y))
    x = n.op("add", Add(), x, n.linear("project", n.op("whole", Reshape((8, 8, 8)), y), 8, 8))
    y = n.op("chw", Reshape((8, 64)), n.op("first", Transpose((0, 3, 1, 2)), x))
    y = n.op("hwc", Transpose((0, 2, 3, 1)), n.op("again", Reshape((8, 8, 8)), y))
    x = n.op("relu", Relu(), n.conv("conv", y, 8, 8))
    x = n.op("power", Power(2.0), n.op("mean", Reduce("mean", (1, 2)), x))
    return n.finish(n.linear("fc", x, 8, 5))


COMPOSITES = {
    "squeeze": squeeze,
    "convnext": convnext,
    "transformer": transformer,
    "dense": dense,
    "shuffle": shuffle,
    "unet": unet,
    "windows": windows,
}
NETS = {
    "residual": residual,
    "option_a": option_a,
    "vgg": vgg,
    "odd": odd,
    "extreme": extreme,
    **COMPOSITES,
}


def run_file(data: bytes, x, *, optimize: bool) -> list[np.ndarray]:
    """Every output of a file, in the library's layout."""
    session = open_session(data, optimize=optimize, precise=True)
    found = session.run(None, feed(session, x))
    return [y.transpose(0, 2, 3, 1) if y.ndim == 4 else y for y in found]


def kinds(proto: onnx.ModelProto) -> collections.Counter:
    """How often each operator occurs in a file."""
    return collections.Counter(n.op_type for n in proto.graph.node)


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
def integer_file(
    net: str,
    scheme: str = "w8a8",
    layers: LayerPreset = "qdrop_8bit_ends",
    store: Store = "packed",
) -> bytes:
    """The bytes of the quantized network as ONNX."""
    made = quantized(net, scheme, layers)
    return serialize(quantized_onnx(dataclasses.replace(made, plan=stored_as(made.plan, store))))
