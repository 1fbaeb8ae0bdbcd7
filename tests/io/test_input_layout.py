"""Images with their channels last, of any size, in source, graph and exported files."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from image_nets import FIRST, LAST, ImageNet, classifier

import dfq_jax as dfq
from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.io.load import ReadOptions, load, load_with
from dfq_jax.io.runtime.latency import bench
from dfq_jax.io.verification.ways import simulated
from dfq_jax.quantization.plan import parse_scheme
from dfq_jax.recipes.dfq import dfq as dfq_recipe


def saved(tmp_path, proto):
    path = tmp_path / "net.onnx"
    onnx.save(proto, path)
    return path


def run(file, x) -> list[Any]:
    session: Any = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


def exported(tmp_path, model):
    path = tmp_path / "out.onnx"
    dfq.export(model, path)
    return path


def shape_of(path):
    axes = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    return [axis.dim_param or axis.dim_value for axis in axes]


def images(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def unknown_first(net):
    """An operator that is not followed; what the convolution reads has to tell."""
    x = net.add("Softmax", "x", axis=3)
    return net.add("Transpose", x, perm=[0, 3, 1, 2])


def grey(net):
    """As tf2onnx writes a transposition that moves a single channel."""
    return net.add("Reshape", "x", net.weight(np.array([-1, 1, 12, 10])))


def scaled_and_padded(net):
    x = net.add("Mul", net.weight(np.float32(0.5)), "x")
    x = net.add("Pad", x, net.weight(np.array([0, 1, 1, 0, 0, 1, 1, 0])))
    return net.add("Transpose", x, perm=[0, 3, 1, 2])


STARTS = {
    "transposed": (3, lambda net: net.add("Transpose", "x", perm=[0, 3, 1, 2])),
    "unknown": (3, unknown_first),
    "grey": (1, grey),
    "padded": (3, scaled_and_padded),
    "twice": (
        3,
        lambda net: net.add(
            "Transpose", net.add("Transpose", "x", perm=[0, 2, 1, 3]), perm=[0, 3, 2, 1]
        ),
    ),
}


@pytest.mark.parametrize("start", STARTS)
def test_channels_last_is_found_and_kept(tmp_path, start):
    channels, first = STARTS[start]
    net = ImageNet((1, 12, 10, channels))
    path = saved(tmp_path, net.proto(net.classes(net.conv(first(net), channels, 8), 8)))
    loaded = load(path)
    assert loaded.model.contract.shape == (12, 10, channels)
    assert loaded.model.contract.layout == "NHWC"
    assert any("channels last (NHWC)" in note for note in loaded.notes)
    x = images(1, 12, 10, channels)
    wanted = run(path, x)[0]
    np.testing.assert_allclose(dfq.predict(loaded.model, x), wanted, atol=1e-5)
    file = exported(tmp_path, loaded.model)
    assert shape_of(file) == ["N", 12, 10, channels]
    np.testing.assert_allclose(run(file, x)[0], wanted, atol=1e-5)


@pytest.mark.parametrize("shape", [FIRST, (1, 3, 12, 3), (1, 48, 12, 3)])
def test_channels_first_is_what_convolutions_read(tmp_path, shape):
    """Also where the last axis has as many entries as an image has channels."""
    net = ImageNet(shape)
    path = saved(tmp_path, net.proto(net.classes(net.conv("x", shape[1], 8), 8)))
    loaded = load(path)
    assert (loaded.model.contract.layout, loaded.model.contract.channels) == ("NCHW", shape[1])
    assert not any("NHWC" in note for note in loaded.notes)


@pytest.mark.parametrize("start", [12, 7])
def test_without_convolutions_the_sizes_decide(tmp_path, start):
    net = ImageNet((1, start, 10, 3))
    flat = net.add("Flatten", "x")
    kernel = net.weight(images(start * 30, 4))
    path = saved(tmp_path, net.proto(net.add("Gemm", flat, kernel)))
    x = images(1, start, 10, 3)
    for layout, shape in ((None, (start, 10, 3)), ("nchw", (10, 3, start))):
        model = dfq.load(path, layout=layout)
        assert model.contract.shape == shape
        np.testing.assert_allclose(run(exported(tmp_path, model), x)[0], run(path, x)[0], atol=1e-4)


def test_the_user_wins_over_the_operators_and_is_told(tmp_path):
    net = ImageNet((1, 6, 6, 6))
    y = net.conv("x", 6, 4)
    path = saved(tmp_path, net.proto(net.classes(y, 4)))
    loaded = load(path, layout="nhwc")
    assert loaded.model.contract.layout == "NHWC"
    assert any("read as NHWC; its operators say NCHW" in note for note in loaded.notes)


DAMAGED = {
    "order": lambda net: net.add("Transpose", "x", perm=[0, 9, 9, 9]),
    "shape": lambda net: net.add("Reshape", "x", net.weight(np.array([[1.5]]))),
    "text": lambda net: net.add("Transpose", "x", perm="abcd"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_calls_are_refused_by_name(tmp_path, case):
    net = ImageNet((1, 6, 6, 6))
    y = net.add("Conv", DAMAGED[case](net), net.weight(images(4, 6, 3, 3)), group=0)
    graph = onnx.helper.make_graph(
        net.nodes,
        "net",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, net.shape)],
        [onnx.helper.make_tensor_value_info(y, onnx.TensorProto.FLOAT, None)],
        net.weights,
    )
    imports = [onnx.helper.make_opsetid("", 17)]
    path = saved(tmp_path, onnx.helper.make_model(graph, opset_imports=imports, ir_version=8))
    with pytest.raises(UnsupportedModelError, match="operator onnx"):
        load(path)


def test_images_leave_as_they_enter(tmp_path):
    """A segmentation network of Keras: scores of pixels with their channels last."""
    net = ImageNet(LAST)
    x = net.conv(net.add("Transpose", "x", perm=[0, 3, 1, 2]), 3, 8, strides=[1, 1])
    scores = net.add("Conv", x, net.weight(images(4, 8, 1, 1)))
    path = saved(tmp_path, net.proto(net.add("Transpose", scores, perm=[0, 2, 3, 1])))
    model, x = dfq.load(path, mean=(0.5,), std=(0.5,)), images(*LAST)
    wanted = run(path, x)[0]
    np.testing.assert_allclose(dfq.predict(model, x), wanted, atol=1e-5)
    np.testing.assert_allclose(run(exported(tmp_path, model), x)[0], wanted, atol=1e-5)


def test_channels_last_is_quantized_verified_timed_and_read_again(tmp_path):
    model = dfq.load(saved(tmp_path, classifier(LAST)), mean=(0.5,), std=(0.5,))
    result = dfq.quantize(model, method="noise", n=8)
    found = result.verify()
    assert found.passed, found.failures
    result.save(tmp_path / "out")
    file = tmp_path / "out" / "model.onnx"
    assert shape_of(file) == ["N", *LAST[1:]]
    assert dfq.verify(tmp_path / "out").passed
    assert bench(tmp_path / "out" / "float.onnx", file, runs=1).runs == 1
    again = dfq.load(tmp_path / "out" / "float.onnx")
    assert again.contract == model.contract
    convs = [n for n in onnx.load(file).graph.node if n.op_type == "Conv"]
    pairs = {n.output[0] for n in onnx.load(file).graph.node if n.op_type == "DequantizeLinear"}
    assert all(n.input[0] in pairs for n in convs), "runtimes fuse what is dequantized at once"


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        (("batch", 3, "rows", "columns"), ["batch", 3, "rows", "columns"]),
        ((None, 3, None, None), ["N", 3, "height", "width"]),
        ((1, 3, 12, "columns"), ["N", 3, 12, "columns"]),
        (("n", "rows", "columns", 3), ["n", "rows", "columns", 3]),
    ],
)
def test_free_sizes_keep_their_names(tmp_path, shape, names):
    path = saved(tmp_path, classifier(shape))
    model = dfq.load(path, size=(12, 32))
    assert model.contract.shape == (12, 32, 3)
    file = exported(tmp_path, model)
    assert shape_of(file) == names
    made = dfq_recipe(model, None, parse_scheme("w8a8")).quantized
    dfq.export(made, tmp_path / "q.onnx")
    assert shape_of(tmp_path / "q.onnx") == names
    for width in (32, 45):
        x = images(1, 12, width, 3) if shape[-1] == 3 else images(1, 3, 12, width)
        np.testing.assert_allclose(run(file, x)[0], run(path, x)[0], atol=1e-5)
        assert run(tmp_path / "q.onnx", x)[0].shape == (1, 5)


def test_what_reads_lines_of_any_length_returns_them(tmp_path):
    """A reshape keeps one axis open; the output's length has a name of its own."""
    net = ImageNet((1, 3, 8, "w"))
    y = net.conv(net.conv("x", 3, 8), 8, 6)
    y = net.add("Squeeze", net.add("ReduceMean", y, axes=[2]), net.weight(np.array([2])))
    path = saved(tmp_path, net.proto(y))
    model = dfq.load(path, size=(8, 40))
    file = exported(tmp_path, model)
    assert shape_of(file)[3] == "w"
    for width in (40, 64, 33):
        x = images(1, 3, 8, width)
        np.testing.assert_allclose(run(file, x)[0], run(path, x)[0], atol=1e-5)


