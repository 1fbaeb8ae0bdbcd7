"""Super-resolution: IMDN on Set5, judged by PSNR and SSIM of luma."""

import dataclasses
import functools
import io
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import Column, Row
from task_runs import Asked, Task, quantized

WEIGHTS, IMAGES = "models/imdn_x4.pth", "models/set5.zip"
NAMES = ("baby", "bird", "butterfly", "head", "woman")
BORDER = 4
LUMA = np.array([65.481, 128.553, 24.966]) / 255
WINDOW, SIGMA = 11, 1.5
Pair = tuple[np.ndarray, np.ndarray]
Size = tuple[int, int]
FileOf = Callable[[Size], Any]
"""(height, width) -> the network as a file."""


def rows(asked: Asked) -> Iterable[Row]:
    """The float network, then one row a scheme and preset."""
    from dfq_jax.io.onnx.export import float_onnx

    pairs, weights = set5(asked.shared / IMAGES), asked.shared / WEIGHTS
    exact = judged(pairs, lambda size: float_onnx(of_size(weights, size)))
    yield {"network": "imdn_x4", "scheme": "float", **exact}
    for preset in asked.presets:
        for scheme in asked.schemes or TASK.schemes:
            made = quantized("imdn_x4", weights, scheme, preset, asked)
            found = judged(pairs, of_folder(made.folder, weights)) if made.there else {}
            if found:
                found["lost"] = found["psnr"] - exact["psnr"]
            yield made.row | found


def of_folder(folder: Path, weights: Path) -> FileOf:
    """The integers of a folder as files for images of other sizes than its own."""
    from dfq_jax.io.artifacts.artifact import load_artifact
    from dfq_jax.io.onnx.export import quantized_onnx

    found = load_artifact(folder).quantized

    def of(size: Size) -> Any:
        other = of_size(weights, size)
        model = dataclasses.replace(found.model, graph=other.graph, inputs=other.inputs)
        return quantized_onnx(dataclasses.replace(found, model=model))

    return of


@functools.cache
def of_size(weights: Path, size: Size) -> Any:
    """The float network for images of that size."""
    from dfq_jax.io.load import load

    return load(weights, size=size).model


def judged(pairs: Mapping[str, Pair], file_for: FileOf) -> dict[str, float]:
    """Mean PSNR and SSIM over images, each as a whole."""
    from dfq_jax.io.runtime.session import open_session

    scores = []
    for low, high in pairs.values():
        session = open_session(file_for(low.shape[:2]).SerializeToString(), optimize=True)
        image = (low[None] / np.float32(255)).transpose(0, 3, 1, 2)
        (made,) = session.run(None, {session.get_inputs()[0].name: image})
        pixels = np.clip(np.rint(made[0].transpose(1, 2, 0).astype(np.float64) * 255), 0, 255)
        found, wanted = (luma(v) for v in (pixels, high[: pixels.shape[0], : pixels.shape[1]]))
        scores.append((psnr(found, wanted), ssim(found, wanted)))
    return dict(zip(("psnr", "ssim"), np.mean(scores, axis=0).tolist(), strict=True))


def set5(archive: Path) -> dict[str, Pair]:
    """{name: (low, high resolution)}, RGB of 0..255, a quarter in each direction."""
    import PIL.Image

    with zipfile.ZipFile(archive) as found:
        read = lambda path: np.asarray(PIL.Image.open(io.BytesIO(found.read(path))).convert("RGB"))
        return {n: (read(f"Set5_LR/x4/{n}x4.bmp"), read(f"Set5/{n}.bmp")) for n in NAMES}


def luma(pixels: np.ndarray) -> np.ndarray:
    """Luma by BT.601 of 16..235, without the border."""
    return (pixels.astype(np.float64) @ LUMA + 16)[BORDER:-BORDER, BORDER:-BORDER]


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """Peak signal to noise ratio in dB, of a peak of 255."""
    return float(10 * np.log10(255**2 / np.mean((found - wanted) ** 2)))


def ssim(found: np.ndarray, wanted: np.ndarray) -> float:
    """Structural similarity under a Gaussian window (Wang et al. 2004), a peak of 255."""
    one, two = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    means = [smoothed(v) for v in (found, wanted)]
    powers = [smoothed(v * w) for v, w in ((found, found), (wanted, wanted), (found, wanted))]
    a, b, both = (
        power - m * n
        for power, (m, n) in zip(
            powers,
            ((means[0], means[0]), (means[1], means[1]), (means[0], means[1])),
            strict=True,
        )
    )
    above = (2 * means[0] * means[1] + one) * (2 * both + two)
    below = (means[0] ** 2 + means[1] ** 2 + one) * (a + b + two)
    return float(np.mean(above / below))


@functools.cache
def window() -> np.ndarray:
    """One line of the Gaussian."""
    at = np.arange(WINDOW) - WINDOW // 2
    line = np.exp(-(at**2) / (2 * SIGMA**2))
    return line / line.sum()


def smoothed(x: np.ndarray) -> np.ndarray:
    """Under the window, where it lies inside."""
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis)
        x = windows @ window()
    return x


TASK = Task(
    columns=(
        Column("psnr", "PSNR dB", ".2f"),
        Column("lost", "to float", "+.2f"),
        Column("ssim", "SSIM", ".4f"),
    ),
    needs=(WEIGHTS, IMAGES),
    schemes=("w8a8", "w4a8", "w4a4"),
    rows=rows,
)
