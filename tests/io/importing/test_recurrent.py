"""LSTM, GRU and plain recurrent layers: imported from PyTorch and ONNX, written as ONNX."""

from typing import Any

import numpy as np
import pytest

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import Recurrent

torch = pytest.importorskip("torch")
nn = torch.nn
pytestmark = pytest.mark.torch

LAYERS: dict[str, tuple[type, dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm both ways": (nn.LSTM, {"bidirectional": True}),
    "lstm of two layers both ways": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "lstm without biases": (nn.LSTM, {"bias": False}),
    "gru": (nn.GRU, {"num_layers": 2}),
    "gru both ways": (nn.GRU, {"bidirectional": True}),
    "rnn": (nn.RNN, {"bidirectional": True}),
    "rnn of relu": (nn.RNN, {"nonlinearity": "relu"}),
}


class Reader(nn.Module):
    """A line recogniser: convolution, a recurrent layer over the columns, scores for each."""

    def __init__(self, layer: Any, out: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.layer, self.scores = layer, nn.Linear(out, 5)

    def forward(self, x: Any) -> Any:
        y = self.norm(self.conv(x)).relu().flatten(1, 2)
        rows = y.transpose(1, 2) if self.layer.batch_first else y.permute(2, 0, 1)
        rows = self.scores(self.layer(rows)[0])
        return rows if self.layer.batch_first else rows.transpose(0, 1)


def reader(name: str, batch_first: bool) -> Any:
    torch.manual_seed(0)
    kind, options = LAYERS[name]
    layer = kind(8, 6, batch_first=batch_first, **options)
    return Reader(layer, 12 if options.get("bidirectional") else 6)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_line_recogniser(kit, name, batch_first):
    graph = kit.agree(reader(name, batch_first), (1, 4, 7))
    count = 2 if "two layers" in name or name == "gru" else 1
    ways = 2 if "both" in name or name == "rnn" else 1
    assert sum(isinstance(n.op, Recurrent) for n in graph.nodes) == count * ways


@pytest.mark.parametrize("route", [(4, None), (None, None), (1, 17), (None, 17), (1, "core")])
def test_any_batch_and_exporter(kit, route):
    kit.agree(reader("lstm both ways", batch_first=False), (1, 4, 7), route)
    kit.agree(reader("gru", batch_first=True), (1, 4, 7), route)


@pytest.mark.parametrize("name", ["lstm of two layers both ways", "gru both ways", "rnn"])
def test_the_last_state(kit, name):
    layer = reader(name, batch_first=True).layer

    def function(x: Any) -> Any:
        found = layer(x)[1]
        return (found[0] if isinstance(found, tuple) else found).transpose(0, 1).flatten(1)

    kit.agree(function, (3, 8))


@pytest.mark.parametrize("route", [(1, None), (4, None)], ids=str)
@pytest.mark.parametrize("name", ["lstm", "lstm of two layers both ways"])
def test_what_an_lstm_remembers(kit, name, route):
    layer = reader(name, batch_first=True).layer

    def function(x: Any) -> Any:
        rows, (shown, kept) = layer(x)
        return rows.mean(1), (shown - kept).transpose(0, 1).flatten(1), kept[-1]

    graph = kit.agree(function, (3, 8), route)
    cells = [n.op for n in graph.nodes if isinstance(n.op, Recurrent)]
    assert sum(not op.remembers for op in cells) == sum(op.remembers for op in cells)
    alone = kit.agree(lambda x: layer(x)[0], (3, 8), route)
    assert not any(isinstance(n.op, Recurrent) and n.op.remembers for n in alone.nodes)


def test_a_single_step(kit):
    layer = reader("lstm", batch_first=True).layer
    kit.agree(lambda x: layer(x)[0], (1, 8))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda layer, x: layer(x, (torch.ones(1, 1, 6), torch.ones(1, 1, 6)))[0], "first state"),
    ],
)
def test_what_is_not_available_is_refused(kit, function, message):
    layer = reader("lstm", batch_first=True).layer
    with pytest.raises(UnsupportedModelError, match=message):
        kit.imported(lambda x: function(layer, x), (3, 8))


CELLS = [("GRU", {"linear_before_reset": 0}), ("GRU", {"linear_before_reset": 1}), ("LSTM", {})]


@pytest.mark.parametrize(("kind", "attributes"), CELLS)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_layers_of_onnx_as_its_runtime_has_them(kit, direction, kind, attributes):
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from dfq_jax.io.frontends.graph_files import prepared
    from dfq_jax.io.frontends.onnx_graph import read_onnx_program
    from dfq_jax.io.importing.engine import import_program
    from dfq_jax.io.importing.onnx_table import ONNX

    rng, ways = np.random.default_rng(0), 2 if direction == "bidirectional" else 1
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    rows, ends = {"GRU": (18, ["h"]), "LSTM": (24, ["h", "c"])}[kind]
    weights = {"w": draw(ways, rows, 5), "r": draw(ways, rows, 6), "b": draw(ways, 2 * rows)}
    make, h = onnx.helper.make_node, onnx.helper
    nodes = [
        make("Transpose", ["x"], ["t"], perm=[2, 0, 1]),
        make(kind, ["t", *weights], ["y", *ends], hidden_size=6, direction=direction, **attributes),
        make("Transpose", ["y"], ["z"], perm=[2, 1, 3, 0]),
        *(make("Transpose", [end], [f"last {end}"], perm=[1, 0, 2]) for end in ends),
    ]
    info = lambda name, shape: h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    values = [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()]
    outputs = [info(name, None) for name in ("z", *(f"last {end}" for end in ends))]
    graph = h.make_graph(nodes, "g", [info("x", [1, 5, 4])], outputs, values)
    data = h.make_model(
        graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()
    x = draw(1, 5, 4)
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    found = import_program(prepared(read_onnx_program(data, "net.onnx", None)), ONNX)
    for got, wanted in zip(kit.outputs_of(found, x), session.run(None, {"x": x}), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
