"""Archives after `run_decompositions()`: the same networks in the names of core ATen."""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.graph import Graph
from dfq_jax.io.frontends.program import Call, Program, ProgramInput, Ref
from dfq_jax.io.importing.aten_table import ATEN
from dfq_jax.io.importing.engine import import_program

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
pytestmark = pytest.mark.torch

CORE = (1, "core")
BATCHES = [(1, "core"), (4, "core"), (None, "core")]
batches = pytest.mark.parametrize("route", BATCHES)


def kinds(graph: Graph) -> dict[str, int]:
    return dict(Counter(type(n.op).__name__ for n in graph.nodes))


def trained(module: Any, shape: tuple[int, ...]) -> Any:
    """The module with statistics of noise, and parameters that are not all ones and zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(0.3 * torch.randn(value.shape))
        module.train()(2 * torch.randn(16, *shape) + 1)
    return module.eval()


def classifier() -> Any:
    convolution = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(
        convolution, nn.BatchNorm2d(8), nn.ReLU(), pool, nn.Flatten(), nn.Linear(8, 4)
    )


@batches
def test_a_classifier_is_the_same_graph_with_the_same_names(kit, route):
    net = trained(classifier(), (3, 16, 16))
    graph = kit.agree(net, (3, 8, 8), route)
    assert graph == kit.agree(net, (3, 8, 8), (1, None))
    assert [n.name for n in graph.nodes] == ["0", "1", "2", "3", "5"]


NORMS: dict[str, tuple[Callable[[], Any], tuple[int, ...], str]] = {
    "batch norm of lines": (lambda: nn.BatchNorm1d(4), (4, 6), "BatchNorm"),
    "batch norm of features": (lambda: nn.BatchNorm1d(4), (4,), "BatchNorm"),
    "batch norm without scale": (lambda: nn.BatchNorm2d(4, affine=False), (4, 3, 5), "BatchNorm"),
    "layer norm": (lambda: nn.LayerNorm([3, 5]), (4, 3, 5), "LayerNorm"),
    "layer norm without scale": (
        lambda: nn.LayerNorm(5, elementwise_affine=False),
        (4, 5),
        "LayerNorm",
    ),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 5), "GroupNorm"),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 5), "GroupNorm"),
    "instance norm of lines": (lambda: nn.InstanceNorm1d(4), (4, 6), "GroupNorm"),
    "instance norm recorded": (
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        (4, 3, 5),
        "BatchNorm",
    ),
}


@batches
@pytest.mark.parametrize("name", sorted(NORMS))
def test_norms(kit, name, route):
    make, shape, kind = NORMS[name]
    graph = kit.agree(trained(make(), shape), shape, route, 5e-5)
    assert kinds(graph)[kind] == 1


CURVES = {
    "hard_swish": nn.Hardswish(),
    "hard_sigmoid": nn.Hardsigmoid(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "elu": nn.ELU(),
    "Relu": nn.ReLU6(),
    "Clip": nn.Hardtanh(),
    "LeakyRelu": nn.LeakyReLU(0.2),
    "Softmax": nn.Softmax(1),
}


@pytest.mark.parametrize("name", sorted(CURVES))
def test_activations_are_one_node(kit, name):
    graph = kit.agree(CURVES[name], (3, 4, 5), CORE)
    assert [getattr(n.op, "curve", type(n.op).__name__) for n in graph.nodes] == [name]


POOLS = {
    "max": nn.MaxPool2d(3, 2, 1),
    "average": nn.AvgPool2d(3, 2, 1),
    "adaptive": nn.AdaptiveAvgPool2d((3, 2)),
    "uneven": nn.AdaptiveAvgPool2d((4, 3)),
    "largest": nn.AdaptiveMaxPool2d(1),
    "nearest": nn.Upsample(scale_factor=2),
    "exact": nn.Upsample(scale_factor=2, mode="nearest-exact"),
    "odd": nn.Upsample(size=(10, 11), mode="nearest-exact"),
    "bilinear": nn.Upsample(size=(10, 11), mode="bilinear"),
    "bicubic": nn.Upsample(size=(10, 11), mode="bicubic"),
    "bicubic to corners": nn.Upsample(size=(9, 5), mode="bicubic", align_corners=True),
    "reflected": nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "replicated": nn.Conv2d(3, 4, 3, padding=2, padding_mode="replicate"),
    "circular": nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "unfolded": nn.Unfold(2, stride=2),
    "transposed": nn.ConvTranspose2d(3, 4, 3, 2, 1, 1),
    "variance": lambda x: x.var((2, 3), unbiased=False) + x.std((2, 3)),
    "ends": lambda x: x.amin(2) + x.max(2)[0] + x.min(3, keepdim=True)[0].squeeze(3)[:, :, :8],
    "rolled": lambda x: x.roll((1, -2), (2, 3)),
    "places": lambda x: x[:, [2, 0, 1, 1]][..., torch.tensor([0, 3, 6, 1])],
    "grid": lambda x: x[:, :, torch.tensor([[0], [2], [5]]), torch.tensor([1, 4])],
}


@pytest.mark.parametrize("name", sorted(POOLS))
def test_pools_pads_and_gathers(kit, name):
    kit.agree(POOLS[name], (3, 9, 8), CORE)


def test_padding_that_became_a_gather_is_padding_again(kit):
    graph = kit.agree(POOLS["reflected"], (3, 9, 8), CORE)
    assert kinds(graph) == {"Pad": 2, "Conv2d": 1}


@batches
def test_a_transformer_layer_keeps_its_linear_layers(kit, route):
    layer = trained(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8))
    graph = kit.agree(layer, (5, 8), route)
    wanted = {"Linear": 4, "MatMul": 2, "Softmax": 1, "LayerNorm": 2}
    assert {k: n for k, n in kinds(graph).items() if k in wanted} == wanted
    assert "Constant" not in kinds(graph)


def test_a_matrix_for_each_row_is_no_linear_layer(kit):
    table = torch.randn(3, 5, 2)
    graph = kit.agree(lambda x: x @ table, (3, 4, 5))
    assert kinds(graph)["MatMul"] == 1
    graph = kit.agree(lambda x: x @ table[:1].expand(3, 5, 2), (3, 4, 5))
    assert "MatMul" not in kinds(graph)
    kit.agree(lambda x: x @ table[:1].expand(3, 5, 2), (1, 4, 5))


def test_sums_of_products_with_factors(kit):
    bias, weight = torch.randn(3), torch.randn(5, 3)
    kit.agree(lambda x: torch.addmm(bias, x, weight, beta=0.5, alpha=2), (5,))
    kit.agree(lambda x: torch.baddbmm(x @ x.mT, x, x.mT, beta=0.5, alpha=2), (4, 5))


@pytest.mark.parametrize(
    ("target", "rest"),
    [
        ("aten.native_batch_norm.default", {"training": False, "momentum": 0.1, "eps": 1e-3}),
        (
            "aten._native_batch_norm_legit.default",
            {"training": False, "momentum": 0.1, "eps": 1e-3},
        ),
        (
            "aten.cudnn_batch_norm.default",
            {"training": False, "exponential_average_factor": 0.1, "epsilon": 1e-3},
        ),
        ("aten._batch_norm_no_update.default", {"momentum": 0.1, "eps": 1e-3}),
        (
            "aten._batch_norm_impl_index.default",
            {"training": False, "momentum": 0.1, "eps": 1e-3, "cudnn_enabled": True},
        ),
    ],
)
def test_batch_norm_has_many_names(kit, target, rest):
    rng = np.random.default_rng(0)
    vectors = {n: rng.uniform(0.5, 2, 3).astype(np.float32) for n in ("w", "b", "m", "v")}
    names = dict(zip(("weight", "bias", "running_mean", "running_var"), "wbmv", strict=True))
    given = {"x": Ref("image"), **{k: Ref(v) for k, v in names.items()}, **rest}
    call = Call(target, (), given, ("y", None, None), "")
    program = Program((ProgramInput("image", (1, 3, 4, 5)),), vectors, {}, (call,), ("y",))
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    w, b, m, v = (torch.from_numpy(vectors[n]) for n in "wbmv")
    wanted = F.batch_norm(torch.from_numpy(x), m, v, w, b, eps=1e-3).numpy()
    (got,) = kit.outputs_of(import_program(program, ATEN), x)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x[torch.arange(3), torch.arange(3)], "pairs of places|acts along the batch"),
        (lambda x: x[:, torch.tensor([0, 1]), torch.tensor([1, 2])], "pairs of places"),
        (lambda x: x[:, torch.tensor([0, 1]), :, torch.tensor([1, 2])], "beside each other"),
    ],
)
def test_gathers_without_order_are_refused(kit, function, message):
    with pytest.raises(UnsupportedModelError, match=message):
        kit.imported(function, (4, 5, 6), (3, None))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small"])
def test_a_network_of_torchvision(kit, name):
    import zoo_networks

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = zoo_networks.network(name)
    graph = kit.agree(net, (3, 32, 32), CORE)
    assert {"hard_swish", "hard_sigmoid"} <= {getattr(n.op, "curve", "") for n in graph.nodes}
    assert kinds(graph)["BatchNorm"] == 34
    assert "features.0.0" in {n.name for n in graph.nodes}
