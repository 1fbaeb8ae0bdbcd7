"""The networks in plain PyTorch, written from their parameter names; shares nothing with dfq_jax.

Only for comparison: reading the files needs PyTorch, and images are decoded and normalised here.
"""

import importlib.util
import io
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

State = Mapping[str, torch.Tensor]


def read_state(path: Path) -> State:
    """The parameters in a checkpoint, without the prefix that DataParallel adds."""
    found: Any = torch.load(path, map_location="cpu", weights_only=True)
    found = found.get("state_dict", found)
    return {name.removeprefix("module."): value for name, value in found.items()}


def packaged_weights(package: str) -> Path:
    """The file of weights in an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {package} is not installed; `make test` installs it")
    return next(Path(spec.submodule_search_locations[0]).rglob("*.pth"))


def norm(state: State, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    """Batch norm with recorded statistics."""
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=eps)


def cifar_resnet(state: State, x: torch.Tensor) -> torch.Tensor:
    """A CIFAR ResNet whose shortcuts drop every other pixel and add zero channels."""
    conv = lambda name, x, stride: F.conv2d(x, state[f"{name}.weight"], None, stride, 1)
    x = F.relu(norm(state, "bn1", conv("conv1", x, 1), 1e-5))
    blocks = {m[0] for name in state if (m := re.match(r"layer\d\.\d+", name))}
    order = sorted(blocks, key=lambda name: tuple(map(int, re.findall(r"\d+", name))))
    for block in order:
        stride = 2 if block in ("layer2.0", "layer3.0") else 1
        y = F.relu(norm(state, f"{block}.bn1", conv(f"{block}.conv1", x, stride), 1e-5))
        y = norm(state, f"{block}.bn2", conv(f"{block}.conv2", y, 1), 1e-5)
        half = (y.shape[1] - x.shape[1]) // 2
        x = F.relu(y + F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, half, half)))
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def same(x: torch.Tensor, weight: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
    """A convolution padded as TensorFlow does, more at the end than at the start."""
    size, kernel = x.shape[2], weight.shape[2]
    spare = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    low, high = spare // 2, spare - spare // 2
    return F.conv2d(F.pad(x, (low, high, low, high)), weight, None, stride, 0, 1, groups)


def efficientnet_lite0(state: State, x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-lite0: inverted residuals with ReLU6, no squeeze-and-excite."""
    weight = lambda name: state[f"{name}.weight"]
    x = F.relu6(norm(state, "_bn0", same(x, weight("_conv_stem"), 2), 1e-3))
    count = 1 + max(int(m[1]) for name in state if (m := re.match(r"_blocks\.(\d+)\.", name)))
    for index in range(count):
        block, y = f"_blocks.{index}", x
        if f"{block}._expand_conv.weight" in state:
            y = same(y, weight(f"{block}._expand_conv"))
            y = F.relu6(norm(state, f"{block}._bn0", y, 1e-3))
        depthwise = weight(f"{block}._depthwise_conv")
        stride = 2 if index in (1, 3, 5, 11) else 1  # the first blocks of four of the stages
        y = same(y, depthwise, stride, groups=len(depthwise))
        y = F.relu6(norm(state, f"{block}._bn1", y, 1e-3))
        y = norm(state, f"{block}._bn2", same(y, weight(f"{block}._project_conv")), 1e-3)
        x = x + y if x.shape == y.shape else y
    x = F.relu6(norm(state, "_bn1", same(x, weight("_conv_head")), 1e-3))
    return F.linear(x.mean((2, 3)), weight("_fc"), state["_fc.bias"])


def mobilenet_v2(state: State, x: torch.Tensor) -> torch.Tensor:
    """MobileNetV2 by torchvision's names: inverted residuals with ReLU6 and linear bottlenecks."""

    def layer(x: torch.Tensor, conv: str, bn: str, stride: int = 1) -> torch.Tensor:
        weight = state[f"{conv}.weight"]
        groups = len(weight) if weight.shape[1] == 1 else 1
        y = F.conv2d(x, weight, None, stride, weight.shape[2] // 2, 1, groups)
        return norm(state, bn, y, 1e-5)

    x = F.relu6(layer(x, "features.0.0", "features.0.1", 2))
    for index in range(1, 18):
        block, y = f"features.{index}.conv", x
        depthwise = 0 if index == 1 else 1  # the first block does not expand
        if depthwise:
            y = F.relu6(layer(y, f"{block}.0.0", f"{block}.0.1"))
        stride = 2 if index in (2, 4, 7, 14) else 1
        y = F.relu6(layer(y, f"{block}.{depthwise}.0", f"{block}.{depthwise}.1", stride))
        y = layer(y, f"{block}.{depthwise + 1}", f"{block}.{depthwise + 2}")
        x = x + y if x.shape == y.shape else y
    x = F.relu6(layer(x, "features.18.0", "features.18.1"))
    return F.linear(x.mean((2, 3)), state["classifier.1.weight"], state["classifier.1.bias"])


def pictures(data: Path, crop: int) -> Iterator[tuple[np.ndarray, int]]:
    """Centre crops as RGB bytes with the index of their class, in the order of sorted names."""
    archive = zipfile.ZipFile(data) if data.is_file() else None
    if archive is not None:
        files = [name for name in archive.namelist() if name.lower().endswith(".jpg")]
    else:
        files = [p.relative_to(data).as_posix() for p in data.rglob("*") if p.is_file()]
    classes = sorted({name.split("/")[-2] for name in files})
    for name in sorted(files):
        content = (data / name).read_bytes() if archive is None else archive.read(name)
        pixels = np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB"))
        top, left = ((side - crop) // 2 for side in pixels.shape[:2])
        yield pixels[top : top + crop, left : left + crop], classes.index(name.split("/")[-2])


Judged = tuple[np.ndarray, np.ndarray]


def judge(
    network: Callable[[State, torch.Tensor], torch.Tensor],
    state: State,
    data: Path,
    crop: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch: int = 50,
) -> Judged:
    """Classes by falling score, and the right class, of every image.

    Args:
      network: one of the functions above.
      state: its parameters.
      data: a folder of class folders, or a zip of one.
      crop: pixels along each side.
      mean: per channel, of pixels 0..255.
      std: per channel, of pixels 0..255.
      batch: images at a time.

    Returns:
      Int[n 5] and Int[n].
    """
    best, labels, waiting = [], [], []
    shift, scale = (torch.tensor(v, dtype=torch.float32).view(1, 3, 1, 1) for v in (mean, std))

    def flush() -> None:
        pixels = torch.from_numpy(np.stack(waiting)).permute(0, 3, 1, 2).float()
        with torch.inference_mode():
            best.append(network(state, (pixels - shift) / scale).topk(5).indices.numpy())
        waiting.clear()

    for pixels, label in pictures(data, crop):
        waiting.append(pixels)
        labels.append(label)
        if len(waiting) == batch:
            flush()
    if waiting:
        flush()
    return np.concatenate(best), np.array(labels)
