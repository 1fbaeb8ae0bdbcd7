"""Exported graphs as programs: what they compute, how they are named, and what is refused."""

import functools
import io
import json
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.program import Call, Program, Ref
from dfq_jax.io.pt2_graph import read_pt2

pytestmark = pytest.mark.torch
MODEL = "models/model.json"
Change = Callable[[Any], Any]
OPERATORS = {"_operator": "operator", "math": "math"}


def exported(module: nn.Module, *inputs: Any, decompose: bool = False, **options: Any) -> bytes:
    """What torch.export.save writes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, inputs, **options)
        torch.export.save(program.run_decompositions({}) if decompose else program, buffer)
    return buffer.getvalue()


def read(module: nn.Module, *inputs: Any, **options: Any) -> Program:
    return read_pt2(exported(module.eval(), *inputs, **options), "net.pt2")


def targets(program: Program) -> list[str]:
    return [call.target for call in program.calls]


def find(program: Program, target: str) -> Call:
    """The only call of an operator."""
    (call,) = (call for call in program.calls if call.target == target)
    return call


def literal(value: Any) -> Any:
    """A literal as PyTorch takes it."""
    kinds = (torch.dtype, torch.layout, torch.memory_format)
    meant = getattr(torch, value, None) if isinstance(value, str) else None
    return meant if isinstance(meant, kinds) else value


def evaluate(program: Program, *inputs: Tensor) -> list[Tensor]:
    """Runs a program with PyTorch's operators; every name is written once and never changed."""
    env: dict[str, Any] = {n: torch.tensor(a) for n, a in program.arrays.items()}
    env |= {given.name: x for given, x in zip(program.inputs, inputs, strict=True)}

    def value(argument: Any) -> Any:
        if isinstance(argument, Ref):
            found = env[argument.name]
            return found.clone() if isinstance(found, Tensor) else found
        if isinstance(argument, tuple):
            return [value(each) for each in argument]
        return literal(argument)

    for call in program.calls:
        args, kwargs = value(call.args), {k: value(v) for k, v in call.kwargs.items()}
        space, name, *overload = call.target.split(".")
        if space == "aten":
            function = getattr(getattr(torch.ops.aten, name), overload[0])
            if "x" in kwargs:
                kwargs[vars(function)["_schema"].arguments[0].name] = kwargs.pop("x")
        else:
            function = getattr(torch if space == "torch" else __import__(OPERATORS[space]), name)
            args, kwargs = [*args, *kwargs.values()], {}
        results = function(*args, **kwargs)
        results = results if isinstance(results, tuple | list) else [results]
        for output, result in zip(call.outputs, results, strict=True):
            assert output not in env
            env |= {} if output is None else {output: result}
    return [env[name] for name in program.outputs]


def assert_same(program: Program, module: nn.Module, *inputs: Tensor) -> None:
    """The program computes what the module computes, and holds its weights bit for bit."""
    with torch.no_grad():
        expected = module.eval()(*(x.clone() for x in inputs))
        got = evaluate(program, *inputs)
    expected = expected if isinstance(expected, tuple | list) else [expected]
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    state = module.state_dict()
    for name, path in program.paths.items():
        if path in state:
            assert program.arrays[name].tobytes() == state[path].contiguous().numpy().tobytes()


class Block(nn.Module):
    """A reused module, branches, functional operators and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.bn = nn.BatchNorm2d(3)
        self.register_buffer("scale", torch.rand(3, 1, 1), persistent=False)
        self.offset = torch.arange(3.0)
        self.deep = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(self.conv(x))))
        if self.deep:
            y = y + F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1)
        return (
            y * self.scale
            + self.offset.view(3, 1, 1)
            + torch.tensor([1.0, 2.0, 3.0])[:, None, None]
        )


@functools.cache
def block() -> tuple[Block, bytes]:
    torch.manual_seed(0)
    net = Block().eval()
    net.bn.running_var = torch.rand(3) + 0.5
    return net, exported(net, torch.zeros(1, 3, 8, 8))


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


class InPlace(nn.Module):
    """In-place operators whose argument is read again under its old name."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = y.relu_().add_(1)
        y.mul_(3)
        x.sub_(1)
        return y + z + x


def test_in_place_operators_keep_their_meaning():
    program = read(InPlace(), torch.zeros(2, 3))
    assert_same(program, InPlace(), torch.randn(2, 3))
    total = program.calls[-2].kwargs
    assert total["x"] == total["other"] == Ref("mul_")
    functional = read(InPlace(), torch.zeros(2, 3), decompose=True)
    assert_same(functional, InPlace(), torch.randn(2, 3))
    assert functional.notes == ("the network writes into its input x; the imported one does not",)


class Through(nn.Module):
    """Changes a tensor through one view of it and reads another."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        view = y.view(-1)
        if self.kind == "whole":
            y.relu_()
            return view * 2
        if self.kind == "dropout":
            F.dropout(y, training=False).relu_()
            return y
        grid = torch.broadcast_tensors(y, torch.zeros(2, 2, 3))[0]
        y.add_(1)
        return grid * 2


@pytest.mark.parametrize("kind", ["whole", "dropout", "list"])
def test_changes_through_views_are_refused_and_the_way_out_works(kind):
    with pytest.raises(UnsupportedModelError, match=r"reads .* in place through.*run_decompos"):
        read(Through(kind), torch.zeros(2, 3))
    program = read(Through(kind), torch.zeros(2, 3), decompose=True)
    if kind == "whole":  # in the others PyTorch's own decomposition takes views for copies
        assert_same(program, Through(kind), torch.randn(2, 3))


class Parts(nn.Module):
    """Writes into parts of tensors, as masks are made."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mask = x.new_zeros(4, 4)
        for at, rows in enumerate((slice(0, 1), slice(1, 3), slice(3, None))):
            mask[rows, 0:3:2] = float(at)
        y = x * 2
        row = y[1]
        row.mul_(3).add_(1)
        y[:, 1] -= 5
        y[0][2] = x[1, 1]
        y.relu_().unsqueeze_(0).squeeze_(0)
        y[2] = 7.0
        return mask, y, y[1], y[2] * 2


