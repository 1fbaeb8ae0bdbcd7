"""Exported graphs as programs: what they compute, and how they are named."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pt2_programs import (
    assert_same,
    block,
    edited,
    evaluate,
    exported,
    find,
    graph,
    node,
    read,
    targets,
    tensor,
)
from torch import Tensor, nn

from dfq_jax.io.frontends.program import Ref
from dfq_jax.io.frontends.pt2_graph import read_pt2

pytestmark = pytest.mark.torch


def test_block():
    net, data = block()
    program = read_pt2(data, "net.pt2")
    assert_same(program, net, torch.randn(1, 3, 8, 8))
    assert [(i.name, i.shape) for i in program.inputs] == [("x", (1, 3, 8, 8))]
    assert program.paths["p_conv_weight"] == "conv.weight"
    assert program.paths["b_scale"] == "scale"
    assert set(program.arrays) - set(program.paths) == {"c_offset", "c_lifted_tensor_0"}
    assert program.notes == ()
    assert program.outputs == program.calls[-1].outputs


def test_names_and_module_paths():
    program = read_pt2(block()[1], "net.pt2")
    first, second, norm, act = program.calls[:4]
    assert first.target == "aten.conv2d.default"
    assert first.args == ()
    assert list(first.kwargs) == ["x", "weight", "bias", "stride", "padding"]
    assert first.kwargs["x"] == Ref("x")
    assert first.kwargs["weight"] == second.kwargs["weight"] == Ref("p_conv_weight")
    assert first.kwargs["stride"] == (1, 1)
    assert second.kwargs["x"] == Ref(first.outputs[0] or "")
    assert first.path == second.path == "conv"  # not conv@1
    assert (norm.path, norm.kwargs["training"]) == ("bn", False)
    assert (act.target, act.path) == ("aten.relu_.default", "act")
    assert program.calls[-1].path == ""


class Nested(nn.Module):
    """Modules within modules, one of them reached by two names."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.ReLU())})
        self.layers["b"] = self.layers["a"]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers["b"](self.layers["a"](x))


def test_nested_and_reused_modules():
    net = Nested()
    program = read(net, torch.zeros(1, 4))
    assert_same(program, net, torch.randn(1, 4))
    assert [call.path for call in program.calls] == [
        "layers.a.0",
        "layers.a.1",
        "layers.b.0",
        "layers.b.1",
    ]
    assert len({id(array) for array in program.arrays.values()}) == 2


class Several(nn.Module):
    """Operators with several results, read and unread."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, _, c = torch.split(x, 2, 1)
        best, _ = F.max_pool2d(x, 2, return_indices=True)
        top, at = torch.max(x, 1)
        d, e = torch.chunk(a, 2, 1)
        f = x.unbind(0)[0]
        return a + c, best, top, at, d * e, f


def test_operators_with_several_results():
    net = Several()
    program = read(net, torch.zeros(2, 6, 4, 4))
    assert_same(program, net, torch.randn(2, 6, 4, 4))
    split = find(program, "aten.split.Tensor").outputs
    assert [name is None for name in split] == [False, True, False]
    assert find(program, "aten.max_pool2d_with_indices.default").outputs[1] is None
    assert len(find(program, "aten.unbind.int").outputs) == 2


class Literals(nn.Module):
    """Arguments of many kinds."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.clamp(x, min=-float("inf"), max=1.0)
        z = torch.cat([x.to(torch.float64), y.double()], 1).to(memory_format=torch.channels_last)
        w = F.interpolate(x, scale_factor=2.0, mode="bilinear", antialias=False)
        ones = torch.ones(3, dtype=torch.int32, device="cpu", layout=torch.strided)
        picked = x[:, ones.long(), None, 0]
        return y, z, w, picked, F.gelu(x, approximate="tanh"), torch.full_like(x, float("nan"))


def test_literals():
    net = Literals()
    program = read(net, torch.zeros(1, 4, 4, 4))
    with torch.no_grad():
        x = torch.ones(1, 4, 4, 4)
        results = zip(evaluate(program, x), net(x), strict=True)
    for mine, theirs in results:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert find(program, "aten.clamp.default").kwargs["min"] == -float("inf")
    assert "float64" in [call.kwargs.get("dtype") for call in program.calls]
    ones = find(program, "aten.ones.default")
    assert ones.kwargs["dtype"] == "int32"
    assert ones.kwargs["device"] == "cpu"
    assert "channels_last" in [call.kwargs.get("memory_format") for call in program.calls]
    assert find(program, "aten.gelu.default").kwargs["approximate"] == "tanh"
    assert find(program, "aten.index.Tensor").kwargs["indices"][0] is None
    assert isinstance(find(program, "aten.cat.default").kwargs["tensors"], tuple)


class Shapes(nn.Module):
    """Computes with the sizes of its input."""

    def forward(self, x: Tensor) -> Tensor:
        batch, height = x.shape[0], x.shape[2]
        y = x.reshape(batch, height * 32)
        return y.mean(1, keepdim=True) * height + y.new_ones(batch, 1)


