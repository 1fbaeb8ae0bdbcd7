import builtins

import numpy as np
import onnx
import onnxruntime
import pytest

from dfq_jax.errors import DataError, UnsupportedModelError, UsageError
from dfq_jax.io.onnx.export import float_onnx, serialize
from dfq_jax.io.runtime import session as runtime
from dfq_jax.io.runtime.latency import bench, warnings
from dfq_jax.io.runtime.session import (
    contract_of,
    cpu_features,
    open_session,
    predictor,
    run,
    saturation_risk,
)


@pytest.mark.parametrize("features", [("avx2",), ("avx2", "avx512_vnni")])
def test_accuracy_is_measured_without_saturation(monkeypatch, features):
    """In ONNX Runtime's precise mode where the processor saturates, as usual elsewhere."""
    asked = []
    monkeypatch.setattr(runtime, "cpu_features", lambda: features)
    monkeypatch.setattr(runtime, "open_session", lambda *_, **how: asked.append(how))
    monkeypatch.setattr(runtime, "require_images", lambda *_: None)
    runtime.predictor("model.onnx")
    assert asked == [{"optimize": True, "threads": 2, "precise": len(features) == 1}]


def test_predictor_takes_nhwc_and_any_batch(onnx_nets, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_nets.integer_file("residual"))
    predict = predictor(path)
    x = np.asarray(onnx_nets.images(onnx_nets.NETS["residual"](), 5))
    whole = predict(x)
    assert whole.shape == (5, 10)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole[3:], predict(x[3:]))
    session = open_session(path, optimize=True, precise=saturation_risk(cpu_features()))
    np.testing.assert_array_equal(whole, run(session, x))


def test_contract_of_reads_what_export_wrote(onnx_nets, tmp_path):
    model = onnx_nets.NETS["odd"]()
    data = serialize(float_onnx(model))
    (tmp_path / "m.onnx").write_bytes(data)
    assert contract_of(data) == contract_of(tmp_path / "m.onnx") == model.contract


def test_contract_of_foreign_and_damaged_files():
    proto = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    assert contract_of(proto.SerializeToString()) is None
    onnx.helper.set_model_props(proto, {"dfq.contract": "{"})
    with pytest.raises(DataError, match=r"damaged `dfq.contract`"):
        contract_of(proto.SerializeToString())
    onnx.helper.set_model_props(proto, {"dfq.contract": '{"height": 1}'})
    with pytest.raises(DataError, match="width"):
        contract_of(proto.SerializeToString())


def test_a_missing_onnxruntime_names_the_extra(monkeypatch, onnx_nets):
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ImportError, match=r"pip install dfq-jax\[runtime\]"):
        open_session(onnx_nets.integer_file("residual"), optimize=True)


def test_an_old_onnxruntime_is_told_what_it_lacks(monkeypatch, onnx_nets):
    file = onnx_nets.integer_file("vgg", "w4a8", "zsq_all_low", store="int4")
    monkeypatch.setattr(onnxruntime, "__version__", "1.17.3")
    with pytest.raises(UnsupportedModelError, match=r"opset 21, which needs ONNX Runtime 1\.18"):
        open_session(file, optimize=False)


def test_unknown_operators_and_damaged_files(onnx_nets, tmp_path):
    data = onnx_nets.integer_file("residual")
    (tmp_path / "cut.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"cannot read .*cut\.onnx"):
        open_session(tmp_path / "cut.onnx", optimize=False)
    with pytest.raises(DataError, match=r"absent\.onnx"):
        open_session(tmp_path / "absent.onnx", optimize=False)
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value], [out])
    opset = onnx.helper.make_opsetid("", 17)
    proto = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    with pytest.raises(UnsupportedModelError, match="NoSuchOperator"):
        open_session(proto.SerializeToString(), optimize=False)


def test_cpu_features_are_read_where_the_system_tells(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t: fpu avx2 avx512_vnni sse\n")
    assert cpu_features(tmp_path / "cpuinfo") == ("avx2", "avx512_vnni")
    assert cpu_features(tmp_path / "absent") == ()
    assert saturation_risk(("avx2",))
    assert not saturation_risk(("avx2", "avx_vnni"))
    assert not saturation_risk(())


def test_bench_times_both(onnx_nets):
    model = onnx_nets.NETS["residual"]()
    found = bench(
        serialize(float_onnx(model)), onnx_nets.integer_file("residual"), runs=3, warmup=1, batch=2
    )
    assert found.float_ms > 0
    assert found.int_ms > 0
    data = found.to_dict()
    assert data["speedup"] == pytest.approx(found.float_ms / found.int_ms)
    assert data["batch"] == 2
    assert found.runtime == runtime.onnxruntime().__version__
    with pytest.raises(UsageError, match="runs >= 1"):
        bench(b"", b"", runs=0)


def test_a_slower_integer_network_is_said():
    assert warnings(2.0, 1.0, (), False) == ()
    found = " ".join(warnings(1.0, 2.0, ("avx2",), True))
    assert "slower here: 2.00 ms against 1.00 ms" in found
    assert "4-bit" in found
    assert '`store="packed"`' in found
    assert "VNNI" in found
