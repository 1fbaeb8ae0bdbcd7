"""Small networks of the kinds that people bring, with random weights and plausible statistics."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Unet(nn.Module):
    """Two levels, a transposed convolution and a bilinear way up, joined with what went down."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = convolved(3, 8), convolved(8, 12)
        self.middle, self.up = convolved(12, 16), nn.ConvTranspose2d(16, 12, 2, 2)
        self.third, self.last = convolved(24, 12), convolved(20, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Any) -> Any:
        a = self.first(x)
        b = self.second(F.max_pool2d(a, 2))
        c = self.middle(F.avg_pool2d(b, 2))
        b = self.third(torch.cat([self.up(c), b], 1))
        b = F.interpolate(b, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(self.last(torch.cat([b, a], 1)))


class YoloHead(nn.Module):
    """Pooled at three sizes, joined across two scales; boxes, scores and raw maps come out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = convolved(3, 8, 2, nn.SiLU()), convolved(8, 16, 2, nn.SiLU())
        self.pooled, self.merged = convolved(48, 16, act=nn.SiLU()), convolved(24, 8, act=nn.SiLU())
        self.near, self.far = nn.Conv2d(8, 9, 1), nn.Conv2d(16, 9, 1)

    def forward(self, x: Any) -> Any:
        a = self.stem(x)
        b = self.down(a)
        once = F.max_pool2d(b, 5, 1, 2)
        b = self.pooled(torch.cat([b, once, F.max_pool2d(once, 5, 1, 2)], 1))
        a = self.merged(torch.cat([F.interpolate(b, scale_factor=2), a], 1))
        maps = self.near(a), self.far(b)
        flat = torch.cat([m.flatten(2) for m in maps], 2).permute(0, 2, 1)
        centres, sizes, scores = flat.split((2, 2, 5), 2)
        boxes = torch.cat([centres.sigmoid() * 2 - 0.5, sizes.exp()], -1)
        return torch.cat([boxes, scores.sigmoid()], -1), *maps


class ArcFace(nn.Module):
    """Slopes for each channel, a depthwise layer over all places, a norm of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.PReLU(8))
        self.deep = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False)
        self.norm, self.act = nn.BatchNorm2d(8), nn.PReLU(8)
        self.whole = nn.Conv2d(8, 8, 4, groups=8, bias=False)
        self.fc, self.norm1 = nn.Linear(8, 16), nn.BatchNorm1d(16)

    def forward(self, x: Any) -> Any:
        x = self.act(self.norm(self.deep(self.stem(x))))
        return F.normalize(self.norm1(self.fc(self.whole(x).flatten(1))))


class Crnn(nn.Module):
    """A line of text: convolutions, two directions of an LSTM, scores of every step for CTC."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = convolved(1, 8), convolved(8, 12)
        self.lstm = nn.LSTM(24, 8, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(16, 11)

    def forward(self, x: Any) -> Any:
        x = F.max_pool2d(self.stem(x), 2)
        x = F.max_pool2d(self.deep(x), (2, 1), (2, 1))
        n, c, h, w = x.shape
        x = x.reshape(n, c * h, w).permute(0, 2, 1)
        return F.log_softmax(self.fc(self.lstm(x)[0]), -1)


class AudioNet(nn.Module):
    """A waveform: strided and dilated 1-d convolutions, a gate, statistics over time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(1, 8, 16, 4), nn.BatchNorm1d(8), nn.ReLU())
        self.wide = nn.Sequential(
            nn.Conv1d(8, 16, 3, dilation=2, padding=2), nn.BatchNorm1d(16), nn.GLU(1)
        )
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Any) -> Any:
        x = F.max_pool1d(self.wide(self.stem(x)), 2)
        return self.fc(torch.cat([x.mean(-1), x.amax(-1)], 1))


class Video(nn.Module):
    """A clip: 3-d convolutions, one of them depthwise and one strided, pooled in time and space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 8, 3, (1, 2, 2), 1), nn.BatchNorm3d(8), nn.ReLU())
        self.deep = nn.Conv3d(8, 8, 3, 1, 1, groups=8, bias=False)
        self.norm, self.point = nn.BatchNorm3d(8), nn.Conv3d(8, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Any) -> Any:
        x = F.max_pool3d(self.stem(x), (1, 2, 2))
        x = F.relu(x + self.norm(self.deep(x)))
        x = F.avg_pool3d(F.relu(self.point(x)), (2, 1, 1))
        return self.fc(F.adaptive_avg_pool3d(x, 1).flatten(1))


class Mixed(nn.Module):
    """Attention of windows, of channels and of a sequence beside convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv = convolved(3, 16, 2), nn.Linear(16, 48)
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 16)
        self.squeeze, self.expand = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        n, c, h, w = x.shape
        x = x * torch.sigmoid(self.expand(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        y = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        q, k, v = self.qkv(self.norm(y)).reshape(y.size(0), 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).reshape(-1, 16, c))
        y = y.view(n, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
        z = (x + y).flatten(2).transpose(1, 2)
        z = z + self.attention(z, z, z, need_weights=False)[0]
        return self.fc(z.mean(1))


MODULES: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "unet": (Unet, (3, 16, 16)),
    "yolo": (YoloHead, (3, 16, 16)),
    "arcface": (ArcFace, (3, 16, 16)),
    "crnn": (Crnn, (1, 8, 24)),
    "audio": (AudioNet, (1, 256)),
    "video": (Video, (3, 4, 16, 16)),
    "mixed": (Mixed, (3, 16, 16)),
}
"""{name: (the network, the shape of one example)}."""


def convolved(read: int, made: int, stride: int = 1, act: nn.Module | None = None) -> nn.Module:
    """A convolution of 3 x 3, its norm and what bends it."""
    layer = nn.Conv2d(read, made, 3, stride, 1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(made), act or nn.ReLU())


def module(name: str) -> nn.Module:
    """The network of that name: the same weights every time, statistics of images of noise."""
    torch.manual_seed(0)
    kind, shape = MODULES[name]
    net = kind()
    for part in net.modules():
        if isinstance(part, nn.PReLU):
            part.weight.data.uniform_(0.1, 0.4)
    with torch.no_grad():
        for _ in range(20):  # norms follow what they see
            net(torch.randn(16, *shape))
    return net.eval()