def test_dynamic_sizes():
    sizes = ({0: torch.export.Dim("b"), 2: torch.export.Dim("h", min=4, max=64)},)
    program = read(Shapes(), torch.zeros(3, 4, 8, 8), dynamic_shapes=sizes)
    assert program.inputs[0].shape == (1, 4, 8, 8)
    assert "aten.sym_size.int" in targets(program)
    product = find(program, "_operator.mul")
    assert list(product.kwargs.values())[1] == 32
    assert isinstance(next(iter(product.kwargs.values())), Ref)
    reshape = find(program, "aten.reshape.default")
    assert isinstance(reshape.kwargs["shape"][0], Ref)
    for shape in ((3, 4, 8, 8), (2, 4, 16, 8)):
        assert_same(program, Shapes(), torch.randn(shape))


def test_size_without_hint():
    def forget(record: Any) -> None:
        graph = record["graph_module"]["graph"]
        for size in graph["tensor_values"]["x"]["sizes"]:
            size.get("as_expr", {})["hint"] = None

    data = exported(
        Shapes(),
        torch.zeros(3, 4, 8, 8),
        dynamic_shapes=({0: torch.export.Dim("b"), 2: torch.export.Dim("h")},),
    )
    assert read_pt2(edited(data, forget), "net.pt2").inputs[0].shape == (1, 4, None, 8)


class Choosy(nn.Module):
    def forward(self, x: Tensor, factor: Any = None, flag: bool = True) -> tuple[Any, ...]:
        return (x * 2 if flag else x), None, x.shape[1]


def test_inputs_and_outputs_that_are_no_tensors():
    program = read(Choosy(), torch.zeros(2, 3), None, True)
    assert [i.name for i in program.inputs] == ["x"]
    assert len(program.outputs) == 1
    assert "input flag is fixed to True, as exported" in program.notes
    assert any("no tensor" in note for note in program.notes)


def test_several_inputs_and_dead_code():
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            torch.exp(x)
            return {"b": x - y, "a": y}

    program = read(Two(), torch.zeros(2, 3), torch.zeros(3))
    assert [(i.name, i.shape) for i in program.inputs] == [("x", (2, 3)), ("y", (3,))]
    assert targets(program) == ["aten.sub.Tensor"]
    assert program.outputs == (program.calls[0].outputs[0], "y")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(dtype).eval()
    program = read(net, torch.zeros(1, 3, 8, 8, dtype=dtype))
    assert {a.dtype.name for n, a in program.arrays.items() if "num_" not in n} == {
        str(dtype).removeprefix("torch.")
    }
    state = net.state_dict()
    for name, path in program.paths.items():
        raw = state[path].contiguous().flatten().view(torch.uint8).numpy()
        assert program.arrays[name].tobytes() == raw.tobytes()


@pytest.mark.parametrize(
    ("metadata", "path"),
    [
        (None, ""),
        (3, ""),
        ({}, ""),
        ({"nn_module_stack": 3}, ""),
        ({"nn_module_stack": ""}, ""),
        ({"nn_module_stack": "a,b"}, ""),
        ({"nn_module_stack": "L,,Net;k,a.b@2.c@1,torch.nn.Conv2d"}, "a.b.c"),
        ({"nn_module_stack": "k,getattr(L['self'], 'a'),torch.nn.Conv2d"}, ""),
        ({"nn_module_stack": "k,a-b.0,Net[int, str]"}, "a-b.0"),
    ],
)
def test_module_paths(metadata, path):
    program = read_pt2(edited(block()[1], node(0, metadata=metadata)), "net.pt2")
    assert program.calls[0].path == path


def test_calls_without_names_keep_their_order():
    def positional(g: Any) -> None:
        for record in g["nodes"][0]["inputs"]:
            record["name"] = ""

    program = read_pt2(edited(block()[1], graph(positional)), "net.pt2")
    assert program.calls[0].args == (
        *(Ref("x"), Ref("p_conv_weight"), Ref("p_conv_bias")),
        *((1, 1), (1, 1)),
    )
    assert program.calls[0].kwargs == {}


def test_long_chains_are_read_in_linear_time():
    def repeat(g: Any) -> None:
        relu = next(n for n in g["nodes"] if n["target"] == "torch.ops.aten.relu_.default")
        at = g["nodes"].index(relu)
        chain = [relu | {"outputs": [tensor(f"r{i}")]} for i in range(1500)]
        views = [
            {"target": "torch.ops.aten.view.default", "outputs": [tensor(f"v{i}")], "metadata": {}}
            | {"inputs": [{"name": "self", "arg": tensor("x")}]}
            for i in range(1500)
        ]
        g["nodes"][at + 1 : at + 1] = chain + views

    program = read_pt2(edited(block()[1], graph(repeat)), "net.pt2")
    assert sum(target == "aten.relu_.default" for target in targets(program)) == 1501
    assert "aten.view.default" in targets(program)  # the constant's


@pytest.mark.parametrize("name", ["x", "weight"])
def test_programs_are_plain_data(name):
    call = read_pt2(block()[1], "net.pt2").calls[0]
    assert type(call.kwargs[name]) is Ref
    assert all(isinstance(a, np.ndarray) for a in read_pt2(block()[1], "").arrays.values())
