"""Ids of tokens as rows of zeros and a one: found, and looked up in the kernels behind them."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import Linear
from dfq_jax.graph.token_ops import Embed
from dfq_jax.io.importing.one_hot import MOST, counted
from dfq_jax.io.load import load
from dfq_jax.types import Tokens

pytestmark = pytest.mark.onnx
RNG = np.random.default_rng(0)
IDS, SIZE = 7, 5
node = helper.make_node


def saved(path, nodes, shape=(1, 6), **weights):
    """A file that reads ids `x`, has rows of ones and zeros `hot` made, and scores them."""
    stored = {
        "w": RNG.normal(size=(IDS, SIZE)).astype(np.float32),
        "ends": np.array([1]),
        **weights,
    }
    value = lambda name, kind, s: helper.make_tensor_value_info(name, kind, s)
    graph = helper.make_graph(
        [*nodes, node("MatMul", ["hot", "w"], ["m"]), node("ReduceMean", ["m"], ["y"], axes=[1])],
        "g",
        [value("x", TensorProto.INT32, shape)],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def compared(numbers, repeated=False):
    """`hot` by comparison with a constant, the ids repeated before or broadcast."""
    size = np.array([1, 6, IDS])
    nodes = [node("Unsqueeze", ["x", "last"], ["u"])]
    nodes += [node("Expand", ["u", "size"], ["e"])] if repeated else []
    nodes += [node("Equal", ["e" if repeated else "u", "numbers"], ["q"])]
    nodes += [node("Cast", ["q"], ["hot"], to=TensorProto.FLOAT)]
    return nodes, {"last": np.array([2]), "size": size, "numbers": np.asarray(numbers, np.int32)}


def marked(values=(0.0, 1.0), depth=IDS):
    """`hot` by the operator."""
    nodes = [node("OneHot", ["x", "depth", "values"], ["hot"], axis=-1)]
    return nodes, {"depth": np.array(depth), "values": np.asarray(values, np.float32)}


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [compared(np.arange(IDS)), compared(np.arange(IDS)[None, None], repeated=True), marked()],
    ids=["broadcast", "repeated", "operator"],
)
def test_rows_with_a_one_are_looked_up_in_the_next_kernel(nodes, weights, tmp_path):
    """`load` compares what it made with the file in ONNX Runtime."""
    model = load(saved(tmp_path / "net.onnx", nodes, **weights)).model
    assert model.inputs == (Tokens(6, IDS),)
    kinds = [type(n.op) for n in model.graph.nodes]
    assert Linear not in kinds
    assert kinds.count(Embed) == 1
    (table,) = (model.params[n.name]["table"] for n in model.graph.nodes if n.op == Embed())
    assert table.shape == (IDS, SIZE)


def test_other_values_than_zero_and_one_stay_what_they_are(tmp_path):
    nodes, weights = marked(values=(-1.0, 3.0))
    model = load(saved(tmp_path / "net.onnx", nodes, **weights)).model
    assert model.inputs == (Tokens(6, IDS),)
    assert any(n.op == Linear() for n in model.graph.nodes)


@pytest.mark.parametrize("numbers", [np.arange(IDS) + 1, np.arange(IDS)[::-1]])
def test_other_comparisons_with_many_numbers_are_refused(numbers, tmp_path):
    nodes, weights = compared(numbers.copy())
    with pytest.raises(UnsupportedModelError, match="other numbers than 0 and 1"):
        load(saved(tmp_path / "net.onnx", nodes, **weights))


def test_more_ids_than_rows_are_made_for_are_refused(tmp_path):
    nodes, weights = marked(depth=MOST + 1)
    wide = np.zeros((MOST + 1, 2), np.float32)
    with pytest.raises(UnsupportedModelError, match=f"up to {MOST}"):
        load(saved(tmp_path / "net.onnx", nodes, **weights, w=wide))


def test_counting_runs_along_one_axis():
    line = np.arange(4)
    assert counted(line) == 0
    assert counted(np.tile(line, (3, 1))) == 1
    assert counted(np.tile(line[:, None], (1, 3))) == 0
    assert counted(line + 1) is counted(line[:2]) is counted(np.zeros(4)) is None
