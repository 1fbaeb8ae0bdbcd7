"""Kernels that a network computes from its weights, and products added to tensors."""

import pytest

torch = pytest.importorskip("torch")
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
