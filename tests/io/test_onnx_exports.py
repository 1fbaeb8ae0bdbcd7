"""What PyTorch exports as ONNX, and what is said where its batch norms are gone."""

import contextlib
import io
import random
import warnings
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_protos import W, model, node, read

from dfq_jax.errors import DfqError
from dfq_jax.io.frontends.lost_norms import folded_batch_norm_message
from dfq_jax.io.frontends.onnx_graph import read_onnx_program
from dfq_jax.io.frontends.program import Program

# what PyTorch exports


def torch_bytes(**options: Any) -> bytes:
    """A small network of PyTorch with trained-looking batch norms, exported."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU6(),
        torch.nn.Conv2d(8, 8, 3, groups=8),
        torch.nn.BatchNorm2d(8),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 4),
    ).eval()
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.zeros(1, 3, 8, 8),), buffer, dynamo=False, **options)
    return buffer.getvalue()


def kept() -> dict[str, Any]:
    """The options our message recommends."""
    torch = pytest.importorskip("torch")
    return {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}


@pytest.mark.torch
@pytest.mark.parametrize("opset", [11, 13, 17, 18, 20])
def test_recommended_export_keeps_batch_norms_and_parameter_paths(opset):
    data = torch_bytes(opset_version=opset, **kept())
    program = read_onnx_program(data, "net.onnx", None)
    targets = [call.target for call in program.calls]
    assert targets.count("onnx.BatchNormalization") == 2
    assert folded_batch_norm_message(program, "net.onnx") is None
    assert program.inputs[0].shape == (1, 3, 8, 8)
    assert {"0.weight", "1.running_var", "4.bias", "7.weight"} <= set(program.paths)
    reference = onnx.load_model_from_string(data)
    for tensor in reference.graph.initializer:
        expected = numpy_helper.to_array(tensor)
        got = program.arrays[tensor.name]
        assert (got.dtype, got.tolist()) == (expected.dtype, expected.tolist())
    assert len(program.calls) + targets.count("onnx.Constant") == sum(
        n.op_type != "Constant" for n in reference.graph.node
    )
    assert all(call.kwargs["opset_version"] == opset for call in program.calls)
    assert targets[0] == "onnx.Conv"
    assert program.calls[0].kwargs["kernel_shape"] == (3, 3)
    assert program.calls[0].path == "/0/Conv"


@pytest.mark.torch
def test_default_export_is_recognised_as_folded():
    program = read_onnx_program(torch_bytes(), "net.onnx", None)
    message = folded_batch_norm_message(program, "net.onnx")
    assert message is not None
    assert "2 convolutions, 2 of them with a bias, and no batch norm" in message
    assert not any(name.startswith("onnx::") for name in program.paths)


@pytest.mark.torch
def test_truncations_and_flipped_bytes_end_in_a_typed_error():
    data = torch_bytes()
    for percent in range(0, 100, 2):
        with pytest.raises(DfqError, match=r"net\.onnx"):
            read_onnx_program(data[: len(data) * percent // 100], "net.onnx", None)
    rng = random.Random(0)
    read_well = 0
    for _ in range(600):
        blob = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            blob[rng.randrange(len(blob))] = rng.randrange(256)
        with contextlib.suppress(DfqError):
            read_well += bool(read_onnx_program(bytes(blob), "net.onnx", None))
    assert 0 < read_well < 600


# batch norms that are gone


def convolutions(*biased: bool, last: str = "Relu") -> Program:
    nodes = [
        node("Conv", [f"v{i}", "w", "w"] if bias else [f"v{i}", "w"], [f"v{i + 1}"])
        for i, bias in enumerate(biased)
    ]
    image = helper.make_tensor_value_info("v0", TensorProto.FLOAT, ["n", 3, None, 32])
    end = node(last, [f"v{len(nodes)}"], ["y"])
    return read(model(*nodes, end, inputs=[image], weights=[W]))


def test_folded_message_says_what_why_and_how():
    message = folded_batch_norm_message(convolutions(*[True] * 4, False), "net.onnx")
    assert message is not None
    for part in (
        "net.onnx has 5 convolutions, 4 of them with a bias, and no batch norm",
        "synthesis and range estimation need their statistics",
        "torch.export.save(torch.export.export(model.eval(), (torch.zeros(1, 3, 224, 32),)), "
        '"net.pt2")',
        'torch.onnx.export(model.eval(), (torch.zeros(1, 3, 224, 32),), "net.onnx", '
        "training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False, dynamo=False)",
        "`no_bn_fallback=True`",
        "no_bn_fallback=True",
        "expect lower accuracy",
    ):
        assert part in message
    assert message.index(".pt2") < message.index("torch.onnx.export")


@pytest.mark.parametrize(
    ("biased", "last"),
    [
        ((), "Relu"),
        ((False, False), "Relu"),
        ((True, True, True, False), "Relu"),
        ((True, True), "BatchNormalization"),
        ((True, True), "InstanceNormalization"),
        ((True, True), "LayerNormalization"),
        ((True, True), "GroupNormalization"),
    ],
)
def test_other_networks_get_no_message(biased, last):
    assert folded_batch_norm_message(convolutions(*biased, last=last), "net.onnx") is None
