import dataclasses
import json
import re
import sys

import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from dfq_jax.errors import DataError, UnsupportedModelError, UsageError
from dfq_jax.io.verification import runners as verify_runners
from dfq_jax.io.verification import verify as module
from dfq_jax.io.verification.verify import images_at_a_time, verify
from dfq_jax.numerics.affine import Affine
from dfq_jax.quantization.plan import Site
from dfq_jax.quantization.simulate import QuantizedModel

pytestmark = pytest.mark.usefixtures("unoptimized")


CASES = (
    ("residual", "w8a8", "qdrop_8bit_ends"),
    ("vgg", "w4a8", "zsq_all_low"),
    ("odd", "w5a6", "qdrop_8bit_ends"),
    ("extreme", "w2a2", "qdrop_8bit_ends"),
    ("option_a", "w2a2", "qdrop_8bit_ends_shortcuts"),
    ("residual", "w3a3", "brecq_8bit_ends_second_shortcuts"),
    ("residual", "w3a3", "zsq_all_rectified"),
)


COMPOSITES = (
    ("squeeze", "w4a6"),
    ("convnext", "w4a8"),
    ("transformer", "w4a8"),
    ("dense", "w8a8"),
    ("shuffle", "w4a4"),
    ("unet", "w5a6"),
    ("windows", "w4a6"),
)


@pytest.mark.parametrize(("net", "scheme", "layers"), CASES)
def test_all_ways_to_run_a_network_agree(onnx_nets, net, scheme, layers):
    q = onnx_nets.quantized(net, scheme, layers)
    x = onnx_nets.images(q.model, 13, seed=3)
    done = []
    found = verify(
        q,
        onnx_nets.integer_file(net, scheme, layers),
        x,
        batch=8,
        on_batch=lambda n, total: done.append((n, total)),
    )
    assert done == [(8, 13), (13, 13)]
    assert found.passed
    assert found.agreement == 1.0
    assert all(c.equal > 0.9995 for c in found.layers)
    assert found.layers[0].count == 13 * np.prod(q.model.contract.shape) or layers.startswith("zsq")
    ways = ["integer", "onnxruntime off", "onnxruntime on", "onnxruntime precise"]
    assert [e.runner for e in found.ends] in (ways, ways[:3])
    assert found.noise < 0.2
    assert max(c.beyond for c in found.layers) < 1e-3
    assert json.loads(json.dumps(found.to_dict()))["passed"] is True


@pytest.mark.parametrize(
    ("count", "side", "held"),
    [(16, 32, 8), (3, 256, 8), (16, 299, 4), (10, 299, 5), (8, 320, 4), (8, 416, 3), (8, 4000, 1)],
)
def test_few_large_images_are_held_at_a_time(count, side, held):
    assert images_at_a_time((count, side, side, 3)) == held


def test_how_many_are_held_does_not_change_the_verdict(onnx_nets, monkeypatch):
    net = ("residual", "w8a8", "qdrop_8bit_ends")
    q, file = onnx_nets.quantized(*net), onnx_nets.integer_file(*net)
    x, done = onnx_nets.images(q.model, 5, seed=3), []
    whole = verify(q, file, x)
    monkeypatch.setattr(module, "PIXELS", 2 * x[0, ..., 0].size)
    parts = verify(q, file, x, on_batch=lambda n, total: done.append(n))
    assert done == [2, 4, 5]
    assert [c.count for c in parts.layers] == [c.count for c in whole.layers]
    assert (parts.passed, parts.failures) == (whole.passed, whole.failures) == (True, ())


@pytest.mark.parametrize("case", ["missing", "too old"])
@pytest.mark.parametrize(("net", "scheme", "layers"), CASES[1:3])
def test_without_onnx_runtime_the_reference_evaluator_judges(
    case, onnx_nets, net, scheme, layers, monkeypatch
):
    if case == "missing":
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    else:
        monkeypatch.setattr(onnxruntime, "__version__", "1.9.0")
    q = onnx_nets.quantized(net, scheme, layers)
    x = onnx_nets.images(q.model, 5, seed=3)
    file = onnx_nets.integer_file(net, scheme, layers)
    found = verify(q, file, x, batch=4)
    assert found.passed
    assert all(c.equal > 0.9995 for c in found.layers)
    assert [e.runner for e in found.ends] == ["integer", "onnx reference"]
    assert (found.runner, found.runtime) == ("the ONNX reference evaluator", onnx.__version__)
    remedy = r"dfq-jax\[runtime\]" if case == "missing" else r"onnxruntime>=1\.1\d"
    assert re.search(f"reference evaluator.*{remedy}", found.warnings[0])
    half = {site: affine._replace(scale=affine.scale / 2) for site, affine in q.qparams.items()}
    assert not verify(dataclasses.replace(q, qparams=half), file, x, batch=4).passed