def decoder(shape):
    """Half the size and back: what segmentation networks and detectors of text do."""
    net = ImageNet(shape)
    small = net.conv("x", 3, 8)
    scales = net.weight(np.array([1, 1, 2, 2], np.float32))
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}
    large = net.add("Resize", small, "", scales, nearest_mode="floor", **how)
    return net.proto(net.conv(large, 8, 2, strides=[1, 1]))


def test_what_resizes_by_whole_numbers_reads_any_size(tmp_path):
    path = saved(tmp_path, decoder(("n", 3, "h", "w")))
    model = dfq.load(path, size=(12, 10), mean=(0.5,), std=(0.5,))
    file = exported(tmp_path, model)
    assert shape_of(file) == ["n", 3, "h", "w"]
    made = dfq_recipe(model, None, parse_scheme("w8a8")).quantized
    dfq.export(made, tmp_path / "q.onnx")
    assert shape_of(tmp_path / "q.onnx") == ["n", 3, "h", "w"]
    for height, width in ((12, 10), (20, 34)):
        x = images(1, 3, height, width)
        wanted, found = run(path, x)[0], run(tmp_path / "q.onnx", x)[0]
        np.testing.assert_allclose(run(file, x)[0], wanted, atol=1e-5)
        ours = np.asarray(evaluate(model, jnp.asarray(x.transpose(0, 2, 3, 1)))[0][0])
        np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), wanted, atol=1e-5)
        said = np.asarray(simulated(made, jnp.asarray(x.transpose(0, 2, 3, 1))))
        said = said.transpose(0, 3, 1, 2)
        np.testing.assert_allclose(found, said, atol=1e-4)


