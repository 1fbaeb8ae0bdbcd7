"""Super-resolution: channels that become pixels, for images of any size."""

import jax.numpy as jnp
import numpy as np
import onnx
import pytest

import dfq_jax as dfq
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.pixel_ops import DepthToSpace
from dfq_jax.io.artifacts.artifact import load_artifact
from dfq_jax.io.load import load
from dfq_jax.io.onnx.export import float_onnx, serialize
from dfq_jax.io.runtime.session import open_session

pytestmark = pytest.mark.onnx
FREE = ["N", 3, "h", "w"]


def network(mode: str) -> bytes:
    """Two convolutions, and blocks of their channels as pixels."""
    rng, node = np.random.default_rng(0), onnx.helper.make_node
    weights = {"a": rng.normal(size=(6, 3, 3, 3)) / 5, "b": rng.normal(size=(12, 6, 3, 3)) / 7}
    conv = lambda x, w, y: node("Conv", [x, w], [y], name=f"conv_{w}", pads=[1] * 4)
    nodes = [
        conv("x", "a", "h1"),
        node("Relu", ["h1"], ["h2"], name="relu"),
        conv("h2", "b", "h3"),
        node("DepthToSpace", ["h3"], ["y"], name="shuffle", blocksize=2, mode=mode),
    ]
    info = onnx.helper.make_tensor_value_info
    read = info("x", onnx.TensorProto.FLOAT, FREE)
    made = info("y", onnx.TensorProto.FLOAT, ["N", 3, "h2", "w2"])
    kept = [onnx.numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()]
    graph = onnx.helper.make_graph(nodes, "net", [read], [made], kept)
    opset = [onnx.helper.make_opsetid("", 17)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


@pytest.mark.parametrize("mode", ["CRD", "DCR"])
def test_files_read_images_of_any_size(tmp_path, mode):
    path = tmp_path / "net.onnx"
    path.write_bytes(network(mode))
    model = load(path, size=8).model
    assert model.graph.nodes[-1].op == DepthToSpace(2, mode == "CRD")
    file = open_session(serialize(float_onnx(model)), optimize=False)
    assert file.get_inputs()[0].shape == FREE
    x = np.random.default_rng(1).normal(size=(2, 3, 5, 9)).astype(np.float32)
    wanted = open_session(path, optimize=False).run(None, {"x": x})[0]
    np.testing.assert_allclose(file.run(["y"], {"x": x})[0], wanted, atol=1e-5)
    ours = np.asarray(evaluate(model, jnp.asarray(x.transpose(0, 2, 3, 1)))[0][0])
    np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), wanted, atol=1e-5)


def test_so_do_those_of_integers(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(network("CRD"))
    made = dfq.quantize(load(path, size=8, mean=(0.5,), std=(0.5,)).model, n=8)
    found = made.verify()
    assert found.passed, found.failures
    assert found.most_steps <= 1
    made.save(tmp_path / "out", verification=found)
    file = open_session(load_artifact(tmp_path / "out").onnx_path, optimize=True)
    assert file.get_inputs()[0].shape == FREE
    assert file.run(["y"], {"x": np.zeros((1, 3, 6, 10), np.float32)})[0].shape == (
        1,
        3,
        12,
        20,
    )
