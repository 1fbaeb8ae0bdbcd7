"""Whole networks: blocks spelled out, in-place operators, names, layouts, refusals."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from dfq_jax.errors import UnsupportedModelError, UnsupportedOpError
from dfq_jax.graph.graph import Graph

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
pytestmark = pytest.mark.torch

ROUTES = [(1, None), (4, None), (None, None), (1, 11), (4, 13), (None, 17), (None, 20)]
routes = pytest.mark.parametrize("route", ROUTES)


TABLE = torch.arange(48.0).reshape(4, 3, 4)


def kinds(graph: Graph) -> dict[str, int]:
    return dict(Counter(type(n.op).__name__ for n in graph.nodes))


def curves(graph: Graph) -> list[str]:
    return [getattr(n.op, "curve", type(n.op).__name__) for n in graph.nodes]


def normalised(module: Any) -> Any:
    """The module with batch-norm statistics as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (part.running_mean, part.running_var, part.weight, part.bias):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module


SPELLED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "silu": ("silu", lambda x: x * torch.sigmoid(x)),
    "silu, gate first": ("silu", lambda x: x.sigmoid() * x),
    "hard-sigmoid": ("hard_sigmoid", lambda x: F.relu6(x + 3) / 6),
    "hard-sigmoid by clamp": ("hard_sigmoid", lambda x: (x + 3).clamp(0, 6) * (1 / 6)),
    "hard-swish": ("hard_swish", lambda x: x * F.relu6(x + 3) / 6),
    "hard-swish, gate divided": ("hard_swish", lambda x: x * (F.hardtanh(x + 3, 0, 6) / 6)),
    "hard-swish, gate first": ("hard_swish", lambda x: F.hardsigmoid(x) * x),
    "gelu": ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
    "gelu, half last": ("gelu", lambda x: x * (1 + torch.erf(x * 0.70710678)) * 0.5),
    "gelu, half inside": ("gelu", lambda x: x * (0.5 * (1 + torch.erf(x / 2**0.5)))),
}


@pytest.mark.parametrize("route", [(1, None), (None, 17)])
@pytest.mark.parametrize("name", sorted(SPELLED))
def test_activations_spelled_out_become_one_node(kit, name, route):
    curve, function = SPELLED[name]
    assert curves(kit.agree(function, (2, 3, 4), route)) == [curve]


def test_what_only_looks_like_an_activation_stays(kit):
    kit.agree(lambda x: x * torch.sigmoid(1.1 * x) + 0.4 * x * (1 + x.erf()), (2, 3, 4))
    kit.agree(lambda x: F.relu6(x + 3) / 5 + x * F.relu6(x + 2) / 6, (2, 3, 4))


class SqueezeExcite(nn.Module):
    """Channel attention with 1 x 1 convolutions."""

    def __init__(self, pool: Callable[[Any], Any]) -> None:
        super().__init__()
        self.pool, self.down, self.up = pool, nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Any) -> Any:
        return x * self.up(self.down(self.pool(x)).relu()).sigmoid()


@routes
@pytest.mark.parametrize(
    "pool", [nn.AdaptiveAvgPool2d(1), lambda x: x.mean((2, 3), keepdim=True)], ids=["pool", "mean"]
)
def test_channel_attention_pools_in_place(kit, pool, route):
    graph = kit.agree(SqueezeExcite(pool), (4, 5, 3), route)
    assert kinds(graph) == {"GlobalAvgPool": 1, "Conv2d": 2, "Relu": 1, "Activation": 1, "Mul": 1}


@routes
def test_flatten_and_classifier_leave_no_transpose(kit, route):
    module = normalised(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(4 * 3 * 2, 5),
        )
    )
    graph = kit.agree(module, (1, 7, 5), route)
    wanted = ("Conv2d", "BatchNorm", "Relu", "MaxPool", "Flatten", "Linear")
    assert kinds(graph) == dict.fromkeys(wanted, 1)
    assert {"0", "1", "6"} <= {n.name for n in graph.nodes}


class ConvNextBlock(nn.Module):
    """Depthwise convolution, layer norm over channels by permutation, two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.down, self.gain = nn.Linear(2 * width, width), nn.Parameter(torch.rand(width))

    def forward(self, x: Any) -> Any:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gain * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


@routes
def test_opposite_permutations_cancel(kit, route):
    blocks = nn.Sequential(ConvNextBlock(4), ConvNextBlock(4))
    graph = kit.agree(blocks, (4, 5, 3), route, 1e-4)  # layer norm of four values
    assert not {"Transpose", "Reshape"} & set(kinds(graph))


class Shuffled(nn.Module):
    """A unit of ShuffleNet: halves, a branch, channels interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(3, 3, 3, padding=1, groups=3)

    def forward(self, x: Any) -> Any:
        left, right = x.chunk(2, 1)
        y = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


@routes
def test_channel_shuffle_between_units(kit, route):
    kit.agree(nn.Sequential(Shuffled(), Shuffled()), (6, 3, 5), route)


@routes
def test_lines(kit, route):
    module = normalised(
        nn.Sequential(
            nn.Conv1d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm1d(4),
            nn.ReLU(),
            nn.MaxPool1d(2, ceil_mode=route[1] is None),
            nn.Conv1d(4, 3, 2),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(3, 2),
        )
    )
    kit.agree(module, (2, 9), route)


@routes
def test_features(kit, route):
    layers = (nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU6(), nn.Linear(8, 3), nn.Softmax(-1))
    kit.agree(normalised(nn.Sequential(*layers)), (6,), route)