def test_a_side_stays_free_where_the_other_cannot(tmp_path):
    """Readers of lines of text join all rows of a place into its channels."""
    net = ImageNet(("n", 3, "h", "w"))
    y = net.add("Reshape", net.conv("x", 3, 6), net.weight(np.array([1, 24, 1, -1])))
    scores = net.add("Conv", y, net.weight(images(5, 24, 1, 1)))
    path = saved(tmp_path, net.proto(scores))
    loaded = load(path, size=(8, 40))
    assert any("exported files read a height of 8 only" in note for note in loaded.notes)
    file = exported(tmp_path, loaded.model)
    assert shape_of(file)[2:] == [8, "w"]
    for width in (40, 64, 34):
        x = images(1, 3, 8, width)
        np.testing.assert_allclose(run(file, x)[0], run(path, x)[0], atol=1e-5)


def test_a_size_that_changes_the_operators_is_fixed(tmp_path):
    """`SAME` pads otherwise where sizes are odd."""
    net = ImageNet((1, 3, "h", "w"))
    how = {"auto_pad": "SAME_UPPER", "strides": [2, 2]}
    y = net.add("Conv", "x", net.weight(images(4, 3, 3, 3)), **how)
    path = saved(tmp_path, net.proto(net.classes(y, 4)))
    loaded = load(path, size=(12, 10))
    assert any("exported files read 12x10 only" in note for note in loaded.notes)
    assert shape_of(exported(tmp_path, loaded.model)) == ["N", 3, 12, 10]


@pytest.mark.parametrize(
    ("size", "read"),
    [("48x192", (48, 192)), ("64", (64, 64)), (" 8 X 16", (8, 16)), (32, (32, 32))],
)
def test_size_is_a_number_or_two(tmp_path, size, read):
    path = saved(tmp_path, classifier(("n", 3, "h", "w")))
    assert load_with(str(path), ReadOptions(size=size)).model.contract.shape[:2] == read


@pytest.mark.parametrize("size", ["x", "48x", "48x192x3", "-4", "1.5"])
def test_other_sizes_are_refused_with_the_form(tmp_path, size):
    with pytest.raises(UsageError, match=r"`size=` .*height x width as in 48x192"):
        load_with("net.onnx", ReadOptions(size=size))


def test_fixed_sizes_stay(tmp_path):
    path = saved(tmp_path, classifier((1, 3, 12, "w")))
    with pytest.raises(UnsupportedModelError, match=r"exported for 12 x None pixels, not 16 x 16"):
        load(path, size=16)
    with pytest.raises(UnsupportedModelError, match=r"`size=\(12, 224\)`"):
        load(path)


def test_layout_is_for_images_with_a_graph(tmp_path):
    net = ImageNet((1, 6))
    path = saved(tmp_path, net.proto(net.add("Gemm", "x", net.weight(images(6, 4)))))
    with pytest.raises(UsageError, match='`layout="nhwc"` is for images'):
        load(path, layout="nhwc")
    with pytest.raises(UsageError, match="layout"):
        load(path, layout="hwcn")
    with pytest.raises(UsageError, match="files with their own graph"):
        load(weights(tmp_path), arch="resnet20", layout="nhwc")


def weights(tmp_path):
    path = tmp_path / "net.pth"
    path.write_bytes(b"any")
    return path


@pytest.mark.parametrize("end", ["image", "steps"])
def test_a_batch_behind_the_steps_comes_first(tmp_path, end):
    """As recognisers of text return their scores; the file is compared where it is loaded."""
    net = ImageNet((1, 3, 4, 7))
    y = net.add("Transpose", net.add("Relu", "x"), perm=[3, 0, 1, 2])
    if end == "steps":
        flat = net.add("Reshape", y, net.weight(np.array([7, 1, 12])))
        y = net.add("MatMul", flat, net.weight(images(12, 5)))
    path = saved(tmp_path, net.proto(y))
    x = images(1, 3, 4, 7)
    (wanted,) = run(path, x)
    file = exported(tmp_path, load(path).model)
    (found,) = run(file, x)
    assert (wanted.shape, found.shape) == (
        ((7, 1, 5), (1, 7, 5)) if end == "steps" else ((7, 1, 3, 4), (1, 7, 3, 4))
    )
    np.testing.assert_allclose(found, wanted.swapaxes(0, 1), atol=1e-5)
