"""Comparisons, truths and choices against PyTorch, in all forms that exporters write."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
pytestmark = pytest.mark.torch

ROUTES = [(1, None), (4, "core"), (None, None), (1, 17)]
routes = pytest.mark.parametrize("route", ROUTES, ids=str)


def slopes(count: int) -> Any:
    module = nn.PReLU(count)
    module.weight.data = torch.linspace(-0.3, 0.7, count)
    return module


ACTIVATIONS: dict[str, tuple[Any, list[str]]] = {
    "prelu": (slopes(3), ["PRelu"]),
    "prelu of one slope": (slopes(1), ["LeakyRelu"]),
    "softplus": (nn.Softplus(), ["softplus"]),
    "softplus of another beta": (nn.Softplus(3.0), ["Scale", "softplus", "Scale"]),
    "mish": (nn.Mish(), ["mish"]),
    "celu": (nn.CELU(0.6), ["Scale", "Elu"]),
    "threshold at its value": (nn.Threshold(0.1, 0.1), ["Clip"]),
    "threshold": (nn.Threshold(0.1, 20.0), ["Constant", "Compare", "Constant", "Select"]),
    "where relu": (lambda x: torch.where(x > 0, x, 0.0), ["Relu"]),
    "where leaky": (lambda x: torch.where(x < 0, 0.2 * x, x), ["LeakyRelu"]),
    "where elu": (lambda x: torch.where(x >= 0, x, torch.exp(x) - 1), ["elu"]),
    "where at most": (lambda x: torch.where(x > 0.5, 0.5, x), ["Clip"]),
}


@pytest.mark.parametrize("route", [(1, None), (3, "core")], ids=str)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_found_again(kit, name, route):
    module, wanted = ACTIVATIONS[name]
    graph = kit.agree(module, (3, 4, 5), route)
    assert [getattr(n.op, "curve", type(n.op).__name__) for n in graph.nodes] == wanted


def test_softplus_does_not_overflow(kit):
    kit.agree(lambda x: F.softplus(200 * x) + F.mish(100 * x), (3, 4, 5), (1, "core"))


def test_slopes_of_lines_are_those_of_channels(kit):
    kit.agree(slopes(4), (4, 4), (1, "core"))
    kit.agree(
        lambda x: torch.where(x > 0, x, x * torch.linspace(0, 1, 4)[:, None, None].expand(4, 1, 4)),
        (4, 4, 4),
        (1, "core"),
    )
    kit.agree(lambda x: torch.where(x > 0, x, x * torch.linspace(0, 1, 4)), (4, 4, 4), (1, None))


FORMS: dict[str, Callable[[Any], Any]] = {
    "of two tensors": lambda x: torch.where(x > x.mean((2, 3), keepdim=True), x, x * x),
    "of a scalar": lambda x: torch.where(x > 0.3, 2 * x, -1.0) + (x > 0.1).float(),
    "of constants": lambda x: torch.where(x > torch.linspace(-1, 1, 5), x, torch.ones(3, 1, 5)),
    "of truths": lambda x: (((x > 0) & (x < 1)) | ~(x >= -1)).float() + ((x > 0) ^ (x > 1)).to(int),
    "of equals": lambda x: torch.where(x.round() == 0, 0.0, 1 / x) + (x.round() != 1).float(),
    "mirrored": lambda x: (x.relu() < x.exp()) * x + (torch.linspace(-1, 1, 5) >= x).float(),
    "with itself": lambda x: torch.where(x == x, x, 0.0) + (x > x).float(),
    "filled": lambda x: x.masked_fill(x < x.amax(1, True) - 1, -float("inf")).softmax(1),
    "quotient without division by zero": lambda x: torch.where(
        x.relu() == 0, torch.zeros(()), x / x.relu()
    ),
    "sign": lambda x: x.sign() * x.abs().sqrt(),
    "hard shrink": nn.Hardshrink(),
    "soft shrink": nn.Softshrink(),
    "log-sigmoid": nn.LogSigmoid(),
    "least": lambda x: x.amin((2, 3)) - x.amin(1).mean((1, 2))[:, None],
}


@routes
@pytest.mark.parametrize("name", sorted(FORMS))
def test_choices(kit, name, route):
    kit.agree(FORMS[name], (3, 4, 5), route, 1e-5)


BROADCAST = [(3, 4, 4), (1, 4, 4), (3, 1, 1), (1, 1, 4), (4, 1)]


@pytest.mark.parametrize("route", [(1, None), (3, None)], ids=str)
@pytest.mark.parametrize("where", [*itertools.permutations(range(3))], ids=str)
@pytest.mark.parametrize("shape", BROADCAST, ids=str)
def test_three_operands_broadcast(kit, shape, where, route):
    def function(x: Any) -> Any:
        thin = x.mean((2,), keepdim=True)
        turned = x.permute(0, 1, 3, 2).tanh()
        operands = (x, turned, (thin, torch.ones(shape))[shape != (3, 4, 4)])
        which, yes, no = (operands[i] for i in where)
        return torch.where(which > 0.1, yes, no)

    kit.agree(function, (3, 4, 4), route)
