"""GENIE-M's loop over one unit in plain PyTorch, as released code has it; for comparison only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rounded(x: Tensor) -> Tensor:
    """Rounding with the gradient of the identity."""
    return x + (x.round() - x).detach()


class Edge(nn.Module):
    """A quantizer of activations with a learned scale; half of the elements stay in float."""

    def __init__(self, bits: int, largest: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(largest / (2**bits - 1)))
        self.most = 2**bits - 1

    def forward(self, x: Tensor) -> Tensor:
        """Half of them rounded."""
        snapped = rounded(torch.clamp(x / self.scale, 0, self.most)) * self.scale
        return torch.where(torch.rand_like(x) < 0.5, snapped, x) if self.training else x


class Soft(nn.Module):
    """A convolution or linear layer whose kernel learns soft bits and scales."""

    def __init__(self, layer: Any, bits: int = 2) -> None:
        super().__init__()
        self.layer, self.most, self.edge = layer, 2**bits - 1, Edge(bits, 2.0)
        w = layer.weight.detach()
        axes = tuple(range(1, w.ndim))
        low, high = w.amin(axes, keepdim=True), w.amax(axes, keepdim=True)
        scale = (high - low) / self.most
        self.floor, self.zero = torch.floor(w / scale), torch.round(-low / scale)
        self.bits = nn.Parameter(-torch.log(1.2 / (w / scale - self.floor + 0.1) - 1))
        self.scale = nn.Parameter(scale)

    def soft_bits(self) -> Tensor:
        """In 0..1."""
        return torch.clamp(torch.sigmoid(self.bits) * 1.2 - 0.1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """With its soft kernel while training."""
        x = self.edge(x)
        if not self.training:
            return self.layer(x)
        codes = torch.clamp(self.floor + self.soft_bits() + self.zero, 0, self.most)
        kernel = (codes - self.zero) * self.scale
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, kernel, self.layer.bias)
        return F.conv2d(x, kernel, None, self.layer.stride, self.layer.padding)


class Residual(nn.Module):
    """A residual block that reads its input through one quantizer."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = Soft(block.conv1), Soft(block.conv2)
        self.bn1, self.bn2, self.added = block.bn1, block.bn2, int(block.half)

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        x = self.conv1.edge(x)
        if self.added:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))
        return (x + y).relu()


def units(network: nn.Sequential) -> dict[str, nn.Module]:
    """{name: unit} of the CIFAR ResNet of `synthesis_loops`, in evaluation mode."""
    conv, norm, relu, *blocks, pool, flat, last = network.children()
    found: dict[str, nn.Module] = {"0": nn.Sequential(Soft(conv, 8), norm, relu)}
    found |= {str(i + 3): Residual(block) for i, block in enumerate(blocks)}
    found["last"] = nn.Sequential(pool, flat, Soft(last, 8))
    for unit in found.values():
        unit.eval()
    return found


def reconstruction(
    unit: nn.Module, exact: Tensor, rough: Tensor, targets: Tensor, steps: int, batch: int
) -> Callable[[], None]:
    """One step of the loop, to be called again and again."""
    layers = [m for m in unit.modules() if isinstance(m, Soft)]
    for p in unit.parameters():
        p.requires_grad_(False)
    bits = [v.bits.requires_grad_() for v in layers]
    scales = [v.scale.requires_grad_() for v in layers]
    edges = [v.edge.scale.requires_grad_() for v in layers]
    hard = torch.optim.Adam(bits, lr=1e-3)
    soft = torch.optim.Adam([{"params": scales, "lr": 1e-4}, {"params": edges, "lr": 4e-5}])
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(soft, steps)
    count, done = len(exact), 0

    def step() -> None:
        nonlocal done
        for layer in layers:
            layer.train()
            layer.layer.eval()
        chosen = torch.randperm(count, device=exact.device)[:batch]
        x, y, wanted = exact[chosen], rough[chosen], targets[chosen]
        found = unit(torch.where(torch.rand_like(x) < 0.5, y, x))
        beta = 20 - 18 * min(done / steps, 1)
        loose = sum((1 - (2 * v.soft_bits() - 1).abs() ** beta).sum() for v in layers)
        loss = ((found - wanted) ** 2).sum(1).mean() + loose
        hard.zero_grad()
        soft.zero_grad()
        loss.backward()
        hard.step()
        soft.step()
        falling.step()
        done += 1

    return step