def test_changes_of_slices_are_written_back():
    program = read(Parts(), torch.zeros(4, 4))
    assert_same(program, Parts(), torch.randn(4, 4))
    kinds = set(targets(program))
    assert {"aten.slice_scatter.default", "aten.select_scatter.default"} <= kinds


def test_other_slices_of_a_changed_tensor_are_refused():
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            row, column = y[0], y[:, 0]
            row.relu_()
            return column * 2

    with pytest.raises(UnsupportedModelError, match=r"in place through a view"):
        read(Other(), torch.zeros(2, 3))


def test_slices_of_many_slices_are_refused():
    class Deep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = part = x * 2
            for _ in range(9):
                part = part[0]
            part.relu_()
            return y

    with pytest.raises(UnsupportedModelError, match="slice of over 8 slices in place"):
        read(Deep(), torch.zeros((1,) * 10))


class Fixed(nn.Module):
    """Results that need no gradients, inside and around ones that do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x + 1
        with torch.no_grad():
            mul = y * 2
            a, b = self.inner(mul), mul.relu_()
            with torch.enable_grad():
                c = a * b
        return a, b + mul, c * 3


def test_no_grad_is_inlined():
    net = Fixed()
    program = read(net, torch.zeros(2, 3))
    assert all(target.startswith("aten.") for target in targets(program))
    assert_same(program, net, torch.randn(2, 3))
    assert find(program, "aten.linear.default").path == "inner"


class Cast(nn.Module):
    def __init__(self, enabled: bool):
        super().__init__()
        self.enabled = enabled
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.fc(x) * 2


def test_autocast_is_inlined_with_a_note():
    program = read(Cast(True), torch.zeros(2, 3))
    assert targets(program) == ["aten.linear.default", "aten.mul.Tensor"]
    (note,) = program.notes
    assert "autocast to bfloat16" in note
    net = Cast(False)
    program = read(net, torch.zeros(2, 3))
    assert program.notes == ()
    assert_same(program, net, torch.randn(2, 3))


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda v: v * 2, lambda v: v - 1, (x,))


def test_other_nested_graphs_stay_calls():
    program = read(Branch(), torch.zeros(2, 3))
    call = find(program, "higher_order.cond")
    assert call.kwargs == {}
    assert [type(a) for a in call.args] == [Ref, str, str, tuple]
    assert program.outputs == call.outputs


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


TRAINING = {
    "batch norm": nn.BatchNorm2d(3),
    "dropout": nn.Dropout(0.5),
    "instance norm": nn.InstanceNorm2d(3, track_running_stats=True),
}


@pytest.mark.parametrize("kind", TRAINING)
@pytest.mark.parametrize("decompose", [False, True])
def test_training_mode_is_refused(kind, decompose):
    data = exported(TRAINING[kind].train(), torch.randn(2, 3, 4, 4), decompose=decompose)
    with pytest.raises(UnsupportedModelError, match=r"Call model\.eval\(\) before exporting"):
        read_pt2(data, "net.pt2")


def test_norms_without_statistics_are_not_training():
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3))
    program = read(net, torch.zeros(2, 3, 4, 4))
    assert program.calls[0].kwargs["running_mean"] is None


def test_networks_that_keep_state_are_refused():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return x + self.steps

    for decompose in (False, True):
        with pytest.raises(UnsupportedModelError, match="steps"):
            read(Counter(), torch.zeros(1), decompose=decompose)


def edited(data: bytes, change: Change) -> bytes:
    """The same archive with its model description changed in place."""
    source = zipfile.ZipFile(io.BytesIO(data))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith(MODEL):
                record = json.loads(content)
                change(record)
                content = json.dumps(record).encode()
            target.writestr(name, content)
    return buffer.getvalue()


def graph(change: Change) -> Change:
    return lambda record: change(record["graph_module"]["graph"])


def node(at: int, **fields: Any) -> Change:
    return graph(lambda g: g["nodes"][at].update(fields))


def tensor(name: str) -> dict[str, Any]:
    return {"as_tensor": {"name": name}}


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


def test_values_inside_inlined_graphs_get_free_names():
    def wrap(g: Any) -> None:
        """Runs the last node inside a nested graph that names everything `x`."""
        last = g["nodes"].pop()
        names = [i["arg"] for i in last["inputs"] if "as_tensor" in i["arg"]]
        local = [tensor("x"), tensor("y")]
        for record, name in zip(
            [i for i in last["inputs"] if i["arg"] in names], local, strict=True
        ):
            record["arg"] = name
        outputs, last["outputs"] = last["outputs"], [tensor("conv2d")]
        inner = {"inputs": local, "outputs": [tensor("conv2d")], "nodes": [last]}
        arguments = [{"as_graph": {"name": "g", "graph": inner}}, *names]
        inputs = [{"name": "", "arg": a} for a in arguments]
        target = "torch.ops.higher_order.wrap"
        g["nodes"].append({"target": target, "inputs": inputs, "outputs": outputs, "metadata": {}})

    net, data = block()
    program = read_pt2(edited(data, graph(wrap)), "net.pt2")
    assert_same(program, net, torch.randn(1, 3, 8, 8))
    assert program.outputs == ("conv2d_2",)


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
