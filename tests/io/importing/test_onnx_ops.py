"""ONNX's own operators: imported, and written again, against ONNX Runtime."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import Activation, Clip, Div, Pad, Softmax
from dfq_jax.io.frontends.graph_files import load_graph
from dfq_jax.io.onnx.export import float_onnx

ort = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.onnx

RNG = np.random.default_rng(0)
IMAGE = (1, 4, 6, 8)
node = helper.make_node


def built(
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int] = IMAGE,
    opset: int = 17,
    **weights: Any,
) -> onnx.ModelProto:
    """A network that reads `x` and returns `y`."""
    value = lambda n, s: helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
    stored = [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    graph = helper.make_graph(list(nodes), "g", [value("x", shape)], [value("y", None)], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def alone(kind: str, *weights: Any, shape=IMAGE, opset: int = 17, **attributes: Any):
    """A network of one node behind another, so that it may do nothing.

    Its further inputs are constants, None for one left out.
    """
    names = ["" if w is None else f"w{i}" for i, w in enumerate(weights)]
    stored = {n: w for n, w in zip(names, weights, strict=True) if n}
    nodes = [node("Neg", ["x"], ["n"]), node(kind, ["n", *names], ["y"], **attributes)]
    return built(nodes, shape, opset, **stored)


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """What ONNX Runtime computes."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    given = ["CPUExecutionProvider"]
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=given)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def loaded(proto: onnx.ModelProto, tmp_path) -> Model:
    """The imported network."""
    path = tmp_path / "net.onnx"
    path.write_bytes(proto.SerializeToString())
    return load_graph(path, no_bn_fallback=True).model


def agree(proto: onnx.ModelProto, tmp_path, tolerance: float = 1e-5, x: Any = None) -> Model:
    """Asserts that the imported network, and the file written from it, compute what the file does.

    The latter reads as many axes as the file.

    Args:
      proto: the file.
      tmp_path: for files.
      tolerance: in units of the largest output.
      x: what they read, by default noise.
    """
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    x = np.asarray(RNG.normal(size=shape) if x is None else x, np.float32)
    wanted = run(proto, x)
    model = loaded(proto, tmp_path)
    images = x.reshape(*x.shape[:2], *(1,) * (4 - x.ndim), *x.shape[2:])
    ours = np.asarray(evaluate(model, jax.device_put(images.transpose(0, 2, 3, 1)))[0][0])
    for found in (
        ours.transpose(0, 3, 1, 2) if ours.ndim == 4 else ours,
        run(float_onnx(model), x),
    ):
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()
    return model


def refused(proto: onnx.ModelProto, tmp_path, match: str) -> None:
    """Asserts that a network is refused."""
    with pytest.raises(UnsupportedModelError, match=match):
        loaded(proto, tmp_path)


def normal(*shape: int) -> np.ndarray:
    """Random numbers."""
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(8,), (6, 1), (4, 1, 1), (1, 4, 1, 1), (4, 6, 8), (1,), (6, 8)])
def test_prelu_slopes_broadcast_from_the_right(shape, tmp_path):
    agree(alone("PRelu", normal(*shape)), tmp_path)


def test_prelu_slopes_of_columns_are_none_of_channels(tmp_path):
    agree(alone("PRelu", normal(4), shape=(1, 4, 4, 4)), tmp_path)
    agree(alone("PRelu", normal(1, 4, 1), shape=(1, 4, 4, 4)), tmp_path)
    refused(alone("PRelu", normal(4), shape=(1, 4, 4, 5)), tmp_path, r"\(4,\) do not .*\(4, 1, 1\)")


@pytest.mark.parametrize(
    "place", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]
)
@pytest.mark.parametrize("sizes", [(12, 16), (9, 13), (4, 5), (6, 8)])
@pytest.mark.parametrize("more", [{}, {"cubic_coeff_a": -0.5}, {"exclude_outside": 1}])
def test_cubic_resize(place, sizes, more, tmp_path):
    sizes = np.array([1, 4, *sizes], np.int64)
    how = {"mode": "cubic", "coordinate_transformation_mode": place, **more}
    agree(alone("Resize", None, None, sizes, **how), tmp_path, 1e-4)


