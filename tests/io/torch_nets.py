"""PyTorch definitions of the built-in architectures, written independently of `io/zoo`."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn


class CifarBlock(nn.Module):
    """A basic block whose shortcut drops pixels and adds zero channels."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.extra = planes // 4 if stride > 1 else 0

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(CifarBlock(16, 16, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(
            *(CifarBlock(32 if i else 16, 32, 1 if i else 2) for i in range(n))
        )
        self.layer3 = nn.Sequential(
            *(CifarBlock(64 if i else 32, 64, 1 if i else 2) for i in range(n))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, x.shape[3]).flatten(1))


class SameConv(nn.Conv2d):
    """Pads as TensorFlow does: so that the output has ceil(size / stride) pixels."""

    def forward(self, input):
        k, s = self.kernel_size[0], self.stride[0]
        spare = [max((math.ceil(n / s) - 1) * s + k - n, 0) for n in input.shape[2:]]
        sides = [side for n in reversed(spare) for side in (n // 2, n - n // 2)]
        return F.conv2d(F.pad(input, sides), self.weight, None, self.stride, 0, 1, self.groups)


class LiteBlock(nn.Module):
    """An inverted residual with ReLU6."""

    def __init__(self, inputs: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        mid = inputs * expansion
        if expansion > 1:
            self._expand_conv = SameConv(inputs, mid, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(mid, eps=1e-3)
        self._depthwise_conv = SameConv(mid, mid, kernel, stride, groups=mid, bias=False)
        self._bn1 = nn.BatchNorm2d(mid, eps=1e-3)
        self._project_conv = SameConv(mid, out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out, eps=1e-3)
        self.expands, self.skips = expansion > 1, stride == 1 and inputs == out

    def forward(self, x):
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


LITE_BLOCKS = ["1 16 3 1 1", "2 24 3 2 6", "2 40 5 2 6", "3 80 3 2 6", "3 112 5 1 6", "4 192 5 2 6"]


class EfficientNetLite(nn.Module):
    """Stem, seven stages, head."""

    def __init__(self, width: float, depth: float) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        blocks, inputs = [], 32
        for stage, line in enumerate([*LITE_BLOCKS, "1 320 3 1 6"]):
            repeats, channels, kernel, stride, expansion = map(int, line.split())
            out = max(8, int(channels * width + 4) // 8 * 8)
            out = out + 8 if out < 0.9 * channels * width else out
            for i in range(repeats if stage in (0, 6) else math.ceil(repeats * depth)):
                blocks.append(LiteBlock(inputs, out, kernel, 1 if i else stride, expansion))
                inputs = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv(inputs, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x):
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return self._fc(F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))


LITE_SCALES = {"0": (1.0, 1.0), "1": (1.0, 1.1), "2": (1.1, 1.2), "3": (1.2, 1.4), "4": (1.4, 1.8)}


def define(name: str) -> Any:
    """The network called `name`; its weights may be whatever the memory held."""
    if name == "regnet_x_600mf":
        regnet = torchvision.models.regnet
        widths = regnet.BlockParams.from_init_params(16, 48, 36.97, 2.24, 24)
        return regnet.RegNet(widths, norm_layer=nn.BatchNorm2d).eval()
    if name.startswith("regnet"):
        return torchvision.models.get_model(name.replace("3200mf", "3_2gf")).eval()
    with torch.device("meta"):  # skips the initialisation, which `randomise` replaces
        if name.endswith("_cifar"):
            net = CifarResNet(int(name.removeprefix("resnet").removesuffix("_cifar")))
        elif name.startswith("efficientnet_lite"):
            net = EfficientNetLite(*LITE_SCALES[name[-1]])
        else:
            net = torchvision.models.get_model(name)
    return net.to_empty(device="cpu").eval()


def randomise(net: Any, seed: int = 0) -> Any:
    """Fills a network with weights and batch-norm statistics that keep activations finite."""
    key = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            for name, value in [*module.named_parameters(recurse=False)]:
                if value.ndim > 1:
                    fan_in = value[0].numel()
                    value.normal_(0.0, (2 / fan_in) ** 0.5, generator=key)
                elif isinstance(module, nn.BatchNorm2d) and name == "weight":
                    value.uniform_(0.3, 1.2, generator=key)
                else:
                    value.normal_(0.0, 0.2, generator=key)
        for name, value in net.named_buffers():
            if name.endswith("running_mean"):
                value.normal_(0.0, 0.3, generator=key)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2.0, generator=key)
            else:
                value.fill_(7)
    return net


def arrays(net: Any) -> dict[str, np.ndarray]:
    """The network's `state_dict` as NumPy arrays."""
    return {name: value.numpy() for name, value in net.state_dict().items()}


def logits(net: Any, images: np.ndarray) -> np.ndarray:
    """What the network computes of NHWC images."""
    with torch.no_grad():
        return net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


class Reference:
    """A PyTorch network under the name this library has for it."""

    def __init__(self, name: str) -> None:
        self.net = randomise(define(name))

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """{name: array} as a checkpoint holds them."""
        return arrays(self.net)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits of NHWC images."""
        return logits(self.net, images)

    def filled(self, tensors: dict[str, np.ndarray]) -> "Reference":
        """This network with the weights of a checkpoint."""
        state = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
        found = self.net.load_state_dict(state, strict=False)
        left = [n for n in found.missing_keys if not n.endswith("num_batches_tracked")]
        if left or found.unexpected_keys:
            raise ValueError(f"weights do not fit: {found}")
        return self
