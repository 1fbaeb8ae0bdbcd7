"""Networks beyond classifiers as PyTorch modules, named as their published weights are.

Hui et al. 2019, "Lightweight Image Super-Resolution with Information Multi-distillation Network"
(IMDN); FastestDet on ShuffleNetV2; Chen et al. 2018, "MobileFaceNets".
"""

import itertools
from typing import Any

import torch
from torch import nn

SLOPE = 0.05


def convolution(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    """A convolution that keeps the size, with a bias."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def bent(x: Any) -> Any:
    """IMDN's leaky ReLU."""
    return nn.functional.leaky_relu(x, SLOPE)


class Attention(nn.Module):
    """Contrast-aware channel attention: weights from each channel's deviation and mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_du = nn.Sequential(
            convolution(64, 4, 1), nn.ReLU(), convolution(4, 64, 1), nn.Sigmoid()
        )

    def forward(self, x: Any) -> Any:
        mean = x.mean((2, 3), keepdim=True)
        deviation = ((x - mean) ** 2).mean((2, 3), keepdim=True).sqrt()
        return x * self.conv_du(mean + deviation)


class Distillation(nn.Module):
    """Three times a quarter of the channels is kept and the others are refined."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = convolution(64, 64), convolution(48, 64), convolution(48, 64)
        self.c4, self.c5, self.cca = convolution(48, 16), convolution(64, 64, 1), Attention()

    def forward(self, x: Any) -> Any:
        kept, rest = [], x
        for layer in (self.c1, self.c2, self.c3):
            one, rest = torch.split(bent(layer(rest)), [16, 48], dim=1)
            kept.append(one)
        return self.c5(self.cca(torch.cat([*kept, self.c4(rest)], 1))) + x


class Imdn(nn.Module):
    """Six blocks, all of which the last layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.fea_conv = convolution(3, 64)
        for i in range(6):
            self.add_module(f"IMDB{i + 1}", Distillation())
        self.c, self.LR_conv = nn.Sequential(convolution(384, 64, 1)), convolution(64, 64)
        self.upsampler = nn.Sequential(convolution(64, 48), nn.PixelShuffle(4))

    def forward(self, x: Any) -> Any:
        first = self.fea_conv(x)
        found = [first]
        for i in range(6):
            found.append(getattr(self, f"IMDB{i + 1}")(found[-1]))
        joined = bent(self.c(torch.cat(found[1:], 1)))
        return self.upsampler(self.LR_conv(joined) + first)


def joined(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution without a bias that keeps the size, and its norm."""
    made = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [made, nn.BatchNorm2d(outputs)]


def wide(inputs: int, outputs: int) -> nn.Module:
    """A depthwise 5x5 layer and a pointwise one."""
    first = [*joined(inputs, inputs, 5, groups=inputs), nn.ReLU()]
    return nn.Sequential(*first, *joined(inputs, outputs))


class Named(nn.Module):
    """Layers one after the other under a name of their own."""

    def __init__(self, name: str, layers: Any) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, layers)

    def forward(self, x: Any) -> Any:
        return getattr(self, self.name)(x)