@pytest.mark.parametrize("scale", [(2.0, 3.0), (0.5, 0.4), (1.7, 1.0)])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_smooth_resize_by_scales(scale, mode, tmp_path):
    scales = np.array([1, 1, *scale], np.float32)
    agree(alone("Resize", None, scales, mode=mode), tmp_path, 1e-4)


@pytest.mark.parametrize("scale", [(0.5, 0.5), (0.4, 0.3), (2.0, 0.5), (1.0, 0.7)])
def test_antialiased_resize(scale, tmp_path):
    scales = np.array([1, 1, *scale], np.float32)
    shape = (1, 3, 15, 20)
    agree(
        alone("Resize", None, scales, shape=shape, mode="linear", antialias=1, opset=18), tmp_path
    )


def test_antialias_that_is_not_supported_is_refused_by_name(tmp_path):
    scales = np.array([1, 1, 0.5, 0.5], np.float32)
    proto = alone("Resize", None, scales, mode="cubic", antialias=1, opset=18)
    refused(proto, tmp_path, "antialias = 1 with mode cubic")


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller", "stretch"])
@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 3, 11, 17)])
def test_resize_keeps_the_aspect_ratio(policy, shape, tmp_path):
    sizes = np.array([24, 32], np.int64)
    how = {"mode": "linear", "axes": [2, 3], "keep_aspect_ratio_policy": policy}
    agree(alone("Resize", None, None, sizes, shape=shape, opset=18, **how), tmp_path)


def test_an_attribute_nobody_handles_is_refused_with_node_value_and_remedy(tmp_path):
    proto = alone(
        "Resize", None, np.ones(4, np.float32), opset=17, name="up", extrapolation_value=3.0
    )
    message = r"net\.onnx: .*Resize at up: attribute extrapolation_value = 3\.0 .*; it belongs to"
    refused(proto, tmp_path, message)
    proto = alone("Relu", name="act", slope=0.5)
    refused(proto, tmp_path, r"Relu at act: attribute slope = 0\.5 is not supported; write")


def test_an_attribute_with_its_default_says_nothing(tmp_path):
    proto = alone("Resize", None, np.ones(4, np.float32), extrapolation_value=0.0)
    assert loaded(proto, tmp_path)


@pytest.mark.parametrize("axis", [-1, 1, 2])
def test_log_softmax(axis, tmp_path):
    agree(alone("LogSoftmax", axis=axis), tmp_path)
    agree(alone("LogSoftmax", shape=(1, 10), axis=-1 if axis == 2 else axis), tmp_path)


@pytest.mark.parametrize("kind", ["LogSoftmax", "Softmax"])
@pytest.mark.parametrize("shape", [(1, 10), (1, 4, 3, 5), (1, 10, 1, 1)])
def test_softmax_of_old_opsets_runs_over_all_axes_that_follow(kind, shape, tmp_path):
    agree(alone(kind, shape=shape, opset=11), tmp_path)


def test_log_softmax_keeps_what_softmax_would_lose(tmp_path):
    x = np.array([[0.0, -200.0, 300.0]])
    agree(alone("LogSoftmax", shape=(1, 3)), tmp_path, x=x)


@pytest.mark.parametrize("kind", ["Min", "Max"])
@pytest.mark.parametrize("shape", [(), (4, 1, 1), (4, 6, 8)])
def test_extremes(kind, shape, tmp_path):
    agree(alone(kind, normal(*shape)), tmp_path)
    nodes = [node("Neg", ["x"], ["a"]), node(kind, ["x", "a", "w"], ["y"])]
    agree(built(nodes, w=normal(*shape)), tmp_path)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("Elu", {"alpha": 0.3}),
        ("Elu", {}),
        ("Selu", {}),
        ("Selu", {"alpha": 2.0, "gamma": 0.5}),
        ("Celu", {"alpha": 0.7}),
        ("Round", {}),
        ("LRN", {"size": 3}),
        ("LRN", {"size": 3, "alpha": 0.9, "beta": 0.5, "bias": 2.0}),
        ("LRN", {"size": 5, "alpha": 2.0}),
    ],
)
def test_curves_and_norms(kind, how, tmp_path):
    agree(alone(kind, **how), tmp_path)


