"""GENIE-M in plain PyTorch, batch norms not folded, as released code has it; for comparison only.

Facts from the paper (Jeon et al. 2023, section 3.3) and its released code: ranges by the ratio of
the widest with the least |error|^2.4, kernels with a zero point, one scale for what both branches
of a block read, elements drawn anew for every reading.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Mode = Literal["float", "soft", "hard"]


def rounded(x: Tensor) -> Tensor:
    """Rounding with the gradient of the identity."""
    return x + (x.round() - x).detach()


def best_range(x: Tensor, low: Tensor, high: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The scale and zero point of each row, among a hundred ratios of its range."""
    found = [torch.full_like(high, torch.inf), high, low]
    for ratio in torch.arange(1.0, 0.0, -0.01):
        scale = (high - low) * ratio / most
        zero = torch.round(-low * ratio / scale)
        codes = torch.clamp(torch.round(x / scale) + zero, 0, most)
        error = ((codes - zero) * scale - x).abs().pow(2.4).mean(1, keepdim=True)
        better = error < found[0]
        found = [
            torch.where(better, a, b) for a, b in zip((error, scale, zero), found, strict=True)
        ]
    return found[1], found[2]


class Edge(nn.Module):
    """A quantizer of rectified activations with a learned scale, found from what it first sees."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.most, self.mode, self.known = 2**bits - 1, "float", False

    def forward(self, x: Tensor) -> Tensor:
        """All of it rounded, or half of its elements while learning."""
        if self.mode == "float":
            return x
        if not self.known:
            flat = x.detach().reshape(1, -1)
            ends = torch.zeros(1, 1, device=x.device), flat.max().reshape(1, 1)
            self.scale.data.copy_(best_range(flat, *ends, self.most)[0].squeeze())
            self.known = True
        snapped = rounded(torch.clamp(x / self.scale, 0, self.most)) * self.scale
        return snapped if self.mode == "hard" else torch.where(halves(x), snapped, x)


def halves(x: Tensor) -> Tensor:
    """True for about half of the elements."""
    return torch.rand_like(x) < 0.5


class Soft(nn.Module):
    """A convolution or linear layer whose kernel learns soft bits and scales."""

    def __init__(self, layer: Any, bits: int, edge: Edge | None) -> None:
        super().__init__()
        self.layer, self.edge, self.most, self.mode = layer, edge, 2**bits - 1, "float"
        w = layer.weight.detach()
        rows, columns = w.flatten(1), (-1, *[1] * (w.ndim - 1))
        ends = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        scale, zero = (v.reshape(columns) for v in best_range(rows, *ends, self.most))
        self.floor, self.zero = torch.floor(w / scale), zero
        self.bits = nn.Parameter(-torch.log(1.2 / (w / scale - self.floor + 0.1) - 1))
        self.scale = nn.Parameter(scale)

    def soft_bits(self) -> Tensor:
        """In 0..1."""
        return torch.clamp(torch.sigmoid(self.bits) * 1.2 - 0.1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """With its kernel as it is, soft, or rounded for good."""
        x = x if self.edge is None else self.edge(x)
        if self.mode == "float":
            return self.layer(x)
        up = self.soft_bits() if self.mode == "soft" else (self.bits >= 0).float()
        codes = torch.clamp(self.floor + up + self.zero, 0, self.most)
        kernel = (codes - self.zero) * self.scale
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, kernel, self.layer.bias)
        return F.conv2d(x, kernel, None, self.layer.stride, self.layer.padding)


class Residual(nn.Module):
    """A residual block.

    Args:
      block: of the CIFAR ResNet.
      bits: of kernels.
      reads: of what the first and the second convolution read.
      shortcuts: whether the shortcut reads what the first convolution reads, or floats.
    """

    def __init__(self, block: Any, bits: int, reads: tuple[int, int], *, shortcuts: bool) -> None:
        super().__init__()
        self.conv1 = Soft(block.conv1, bits, Edge(reads[0]))
        self.conv2 = Soft(block.conv2, bits, Edge(reads[1]))
        self.bn1, self.bn2, self.added = block.bn1, block.bn2, int(block.half)
        self.shortcuts = shortcuts

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        x = self.conv1.edge(x) if self.shortcuts and self.conv1.edge is not None else x
        if self.added:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))
        return (x + y).relu()


def units(
    network: nn.Sequential, bits: tuple[int, int] = (2, 2), *, shortcuts: bool = True
) -> dict[str, nn.Module]:
    """{name: unit} of the CIFAR ResNet of `synthesis_loops`, in evaluation mode and in float.

    Args:
      network: the ResNet.
      bits: of kernels and of activations between the ends: the first and last layer's kernels, the
        last one's input and the second one's have 8, and the image is read as it is.
      shortcuts: whether shortcuts are quantized.
    """
    conv, norm, relu, *blocks, pool, flat, last = network.children()
    found: dict[str, nn.Module] = {"0": nn.Sequential(Soft(conv, 8, None), norm, relu)}
    for i, block in enumerate(blocks):
        reads = (8 if i == 0 else bits[1], bits[1])
        found[str(i + 3)] = Residual(block, bits[0], reads, shortcuts=shortcuts)
    found["last"] = nn.Sequential(pool, flat, Soft(last, 8, Edge(8)))
    for unit in found.values():
        unit.eval()
    return found


def switch(unit: nn.Module, mode: Mode) -> nn.Module:
    """The same unit, its kernels and activations now in float, learning, or rounded."""
    for part in unit.modules():
        if isinstance(part, Soft | Edge):
            part.mode = mode
    return unit


def reconstruction(
    unit: nn.Module, exact: Tensor, rough: Tensor, targets: Tensor, steps: int, batch: int
) -> Callable[[], None]:
    """One step of the loop, to be called again and again; the unit is left learning."""
    layers = [m for m in unit.modules() if isinstance(m, Soft)]
    for p in unit.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        switch(unit, "soft")(rough[:batch])  # finds ranges of activations
    bits = [v.bits.requires_grad_() for v in layers]
    scales = [v.scale.requires_grad_() for v in layers]
    edges = [v.edge.scale.requires_grad_() for v in layers if v.edge is not None]
    groups = [{"params": scales, "lr": 1e-4}, {"params": edges, "lr": 4e-5}]
    hard, soft = (
        torch.optim.Adam(bits, lr=1e-3),
        torch.optim.Adam([g for g in groups if g["params"]]),
    )
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(soft, steps)
    order, done, warm = iter(()), 0, 0.2 * steps

    def step() -> None:
        nonlocal done, order
        chosen = next(order, None)
        if chosen is None:
            order = iter(torch.randperm(len(exact), device=exact.device).split(batch))
            chosen = next(order)
        done += 1
        x = torch.where(halves(exact[chosen]), rough[chosen], exact[chosen])
        loss = ((unit(x) - targets[chosen]) ** 2).sum(1).mean()
        if done >= warm:
            beta = 20 - 18 * (done - warm) / (steps - warm)
            loss = loss + sum((1 - (2 * v.soft_bits() - 1).abs() ** beta).sum() for v in layers)
        hard.zero_grad()
        soft.zero_grad()
        loss.backward()
        hard.step()
        soft.step()
        falling.step()

    return step
