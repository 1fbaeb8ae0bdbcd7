"""Activations, arithmetic with every kind of operand, joins and masks against PyTorch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from drawn_networks import ROUTES, examples, space
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
pytestmark = pytest.mark.torch

FLAG = st.booleans()


def numbers(shape: tuple[int, ...], seed: int = 1) -> Any:
    """Numbers between 0.5 and 1.5."""
    values = np.random.default_rng(seed).uniform(0.5, 1.5, size=shape)
    return torch.from_numpy(values.astype(np.float32))


PLAIN: dict[str, Callable[[Any], Any]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "relu6 module": nn.ReLU6(),
    "leaky": lambda x: F.leaky_relu(x, 0.3),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hard-swish": lambda x: F.hardswish(3 * x),
    "hard-sigmoid": lambda x: F.hardsigmoid(3 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    "elu of another alpha": lambda x: F.elu(2 * x, 0.4),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.7),
    "log": lambda x: (x.abs() + 0.1).log(),
    "round": lambda x: torch.round(2 * x + 0.3) + x,
    "log-softmax": lambda x: F.log_softmax(x, 1),
    "minimum": lambda x: torch.minimum(x, -0.3 * x),
    "mish": F.mish,
    "softplus": F.softplus,
    "softplus far": lambda x: F.softplus(30 * x),
    "exp": torch.exp,
    "sqrt": lambda x: (x.abs() + 0.1).sqrt(),
    "rsqrt": lambda x: (x.abs() + 0.5).rsqrt(),
    "reciprocal": lambda x: (x.abs() + 0.5).reciprocal(),
    "pow": lambda x: x**3 + (x.abs() + 0.1) ** 0.5 + x.square(),
    "abs": torch.abs,
    "erf": torch.erf,
    "neg": lambda x: -x,
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "clamp below": lambda x: x.clamp(min=-0.2),
    "clamp above": lambda x: torch.clamp(x, max=0.2),
    "clamp to ReLU": lambda x: x.clamp(min=0),
    "clamp nothing positive": lambda x: x.clamp(max=0),
    "clamp min and max": lambda x: x.clamp_min(-0.1).clamp_max(0.6),
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.4),
    "hardtanh from 0": lambda x: F.hardtanh(x, 0.0, 0.4),
    "dropout": lambda x: F.dropout(x, 0.5, training=False) + 1,
    "modules that do nothing": nn.Sequential(nn.Dropout(), nn.Identity(), nn.Dropout2d()),
    "clone": lambda x: x.clone().contiguous() * x.detach(),
    "to": lambda x: x.to(torch.float32).float().type_as(x) + 1,
    "numbers": lambda x: 2 * x / 4 - 1 + (3 - x) - (1.5 - 2 * x) / 3,
    "quotient": lambda x: 2 / (x.abs() + 0.5),
    "alpha": lambda x: torch.add(x, x.exp(), alpha=0.5) - torch.rsub(x, 3.0, alpha=2.0),
    "sub alpha": lambda x: torch.sub(x, x.exp(), alpha=0.5) + torch.sub(x, 4, alpha=2),
    "maximum": lambda x: torch.maximum(x, -0.3 * x),
    "maximum with a constant": lambda x: torch.maximum(x, torch.tensor(0.25)),
}


@examples(20)
@given(st.data(), ROUTES)
def test_functions_of_each_element(kit, data, route):
    name = data.draw(st.sampled_from(sorted(PLAIN)))
    shape = space(data.draw, data.draw(st.integers(1, 3)), 1, 4)
    kit.agree(PLAIN[name], shape, route)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_every_function_once(kit, name):
    kit.agree(PLAIN[name], (3, 2, 4))


@examples(12)
@given(st.data(), ROUTES)
def test_learned_slopes(kit, data, route):
    shape = space(data.draw, data.draw(st.integers(1, 3)), 1, 4)
    count = data.draw(st.sampled_from([1, shape[0]]))
    module = nn.PReLU(count)
    module.weight.data = torch.rand(count) - 0.3
    kit.agree(module, shape, route)


@examples(15)
@given(st.data(), ROUTES)
def test_softmax_along_any_axis(kit, data, route):
    shape = space(data.draw, data.draw(st.integers(1, 3)), 1, 4)
    axis = data.draw(st.integers(1, len(shape)))
    axis = axis - len(shape) - 1 if data.draw(FLAG) else axis
    kit.agree(lambda x: (2 * x).softmax(axis), shape, route)


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "reversed sub": lambda x, y: y - x,
    "reversed div": lambda x, y: y / x,
    "maximum": torch.maximum,
    "add alpha": lambda x, y: torch.add(y, x, alpha=0.3),
}


@examples(40)
@given(st.data(), ROUTES)
def test_arithmetic_with_constants_of_every_shape(kit, data, route):
    draw = data.draw
    shape = space(draw, draw(st.integers(1, 3)), 1, 4)
    operation = OPERATIONS[draw(st.sampled_from(sorted(OPERATIONS)))]
    rank = draw(st.integers(0, len(shape) + 1))
    full = (1, *(n if n > 1 or draw(FLAG) else draw(st.integers(1, 3)) for n in shape))
    other = numbers(tuple(n if draw(FLAG) else 1 for n in full[len(full) - rank :]))
    kit.agree(lambda x: operation(x.abs() + 0.5, other), shape, route)


@examples(25)
@given(st.data(), ROUTES)
def test_arithmetic_of_two_tensors_of_every_shape(kit, data, route):
    draw = data.draw
    shape = space(draw, 3, 1, 4)
    operation = OPERATIONS[draw(st.sampled_from(sorted(OPERATIONS)))]
    sides = []
    for _ in range(2):
        order = draw(st.sampled_from([(0, 1, 2, 3), (0, 1, 3, 2), (0, 3, 2, 1)]))
        axes = [a for a in (1, 2, 3) if draw(st.integers(0, 2)) == 0]
        sides.append((order, axes, draw(FLAG)))

    def side(x: Any, order: tuple[int, ...], axes: list[int], layer: bool) -> Any:
        x = x.abs() + 0.5
        x = (x * 1.5).tanh() if layer else x
        x = x.mean(axes, keepdim=True) if axes else x
        equal = all(shape[o - 1] == n for o, n in zip(order[1:], shape, strict=True))
        return x.permute(order) if equal else x

    kit.agree(lambda x: operation(side(x, *sides[0]), side(x, *sides[1])), shape, route)


@examples(30)
@given(st.data(), ROUTES)
def test_tensors_beside_each_other(kit, data, route):
    draw = data.draw
    shape = space(draw, draw(st.integers(1, 3)), 1, 4)
    axis = draw(st.integers(1, len(shape)))
    kinds = ["x", *(draw(st.sampled_from(["x", "y", "constant", "slice"])) for _ in range(2))]
    kinds = draw(st.permutations(kinds))
    other = numbers((1, *(n + (i == axis) for i, n in enumerate(shape, 1))))
    stacked = draw(FLAG) and not {"constant", "slice"} & set(kinds)

    def function(x: Any) -> Any:
        makers = {
            "x": lambda: x,
            "y": lambda: x.exp(),
            "slice": lambda: x.narrow(axis, 0, 1),
            "constant": lambda: other.expand(x.shape[0], *other.shape[1:]),
        }
        parts = [makers[k]() for k in kinds]
        return torch.stack(parts, axis) if stacked else torch.cat(parts, axis - len(shape) - 1)

    kit.agree(function, shape, route)


@examples(25)
@given(st.data(), ROUTES)
def test_padding(kit, data, route):
    draw = data.draw
    shape = space(draw, draw(st.integers(1, 3)), 3, 5)
    mode = draw(st.sampled_from(["constant", "reflect", "replicate", "circular"]))
    some = draw(st.integers(1, len(shape))) if mode == "constant" else len(shape) - 1
    least = -1 if mode == "constant" else 0
    widths = space(draw, 2 * some, least, 2)
    extra = {"value": draw(st.sampled_from([0.0, -1.5]))} if mode == "constant" else {}
    if widths:
        kit.agree(lambda x: F.pad(x, widths, mode=mode, **extra) + 1, shape, route)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_negative_widths_of_other_modes_crop(kit, mode):
    kit.agree(lambda x: F.pad(x, (-1, 2, 1, -2), mode=mode), (2, 5, 6))


@examples(15)
@given(st.data(), ROUTES)
def test_masks(kit, data, route):
    draw = data.draw
    shape = space(draw, 3, 1, 3)
    mask = numbers((1, *(n if draw(FLAG) else 1 for n in shape)), draw(st.integers(0, 9))) > 1
    other = numbers((1, *(n if draw(FLAG) else 1 for n in shape)))
    functions = [
        lambda x: torch.where(mask, x, other),
        lambda x: torch.where(mask, other, x),
        lambda x: torch.where(mask, x, 2 * x.tanh()),
        lambda x: x.masked_fill(mask, 0.25),
        lambda x: x.masked_fill(mask, 0.0),
    ]
    kit.agree(draw(st.sampled_from(functions)), shape, route)
