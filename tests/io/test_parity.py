"""An import is refused where it computes something else than its file does in ONNX Runtime."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import dfq_jax as dfq
from dfq_jax.cli.app import main
from dfq_jax.errors import ImportParityError, UnsupportedOpError
from dfq_jax.graph.ops import LeakyRelu
from dfq_jax.io.frontends.parity import difference
from dfq_jax.io.importing import onnx_ops, onnx_table
from dfq_jax.io.load import load

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.onnx

RNG = np.random.default_rng(0)
node = helper.make_node


def written(path: Path, nodes: list, shape: Any = (1, 3, 6, 5), dtype: Any = np.float32, **weights):
    """A file that reads `x` and returns `y`, and its notes when it is read."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    value = lambda name, sizes: helper.make_tensor_value_info(name, kind, sizes)
    stored = [numpy_helper.from_array(np.asarray(v, dtype), k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "g", [value("x", shape)], [value("y", None)], stored)
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def convolution(path: Path, shape: Any = (1, 3, 6, 5), dtype: Any = np.float32) -> Path:
    """A convolution and a leaky ReLU."""
    nodes = [node("Conv", ["x", "w"], ["a"]), node("LeakyRelu", ["a"], ["y"], alpha=0.3)]
    kernel = RNG.normal(size=(4, 3, *(2,) * (len(shape) - 2)))
    return written(path, nodes, shape, dtype, w=kernel)


def notes(path: Path, **options: Any) -> tuple[str, ...]:
    """What reading it says about the check."""
    return tuple(n for n in load(path, **options).notes if "checked" in n)


@pytest.mark.parametrize("shape", [(1, 3, 6, 5), ("n", 3, 6, 5), (2, 3, 6, 5), (1, 3, 7)])
def test_what_computes_the_same_is_taken_without_a_word(shape, tmp_path):
    assert notes(convolution(tmp_path / "net.onnx", shape)) == ()


def test_the_precision_of_the_file_is_allowed_for(tmp_path):
    assert notes(convolution(tmp_path / "net.onnx", dtype=np.float16)) == ()
    double = written(tmp_path / "net.onnx", [node("Sigmoid", ["x"], ["y"])], dtype=np.float64)
    assert notes(double) == ()


def test_features_are_no_image(tmp_path):
    path = written(tmp_path / "net.onnx", [node("Sigmoid", ["x"], ["y"])], (1, 7))
    assert notes(path) == ()


def test_an_operator_read_wrongly_is_refused(tmp_path, monkeypatch, capsys):
    path = convolution(tmp_path / "net.onnx")
    wrong = lambda b, x, alpha=0.01: onnx_ops.pointwise.mapped(b, LeakyRelu(0.28), x)
    monkeypatch.setitem(onnx_table.LOWER, "LeakyRelu", wrong)
    message = r"net\.onnx: .*output 'y' is .* apart of .*another opset.*`unchecked=True`"
    with pytest.raises(ImportParityError, match=message):
        dfq.load(path)
    assert notes(path, unchecked=True) == ()
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(path)])
    assert stopped.value.code == ImportParityError.exit_code
    assert "does not compute what the file computes" in capsys.readouterr().err


def test_a_result_of_another_shape_is_refused(tmp_path, monkeypatch):
    path = written(tmp_path / "net.onnx", [node("ReduceMean", ["x"], ["y"], axes=[2], keepdims=0)])
    wrong = partial(onnx_table.LOWER["ReduceMean"], axes=(3,))
    monkeypatch.setitem(onnx_table.LOWER, "ReduceMean", lambda b, x, axes, keepdims: wrong(b, x))
    with pytest.raises(ImportParityError, match=r"has shape \(1, 1, 3, 6\)|has shape"):
        load(path)


