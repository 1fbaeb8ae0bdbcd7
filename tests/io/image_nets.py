"""Small ONNX networks of images, channels first or last, with sizes that may be free."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LAST = (1, 12, 10, 3)
"""An image with its channels last."""
FIRST = (1, 3, 12, 10)
"""The same with its channels first."""


class ImageNet:
    """A network that is written node by node.

    Args:
      shape: of its input; names stand for free sizes.
    """

    def __init__(self, shape: tuple[int | str | None, ...] = FIRST) -> None:
        self.rng, self.shape = np.random.default_rng(0), shape
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, values: Any) -> str:
        """A constant."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def add(self, kind: str, *inputs: str, **how: Any) -> str:
        """A node; its output."""
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **how))
        return name

    def conv(self, x: str, cin: int, cout: int, **how: Any) -> str:
        """A convolution of 3x3, a batch norm with statistics, ReLU."""
        normal = lambda *shape: self.rng.normal(size=shape).astype(np.float32)
        kernel = self.weight(normal(cout, cin, 3, 3) * np.float32(0.3))
        x = self.add("Conv", x, kernel, **{"pads": [1] * 4, "strides": [2, 2]} | how)
        positive = [self.weight(np.abs(normal(cout)) + np.float32(0.5)) for _ in range(2)]
        shift = [self.weight(normal(cout) * np.float32(0.2)) for _ in range(2)]
        norm = (positive[0], shift[0], shift[1], positive[1])
        return self.add("Relu", self.add("BatchNormalization", x, *norm))

    def classes(self, x: str, channels: int) -> str:
        """Scores of five classes."""
        flat = self.add("Flatten", self.add("GlobalAveragePool", x))
        kernel = self.weight(self.rng.normal(size=(5, channels)).astype(np.float32))
        return self.add("Gemm", flat, kernel, transB=1)

    def proto(self, *outputs: str, facts: dict[str, str] | None = None) -> onnx.ModelProto:
        """The finished network."""
        value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        graph = helper.make_graph(
            self.nodes,
            "net",
            [value("x", self.shape)],
            [value(name, None) for name in outputs],
            self.weights,
        )
        imports = [helper.make_opsetid("", 17)]
        proto = helper.make_model(graph, opset_imports=imports, ir_version=8)
        helper.set_model_props(proto, facts or {})
        return onnx.shape_inference.infer_shapes(proto)


def classifier(shape: tuple[int | str | None, ...] = FIRST, facts: Any = None) -> onnx.ModelProto:
    """A classifier of images, channels last if `shape` ends in three."""
    net = ImageNet(shape)
    x = net.add("Transpose", "x", perm=[0, 3, 1, 2]) if shape[-1] == 3 else "x"
    x = net.conv(net.conv(x, 3, 8), 8, 8)
    return net.proto(net.classes(x, 8), facts=facts)
