"""Programs read from exported networks, and a PyTorch evaluator to judge them by."""

import functools
import io
import json
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq_jax.io.frontends.program import Call, Program, Ref
from dfq_jax.io.frontends.pt2_graph import read_pt2

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