@pytest.mark.parametrize("how", [{"axis": 1}, {"axis": 1, "keepdims": 0}, {"axis": -1}])
def test_networks_that_choose_in_the_end_return_their_scores(how, tmp_path, monkeypatch):
    nodes = [node("Neg", ["x"], ["scores"]), node("ArgMax", ["scores"], ["i"], **how)]
    path = written(tmp_path / "net.onnx", [*nodes, node("Cast", ["i"], ["y"], to=6)], (1, 9, 8, 7))
    told = onnx.load(path)
    told.graph.output[0].type.tensor_type.elem_type = 6
    onnx.save(told, path)
    found = load(path)
    assert next(n for n in found.notes if "ArgMax" in n).startswith(
        "output 'y' is the ArgMax of 'sc"
    )
    assert notes(path) == ()
    assert found.model.graph.nodes[-1].name == found.model.graph.outputs[0]
    monkeypatch.setitem(onnx_table.LOWER, "Neg", onnx_ops.relu)
    with pytest.raises(ImportParityError, match="its values"):
        load(path)


def test_an_index_that_the_network_reads_is_refused(tmp_path):
    nodes = [node("ArgMax", ["x"], ["i"], axis=1), node("Cast", ["i"], ["f"], to=1)]
    path = written(tmp_path / "net.onnx", [*nodes, node("Add", ["x", "f"], ["y"])])
    with pytest.raises(UnsupportedOpError, match=r"onnx\.ArgMax"):
        load(path)


def test_chaos_is_no_fault_of_the_import(tmp_path):
    nodes = [node("Sigmoid", ["x"], ["v0"])]
    for i in range(30):  # the logistic map
        nodes.append(node("Sub", ["one", f"v{i}"], [f"a{i}"]))
        nodes.append(node("Mul", [f"a{i}", f"v{i}"], [f"b{i}"]))
        nodes.append(node("Mul", [f"b{i}", "rate"], [f"v{i + 1}" if i < 29 else "y"]))
    assert notes(written(tmp_path / "net.onnx", nodes, one=1.0, rate=3.97)) == ()


def test_a_file_that_cannot_be_run_is_said_to_be_unchecked(tmp_path):
    nodes = [node("Relu", ["x"], ["a"], name="same"), node("Neg", ["a"], ["y"], name="same")]
    (note,) = notes(written(tmp_path / "net.onnx", nodes))
    assert note.startswith("the import is not checked against its source: ONNX Runtime")
    assert "same node name" in note


def test_without_the_runtime_nothing_is_checked(tmp_path, monkeypatch):
    import dfq_jax.io.runtime.session

    def missing() -> None:
        raise ImportError("this needs ONNX Runtime")

    monkeypatch.setattr(dfq_jax.io.runtime.session, "onnxruntime", missing)
    (note,) = notes(convolution(tmp_path / "net.onnx"))
    assert note == "the import is not checked against its source: this needs ONNX Runtime"


def test_differences_are_judged_by_the_scale_of_the_output_and_by_its_answer():
    theirs = RNG.normal(size=(1, 4000)).astype(np.float32)
    small = lambda size: theirs + np.float32(size) * RNG.choice((-1, 1), size=theirs.shape)
    assert difference(small(1e-5), theirs, theirs, 1e-6) == ""
    assert "100% of its values" in difference(small(1e-2), theirs, theirs, 1e-6)
    assert difference(small(1e-2), theirs, small(1e-3), 1e-6) == ""
    jumped = theirs.copy()
    jumped[0, :3] += 1
    assert difference(jumped, theirs, theirs, 1e-6) == ""
    jumped[0, :40] += 1
    assert "1% of its values" in difference(jumped, theirs, theirs, 1e-6)


def test_numbers_that_are_none_must_be_the_same_ones():
    theirs = np.array([[1.0, np.nan, np.inf, -np.inf]])
    assert difference(theirs.copy(), theirs, theirs, 1e-6) == ""
    assert difference(np.ones((1, 4)), theirs, theirs, 1e-6)
