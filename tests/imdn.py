"""IMDN x4 as a PyTorch module, and Set5 to judge it by.

Hui et al. 2019, "Lightweight Image Super-Resolution with Information Multi-distillation Network".
"""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

SLOPE = 0.05
NAMES = ("baby", "bird", "butterfly", "head", "woman")


def imdn(weights: Path) -> Any:
    """The network with its published weights, in evaluation mode."""
    import torch
    from torch import nn

    conv = lambda i, o, k=3: nn.Conv2d(i, o, k, padding=k // 2)
    bent = lambda x: nn.functional.leaky_relu(x, SLOPE)

    class Attention(nn.Module):
        """Contrast-aware channel attention: weights from each channel's deviation and mean."""

        def __init__(self):
            super().__init__()
            self.conv_du = nn.Sequential(conv(64, 4, 1), nn.ReLU(), conv(4, 64, 1), nn.Sigmoid())

        def forward(self, x):
            mean = x.mean((2, 3), keepdim=True)
            deviation = ((x - mean) ** 2).mean((2, 3), keepdim=True).sqrt()
            return x * self.conv_du(mean + deviation)

    class Distillation(nn.Module):
        """Three times a quarter of the channels is kept and the others are refined."""

        def __init__(self):
            super().__init__()
            self.c1, self.c2, self.c3 = conv(64, 64), conv(48, 64), conv(48, 64)
            self.c4, self.c5, self.cca = conv(48, 16), conv(64, 64, 1), Attention()

        def forward(self, x):
            kept, rest = [], x
            for layer in (self.c1, self.c2, self.c3):
                one, rest = torch.split(bent(layer(rest)), [16, 48], dim=1)
                kept.append(one)
            return self.c5(self.cca(torch.cat([*kept, self.c4(rest)], 1))) + x

    class Network(nn.Module):
        """Six blocks, all of which the last layers read."""

        def __init__(self):
            super().__init__()
            self.fea_conv = conv(3, 64)
            for i in range(6):
                self.add_module(f"IMDB{i + 1}", Distillation())
            self.c, self.LR_conv = nn.Sequential(conv(384, 64, 1)), conv(64, 64)
            self.upsampler = nn.Sequential(conv(64, 48), nn.PixelShuffle(4))

        def forward(self, x):
            first = self.fea_conv(x)
            found = [first]
            for i in range(6):
                found.append(getattr(self, f"IMDB{i + 1}")(found[-1]))
            joined = bent(self.c(torch.cat(found[1:], 1)))
            return self.upsampler(self.LR_conv(joined) + first)

    network = Network()
    saved = torch.load(weights, map_location="cpu", weights_only=True)
    network.load_state_dict({name.removeprefix("module."): v for name, v in saved.items()})
    return network.eval()


def set5(archive: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{name: (low, high resolution)}, RGB of 0..255, a quarter in each direction."""
    with zipfile.ZipFile(archive) as found:
        read = lambda path: np.asarray(PIL.Image.open(io.BytesIO(found.read(path))).convert("RGB"))
        return {n: (read(f"Set5_LR/x4/{n}x4.bmp"), read(f"Set5/{n}.bmp")) for n in NAMES}