@routes
def test_a_view_that_cuts_across_axes(kit, route):
    weight = torch.arange(9.0).reshape(3, 3) / 9
    kit.agree(lambda x: F.linear(x.reshape(-1, 8, 3), weight), (6, 4), route)
    kit.agree(lambda x: F.linear(x.transpose(1, 2).reshape(-1, 8, 3), weight), (6, 4), route)


class Several(nn.Module):
    """Reused modules, tied weights, a branch in Python, and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Any) -> Any:
        x = self.act(self.conv(self.act(self.conv(x))))
        if x.shape[2] > 4:
            x = x[:, :, ::2]
        y = x.mean((2, 3))
        return self.second(self.first(y)), x, x.flatten(1)


@routes
def test_reused_modules_tied_weights_branches_and_outputs(kit, route):
    graph = kit.agree(Several(), (4, 6, 3), route)
    assert kinds(graph)["Conv2d"] == 2
    assert kinds(graph)["Linear"] == 2
    assert len(graph.outputs) == 3


class InPlace(nn.Module):
    """Operators that change a tensor somebody else reads by its old name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        z = y
        y.add_(x).mul_(2)
        F.relu(y, inplace=True)
        kept = z.clone()
        z.clamp_(max=1).sub_(0.25)
        return y + 2 * z + F.hardswish(kept, inplace=True) + kept


@pytest.mark.parametrize("batch", [1, 4, None])
def test_the_old_name_reads_what_an_operator_changed_in_place(kit, batch):
    kit.agree(InPlace(), (3, 4, 5), (batch, None))


def test_writing_into_a_part(kit):
    def function(x: Any) -> Any:
        y = x.clone()
        y[:, 1] = 0.5
        y[:, :, 1:3] *= 2
        y[:, 0, 0].relu_()
        return y

    kit.agree(function, (3, 4, 5))


def test_a_view_read_after_its_base_was_changed_is_right_or_refused(kit):
    def function(x: Any) -> Any:
        y = x * 2
        view = y.flatten(1)
        y.relu_()
        return view + 1

    with pytest.raises(UnsupportedModelError, match="in place"):
        kit.agree(function, (3, 4, 5))


def test_unknown_operators_are_listed_together(kit):
    class Odd(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.sin() + x.sin().cumsum(1)

    module = nn.Sequential(Odd(), nn.Sequential(nn.ReLU(), Odd()))
    with pytest.raises(UnsupportedOpError) as caught:
        kit.imported(module, (3, 4))
    text = str(caught.value)
    assert "aten.sin.default x4 at 0, 1.1" in text
    assert "aten.cumsum.default x2 at 0, 1.1" in text
    assert "relu" not in text


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.flatten(0, 1).reshape(2, -1), "view cuts the batch into pieces"),
        (lambda x: x.flip(0), "acts along the batch"),
        (lambda x: x.softmax(0), "acts along the batch"),
        (lambda x: x + x.mean(0, keepdim=True), "acts along the batch"),
        (lambda x: x.mT @ x.transpose(0, 1).flatten(1)[:, :3], "batch"),
        (lambda x: x + TABLE, "differs from image to image"),
        (lambda x: F.conv1d(x, x), "kernel is computed by the network"),
    ],
)
def test_what_mixes_images_is_refused(kit, function, message):
    with pytest.raises(UnsupportedModelError, match=message):
        kit.imported(function, (3, 4), (4, None))


def test_constants_that_repeat_along_the_batch(kit):
    table = torch.ones(1, 3, 5).repeat(4, 1, 1)
    found = kit.imported(lambda x: x.mean(2, keepdim=True) * table, (3, 5), (4, None))
    assert kinds(found.graph)["Constant"] == 1


def windows(x: Any, rows: int, columns: int) -> Any:
    """(n, h, w, c) as (n, windows, pixels, c), row-major windows of rows x columns pixels."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // rows, rows, w // columns, columns, c).transpose(2, 3)
    return x.reshape(n, -1, rows * columns, c)


def unwindows(x: Any, h: int, w: int, rows: int, columns: int) -> Any:
    """The inverse of `windows`."""
    x = x.reshape(x.shape[0], h // rows, w // columns, rows, columns, x.shape[-1])
    return x.transpose(2, 3).reshape(x.shape[0], h, w, x.shape[-1])


@pytest.mark.parametrize("batch", [1, 4, None])
def test_windows_of_two_shapes_move_the_image_once_each_way(kit, batch):
    def function(x: Any) -> Any:
        x = x.permute(0, 2, 3, 1)
        x = unwindows(windows(x, 2, 3).softmax(2), 6, 6, 2, 3)
        x = unwindows(windows(x, 3, 2).softmax(2), 6, 6, 3, 2)
        return x.permute(0, 3, 1, 2)

    graph = kit.agree(function, (2, 6, 6), (batch, None))
    assert kinds(graph)["Transpose"] <= 4
    assert "Flatten" not in kinds(graph)


@pytest.mark.parametrize("batch", [1, 4, None])
def test_a_tensor_meets_itself_along_other_axes(kit, batch):
    route = (batch, None)
    kit.agree(lambda x: x - 2 * x.mT, (4, 4), route)
    kit.agree(lambda x: torch.cat([x, x.mT], 1), (4, 4), route)
    kit.agree(lambda x: x.unsqueeze(1) - x.unsqueeze(2) / 2, (4,), route)
    kit.agree(lambda x: x @ x.mT, (4, 4), route)


def test_a_join_of_one_tensor_and_a_norm_of_one_value(kit):
    assert kinds(kit.agree(lambda x: torch.cat([x.relu()], 1), (3, 4, 5))) == {"Relu": 1}
    kit.agree(lambda x: torch.linalg.vector_norm(x, dim=(1,)), (1, 4))