@pytest.mark.parametrize(("net", "scheme"), COMPOSITES)
def test_all_ways_to_run_any_network_agree(onnx_nets, net, scheme):
    q = onnx_nets.quantized(net, scheme)
    found = verify(q, onnx_nets.integer_file(net, scheme), onnx_nets.images(q.model, 9, seed=3))
    assert found.passed
    assert {c.tensor for c in found.layers} >= {tensor for tensor, _ in q.plan.groups}
    assert all(c.equal > 0.999 for c in found.layers)
    assert found.ends[-1].agreement == 1
    assert found.noise < 0.2


def test_constants_count_once(onnx_nets):
    q = onnx_nets.quantized("transformer", "w4a8")
    file = onnx_nets.integer_file("transformer", "w4a8")
    counts = {c.tensor: c.count for c in verify(q, file, onnx_nets.images(q.model, 9)).layers}
    assert counts["attention"] == 9 * 2 * 17 * 17
    assert counts["bias"] == 2 * 2 * 17 * 17  # one row, in each of two batches


def with_bias(q, layer, bias):
    params = {**q.model.params, layer: {**q.model.params[layer], "bias": bias}}
    return dataclasses.replace(q, model=dataclasses.replace(q.model, params=params))


def test_every_output_is_compared(onnx_nets):
    """The same scores, but another second output."""
    q = onnx_nets.quantized("unet", "w5a6")
    x = onnx_nets.images(q.model, 3)
    shifted = with_bias(q, "depth", q.model.params["depth"]["bias"] + jnp.float32(50.0))
    found = verify(shifted, onnx_nets.integer_file("unet", "w5a6"), x)
    integer, off, *_ = found.ends
    assert integer.difference < 1.0
    assert off.difference > 40.0
    classes, depth = found.outputs
    assert (classes.name, depth.name) == ("classes", "depth")
    assert classes.differences["onnxruntime off"] < 0.2
    assert depth.differences["onnxruntime off"] > 100
    file, output, *_ = found.failures
    told = r"the file is not what was exported: initializer 'depth.bias.codes' differs in \d of 4"
    assert re.match(told, file)
    assert "output 'depth'" in output
    assert "times the noise of rounding" in output


def test_the_top_class_of_every_pixel_counts(onnx_nets):
    """Another bias of the first class changes the answer at some pixels, not at all."""
    q = onnx_nets.quantized("unet", "w5a6")
    x = onnx_nets.images(q.model, 3)
    bias = q.model.params["classes"]["bias"]
    found = verify(
        with_bias(q, "classes", bias.at[0].add(6.0)), onnx_nets.integer_file("unet", "w5a6"), x
    )
    assert 0.01 < found.agreement < 0.99
    assert found.undecided == 0  # no two scores of a pixel are near, and the depth decides nothing
    assert any("decides as the simulator in only" in told for told in found.failures)


@pytest.mark.parametrize("images", ["8", "64", "noise", "blank"])
@pytest.mark.parametrize(("net", "scheme"), [("residual", "w8a8"), ("unet", "w4a4")])
def test_images_do_not_change_the_verdict(onnx_nets, net, scheme, images):
    """Of a good file, and of one with a single flipped bit that no output shows."""
    q, file = onnx_nets.quantized(net, scheme), onnx_nets.integer_file(net, scheme)
    normal = onnx_nets.images(q.model, 64, seed=4)
    x = {"8": normal[:8], "64": normal, "noise": 9 * normal[:3], "blank": 0 * normal[:2]}[images]
    assert verify(q, file, x).failures == ()
    proto = onnx.load_model_from_string(file)
    kernel = next(t for t in proto.graph.initializer if t.name == "conv2.kernel.codes")
    kernel.raw_data = bytes([kernel.raw_data[0] ^ 1]) + kernel.raw_data[1:]
    found = verify(q, proto.SerializeToString(), x)
    assert found.failures[0].startswith(
        "the file is not what was exported: initializer 'conv2.kernel.codes' differs in 1 of "
    )


def test_where_nothing_is_decided_nothing_is_said_about_classes(onnx_nets):
    """Two bits: rounding moves scores by more than they are apart."""
    q = onnx_nets.quantized("extreme", "w2a2")
    same = with_bias(q, "fc", jnp.zeros(6))
    params = {**same.model.params, "fc": {**same.model.params["fc"]}}
    params["fc"]["kernel"] = params["fc"]["kernel"] * 0
    same = dataclasses.replace(same, model=dataclasses.replace(same.model, params=params))
    from dfq_jax.io.onnx.export import quantized_onnx, serialize

    found = verify(same, serialize(quantized_onnx(same)), onnx_nets.images(q.model, 4))
    assert (found.counted, found.undecided, found.agreement, found.passed) == (0, 1.0, 1.0, True)