class Unit(nn.Module):
    """A unit of ShuffleNetV2; one with stride has two branches that work."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        mid = o // 2
        pointwise = [*joined(i, mid), nn.ReLU()]
        main = [*pointwise, *joined(mid, mid, 3, stride, mid), *joined(mid, o - i), nn.ReLU()]
        self.branch_main = nn.Sequential(*main)
        self.branch_proj = None
        if stride == 2:
            proj = [*joined(i, i, 3, stride, i), *joined(i, i), nn.ReLU()]
            self.branch_proj = nn.Sequential(*proj)

    def forward(self, x: Any) -> Any:
        if self.branch_proj is not None:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], 1)
        return torch.cat([x[:, 0::2], self.branch_main(x[:, 1::2])], 1)


class Backbone(nn.Module):
    """ShuffleNetV2 of half the width; returns its last three stages."""

    def __init__(self) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(*joined(3, 24, 3, 2), nn.ReLU())
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        width = 24
        for stage, (repeats, out) in enumerate(((4, 48), (8, 96), (4, 192)), start=2):
            units = [Unit(width, out, 2), *(Unit(out // 2, out, 1) for _ in range(1, repeats))]
            self.add_module(f"stage{stage}", nn.Sequential(*units))
            width = out

    def forward(self, x: Any) -> list[Any]:
        x, found = self.maxpool(self.first_conv(x)), []
        for stage in (2, 3, 4):
            x = getattr(self, f"stage{stage}")(x)
            found.append(x)
        return found


class Pyramid(nn.Module):
    """Depthwise kernels of three reaches over one map."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.Conv1x1 = Named("conv1x1", nn.Sequential(*joined(i, o), nn.ReLU()))
        for repeats in (1, 2, 3):
            layers = [[*joined(o, o, 5, groups=o), nn.ReLU()] for _ in range(repeats)]
            self.add_module(f"S{repeats}", nn.Sequential(*itertools.chain(*layers)))
        self.output = nn.Sequential(*joined(3 * o, o))

    def forward(self, x: Any) -> Any:
        x = self.Conv1x1(x)
        reaches = torch.cat([getattr(self, f"S{n}")(x) for n in (1, 2, 3)], 1)
        return torch.relu(x + self.output(reaches))


class Head(nn.Module):
    """Objectness, four numbers of a box, and class scores of every cell."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv1x1 = Named("conv1x1", nn.Sequential(*joined(width, width), nn.ReLU()))
        self.obj_layers = Named("conv5x5", wide(width, 1))
        self.reg_layers = Named("conv5x5", wide(width, 4))
        self.cls_layers = Named("conv5x5", wide(width, classes))

    def forward(self, x: Any) -> Any:
        x = self.conv1x1(x)
        scores = torch.softmax(self.cls_layers(x), 1)
        return torch.cat([torch.sigmoid(self.obj_layers(x)), self.reg_layers(x), scores], 1)


class FastestDet(nn.Module):
    """Three scales joined at the middle one."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.avg_pool = nn.AvgPool2d(3, 2, 1)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.SPP = Pyramid(336, 96)
        self.detect_head = Head(96, 80)

    def forward(self, x: Any) -> Any:
        fine, middle, coarse = self.backbone(x)
        joined = torch.cat([self.avg_pool(fine), middle, self.upsample(coarse)], 1)
        return self.detect_head(self.SPP(joined))


class Layer(nn.Module):
    """A convolution, its norm, and a PReLU unless it is linear."""

    def __init__(self, *shape: Any, groups: int = 1, linear: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*shape, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(shape[1])
        self.prelu = None if linear else nn.PReLU(shape[1])

    def forward(self, x: Any) -> Any:
        x = self.bn(self.conv(x))
        return x if self.prelu is None else self.prelu(x)


class Bottleneck(nn.Module):
    """An inverted residual block."""

    def __init__(self, i: int, o: int, stride: int, expansion: int) -> None:
        super().__init__()
        mid = i * expansion
        depthwise = [*joined(mid, mid, 3, stride, mid), nn.PReLU(mid)]
        self.conv = nn.Sequential(*joined(i, mid), nn.PReLU(mid), *depthwise, *joined(mid, o))
        self.connects = stride == 1 and i == o

    def forward(self, x: Any) -> Any:
        return x + self.conv(x) if self.connects else self.conv(x)


class MobileFaceNet(nn.Module):
    """Blocks, and a depthwise layer over the whole map instead of pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = Layer(3, 64, 3, 2, 1)
        self.dw_conv1 = Layer(64, 64, 3, 1, 1, groups=64)
        blocks, width = [], 64
        settings = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2))
        for expansion, out, repeats, stride in (*settings, (2, 128, 2, 1)):
            for index in range(repeats):
                blocks.append(Bottleneck(width, out, 1 if index else stride, expansion))
                width = out
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = Layer(128, 512, 1)
        self.linear7 = Layer(512, 512, (7, 6), groups=512, linear=True)
        self.linear1 = Layer(512, 128, 1, linear=True)

    def forward(self, x: Any) -> Any:
        x = self.conv2(self.blocks(self.dw_conv1(self.conv1(x))))
        return self.linear1(self.linear7(x)).flatten(1)
