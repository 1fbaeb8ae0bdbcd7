"""Kernels that a network computes from its weights, and products added to tensors."""

import pytest

torch = pytest.importorskip("torch")
parametrizations = torch.nn.utils.parametrizations
pytestmark = pytest.mark.torch


class Standardised(torch.nn.Conv2d):
    """A convolution whose kernel is standardised each time, as weight standardisation does."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        kernel = torch.nn.functional.batch_norm(
            flat, None, None, training=True, momentum=0.0, eps=1e-5
        ).reshape_as(self.weight)
        return torch.nn.functional.conv2d(x, kernel, self.bias)


class Product(torch.nn.Module):
    """Global response normalisation's last line: a product added in one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(4, 1, 1))
        self.bias = torch.nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x):
        return x + torch.addcmul(self.bias, self.weight, x * x, value=0.5)


@pytest.mark.parametrize("opset", [None, 17], ids=["pt2", "onnx"])
@pytest.mark.parametrize("network", [Standardised(3, 5, 3), Product()], ids=["kernel", "product"])
def test_agrees_with_pytorch(kit, network, opset):
    channels = 3 if isinstance(network, Standardised) else 4
    kit.agree(network.eval(), (channels, 6, 5), (1, opset))


WRAPPED = {
    "weight norm": lambda c: parametrizations.weight_norm(c),
    "weight norm along inputs": lambda c: parametrizations.weight_norm(c, dim=1),
    "weight norm of all": lambda c: parametrizations.weight_norm(c, dim=None),
    "weight norm by hook": lambda c: torch.nn.utils.weight_norm(c),
    "spectral norm": lambda c: parametrizations.spectral_norm(c),
    "spectral norm by hook": lambda c: torch.nn.utils.spectral_norm(c),
    "both": lambda c: parametrizations.spectral_norm(parametrizations.weight_norm(c)),
    "orthogonal": lambda c: parametrizations.orthogonal(c),
    "orthogonal by exponential": lambda c: parametrizations.orthogonal(
        c, orthogonal_map="matrix_exp"
    ),
    "orthogonal by Cayley": lambda c: parametrizations.orthogonal(c, orthogonal_map="cayley"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("opset", [None, "core"], ids=["pt2", "core"])
@pytest.mark.parametrize("name", sorted(WRAPPED))
def test_weights_made_from_weights_are_constants(kit, name, opset):
    if (name, opset) == ("orthogonal by Cayley", "core"):
        pytest.skip("PyTorch writes a token into it")
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4) if "orthogonal" in name else torch.nn.Conv2d(3, 4, 2)
    shape = (4,) if "orthogonal" in name else (3, 5, 4)
    wrapped = WRAPPED[name](layer)
    if "spectral" in name or name == "both":  # its singular vectors are found step by step
        wrapped.train()(torch.randn(2, *shape))
    net = torch.nn.Sequential(wrapped, torch.nn.ReLU())
    graph = kit.agree(net, shape, (1, opset))
    kinds = {type(n.op).__name__ for n in graph.nodes}
    assert kinds <= {"Conv2d", "Linear", "Flatten", "Relu"}
    assert "0" in {n.name for n in graph.nodes}


def test_weight_norm_of_transposed_convolutions_and_lines(kit):
    layer = parametrizations.weight_norm(torch.nn.ConvTranspose2d(3, 4, 3, 2))
    kit.agree(layer, (3, 4, 5))
    kit.agree(parametrizations.weight_norm(torch.nn.Conv1d(3, 4, 3)), (3, 7))


@pytest.mark.parametrize("order", [1, 2, 3, 0, float("inf"), float("-inf")])
def test_weights_divided_by_any_norm(kit, order):
    weight = torch.randn(3, 4)
    scaled = lambda: weight / torch.linalg.vector_norm(weight, order, dim=1, keepdim=True)
    kit.agree(lambda x: x @ scaled().T, (4,))