def test_a_norm_over_an_even_number_of_channels_is_refused(tmp_path):
    refused(alone("LRN", size=4), tmp_path, "runs over 4 channels; ONNX Runtime knows odd")


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("how", [{}, {"strides": [2, 1], "pads": [1, 0, 1, 1]}])
def test_pools_of_a_norm(p, how, tmp_path):
    agree(alone("LpPool", p=p, kernel_shape=[3, 2], **how), tmp_path)


def test_logarithm(tmp_path):
    agree(alone("Log"), tmp_path, x=-np.abs(normal(*IMAGE)) - 0.1)


def test_halves_are_rounded_to_even(tmp_path):
    agree(alone("Round", shape=(1, 6)), tmp_path, x=[[0.5, 1.5, 2.5, -0.5, -1.5, 0.3]])


@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("shape", [(13, 17), (12, 15), None])
def test_transposed_convolution_of_a_stated_size(auto_pad, shape, tmp_path):
    how: dict[str, Any] = {"strides": [2, 2], "auto_pad": auto_pad}
    if shape is not None:
        how["output_shape"] = shape
    agree(alone("ConvTranspose", normal(4, 3, 4, 3), **how), tmp_path)


def test_space_to_depth_has_modes(tmp_path):
    assert loaded(alone("SpaceToDepth", blocksize=2, shape=(1, 3, 4, 6)), tmp_path)


def test_dropout_in_training_mode_is_refused(tmp_path):
    proto = alone("Dropout", np.float32(0.5), np.array(True))
    refused(proto, tmp_path, "call model.eval")


@pytest.mark.parametrize("opset", [9, 10])
@pytest.mark.parametrize(
    ("kind", "weights", "how"),
    [
        ("Clip", (), {"min": -0.5, "max": 0.7}),
        ("Clip", (), {"min": 0.0, "max": 6.0}),
        ("Clip", (), {}),
        ("Pad", (), {"pads": [0, 0, 1, 2, 0, 0, 0, 1], "value": 0.5}),
        ("Pad", (), {"pads": [0, 0, 1, 2, 0, 0, 0, 1], "mode": "reflect"}),
        ("Upsample", (np.array([1, 1, 2, 3], np.float32),), {}),
        ("Upsample", (np.array([1, 1, 2, 3], np.float32),), {"mode": "linear"}),
        ("Dropout", (), {"ratio": 0.5}),
        ("MaxPool", (), {"kernel_shape": [2, 3], "strides": [2, 2]}),
        ("AveragePool", (), {"kernel_shape": [2, 3], "pads": [1, 1, 0, 1]}),
        ("Softmax", (), {"axis": 3}),
        ("Unsqueeze", (), {"axes": [2]}),
        ("ReduceMean", (), {"axes": [2, 3], "keepdims": 0}),
    ],
)
def test_old_opsets(opset, kind, weights, how, tmp_path):
    if opset == 10 and kind == "Upsample":
        kind = "Resize"
    agree(alone(kind, *weights, opset=opset, **how), tmp_path)


def test_slices_of_opset_9_have_attributes(tmp_path):
    agree(alone("Slice", starts=[1, 0], ends=[-1, 5], axes=[2, 3], opset=9), tmp_path)


def test_nearest_pixels_of_old_opsets_are_refused_where_nobody_says_which(tmp_path):
    halves = np.array([1, 1, 0.5, 0.25], np.float32)
    agree(alone("Resize", halves, opset=10), tmp_path)
    odd = np.array([1, 1, 0.4, 0.4], np.float32)
    refused(alone("Resize", odd, opset=10), tmp_path, "opset 11 or newer")


def test_nodes_may_share_a_name(tmp_path):
    kinds = (("Relu", ["x"], ["a"]), ("Neg", ["a"], ["b"]), ("Add", ["b", "x"], ["y"]))
    named = [[node(*kind, name=name) for kind in kinds] for name in ("same", "/a/same", "")]
    x = normal(*IMAGE)
    wanted = run(built(named[2]), x)
    for nodes in named:
        model = loaded(built(nodes), tmp_path)
        ours = evaluate(model, jax.device_put(x.transpose(0, 2, 3, 1)))[0][0]
        assert np.array_equal(np.asarray(ours).transpose(0, 3, 1, 2), wanted)


