"""Graphs within exported graphs: which are inlined, and under what names."""

from typing import Any

import pytest
import torch
from pt2_programs import assert_same, block, edited, find, graph, read, targets, tensor
from torch import Tensor, nn

from dfq_jax.io.frontends.program import Ref
from dfq_jax.io.frontends.pt2_graph import read_pt2

pytestmark = pytest.mark.torch


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