def test_sums_too_long_for_integers_leave_the_rest_to_compare(onnx_nets, monkeypatch):
    sums = sys.modules["dfq_jax.quantization.sums"]
    monkeypatch.setattr(sums, "LARGEST_SUM", 1000)
    monkeypatch.setattr(sums, "SAFE", 10)
    q = onnx_nets.quantized("residual", "w8a8")
    file, x = onnx_nets.integer_file("residual", "w8a8"), onnx_nets.images(q.model, 4)
    found = verify(q, file, x)
    assert found.passed
    assert {c.integer_steps for c in found.layers} == {None}
    assert "layer 'conv1' sums 27 products" in found.warnings[-1]
    assert found.ends[0].runner == "onnxruntime off"
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["integer_equal"] is None


def test_a_wrong_scale_shows_in_its_layer_only(onnx_nets):
    """The same codes, read with another scale."""
    q = onnx_nets.quantized("residual")
    site = Site("conv3")
    params = {**q.model.params, "conv3": dict(q.model.params["conv3"])}
    params["conv3"]["kernel"] = params["conv3"]["kernel"] * 1.1
    model = dataclasses.replace(q.model, params=params)
    affine = Affine(q.qparams[site].scale * 1.1, q.qparams[site].zero_point)
    other = QuantizedModel(model, q.plan, {**q.qparams, site: affine})
    found = verify(other, onnx_nets.integer_file("residual"), onnx_nets.images(q.model, 8))
    assert not found.passed
    assert {c.tensor for c in found.layers if c.simulator_steps > 1} == {"conv3"}
    assert {
        c.tensor for c in found.layers if c.integer_steps is not None and c.integer_steps > 1
    } == {"conv3"}


def test_files_of_other_networks_are_refused(onnx_nets):
    q = onnx_nets.quantized("residual")
    x = onnx_nets.images(q.model, 2)
    with pytest.raises(DataError, match=r"not in the file"):
        verify(q, onnx_nets.integer_file("extreme"), x)
    shown = dataclasses.replace(q.model.graph, outputs=(*q.model.graph.outputs, "add2"))
    other = dataclasses.replace(q, model=dataclasses.replace(q.model, graph=shown))
    with pytest.raises(DataError, match=r"returns \['logits'\], the network \['logits', 'add2'\]"):
        verify(other, onnx_nets.integer_file("residual"), x)
    with pytest.raises(UsageError, match="at least one image"):
        verify(q, onnx_nets.integer_file("residual"), x[:0])


@pytest.mark.parametrize("features", [("avx2",), ("avx2", "avx512_vnni")])
def test_processors_that_saturate_are_judged_without_it(onnx_nets, monkeypatch, features):
    monkeypatch.setattr(verify_runners, "cpu_features", lambda: features)
    q = onnx_nets.quantized("vgg", "w8a8")
    found = verify(q, onnx_nets.integer_file("vgg", "w8a8"), onnx_nets.images(q.model, 4))
    precise = "onnxruntime precise"
    if len(features) > 1:
        assert precise not in found.outputs[0].differences
        return
    assert found.ends[-1].runner == precise
    assert found.outputs[0].differences[precise] < 0.2
    assert found.passed


def test_differences_are_counted_in_steps(onnx_nets):
    """A file whose first bias is off by many codes, so that only its own layer shows it."""
    q = onnx_nets.quantized("extreme", "w2a2")
    proto = onnx.load_model_from_string(onnx_nets.integer_file("extreme", "w2a2"))
    scale = {t.name: t for t in proto.graph.initializer}["relu1.scale"]
    step = float(onnx.numpy_helper.to_array(scale))
    params = {**q.model.params, "conv1": dict(q.model.params["conv1"])}
    params["conv1"]["bias"] = params["conv1"]["bias"] + jnp.float32(2 * step)
    shifted = dataclasses.replace(q, model=dataclasses.replace(q.model, params=params))
    found = verify(shifted, proto.SerializeToString(), onnx_nets.images(q.model, 4))
    steps = {c.tensor: (c.simulator_steps, c.integer_steps) for c in found.layers}
    assert steps.pop("relu1") == (2, 2)
    assert set(steps.values()) == {(0, 0)}


def test_a_runtime_that_stops_is_told():
    class Session:
        def get_inputs(self):
            return []

        def run(self, *_):
            raise RuntimeError("Non-zero status\nfar more")

    session = verify_runners.Guarded(Session())
    with pytest.raises(UnsupportedModelError, match=r"stopped in the file: Non-zero status$"):
        session.run(["logits"], {})