def softmax_in_parts(maximum: bool, last: str) -> onnx.ModelProto:
    """Scores of places as JAX and TensorFlow spell their softmax out."""
    nodes = [node("ReduceMax", ["x"], ["top"], axes=[3], keepdims=1)]
    nodes += [node("Max", ["top", "never"], ["t"]), node("Sub", ["x", "t"], ["d"])]
    nodes = nodes if maximum else []
    nodes += [node("Exp", ["d" if maximum else "x"], ["e"])]
    nodes += [node("ReduceSum", ["e", "axes"], ["s"], keepdims=0)]
    nodes += [node("Unsqueeze", ["s", "axes"], ["u"]), node(last, ["e", "u"], ["y"])]
    return built(nodes, never=np.float32(-np.inf), axes=np.array([3], np.int64))


@pytest.mark.parametrize("maximum", [True, False])
def test_softmax_in_parts_is_one(maximum, tmp_path):
    model = agree(softmax_in_parts(maximum, "Div"), tmp_path)
    assert [type(n.op) for n in model.graph.nodes if isinstance(n.op, Softmax | Div)] == [Softmax]


def test_shares_of_other_sums_are_no_softmax(tmp_path):
    nodes = [node("Exp", ["x"], ["e"]), node("Abs", ["x"], ["a"])]
    nodes += [node("ReduceSum", ["a", "axes"], ["s"]), node("Div", ["e", "s"], ["y"])]
    model = agree(built(nodes, axes=np.array([3], np.int64)), tmp_path)
    assert not any(isinstance(n.op, Softmax) for n in model.graph.nodes)


@pytest.mark.parametrize("end", [-np.inf, np.inf])
def test_limits_that_are_infinite_are_none(end, tmp_path):
    """No number of a graph may be one that JSON has none for."""
    kind = "Max" if end < 0 else "Min"
    model = agree(alone(kind, np.float32(end)), tmp_path)
    assert not any(isinstance(n.op, Clip) for n in model.graph.nodes)


@pytest.mark.parametrize("value", [-np.inf, 0.0])
def test_padding_that_never_is_the_maximum_is_that_of_the_windows(value, tmp_path):
    pads = np.array([0, 0, 0, 1, 0, 0, 1, 2], np.int64)
    nodes = [node("Neg", ["x"], ["n"]), node("Pad", ["n", "pads", "value"], ["p"])]
    nodes += [node("MaxPool", ["p"], ["y"], kernel_shape=[3, 3], strides=[2, 2])]
    model = agree(built(nodes, pads=pads, value=np.float32(value)), tmp_path)
    assert any(isinstance(n.op, Pad) for n in model.graph.nodes) == (value == 0)


@pytest.mark.parametrize("form", ["x (x (0.04 x))", "0.04 (x^3)", "x (0.04 (x x))"])
def test_gelu_by_tanh_is_found_however_its_cube_is_written(form, tmp_path):
    cubes = {
        "x (x (0.04 x))": [("Mul", "x", "c"), ("Mul", "x", "k0"), ("Mul", "x", "k1")],
        "0.04 (x^3)": [("Pow", "x", "three"), ("Mul", "k0", "c")],
        "x (0.04 (x x))": [("Mul", "x", "x"), ("Mul", "k0", "c"), ("Mul", "x", "k1")],
    }[form]
    nodes = [node(kind, [a, b], [f"k{i}"]) for i, (kind, a, b) in enumerate(cubes)]
    nodes += [node("Add", ["x", f"k{len(cubes) - 1}"], ["a"]), node("Mul", ["a", "r"], ["b"])]
    nodes += [node("Tanh", ["b"], ["t"]), node("Add", ["t", "one"], ["o"])]
    nodes += [node("Mul", ["o", "half"], ["h"]), node("Mul", ["x", "h"], ["y"])]
    numbers = {"c": 0.044715, "r": np.sqrt(2 / np.pi), "one": 1.0, "half": 0.5, "three": 3.0}
    weights: dict[str, Any] = {k: np.float32(v) for k, v in numbers.items()}
    model = agree(built(nodes, **weights), tmp_path)
    assert [n.op for n in model.graph.nodes] == [Activation("gelu_tanh")]
