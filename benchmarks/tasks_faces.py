"""Embeddings: MobileFaceNet, judged by the cosine to its float embeddings.

No faces are kept here; photographs and synthetic images stand for them.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from common import Column, Row
from task_runs import Asked, Task, quantized

WEIGHTS, IMAGES = "models/mobilefacenet.ckpt", "data/imagenet-sample"
HEIGHT, WIDTH = 112, 96
PHOTOGRAPHS = 200


def rows(asked: Asked) -> Iterable[Row]:
    """One row a scheme and preset."""
    photographs = read(asked.shared / IMAGES, asked.limit or PHOTOGRAPHS)
    for preset in asked.presets:
        for scheme in asked.schemes or TASK.schemes:
            file, task = asked.shared / WEIGHTS, ("--task", "embedding")
            made = quantized("mobilefacenet", file, scheme, preset, asked, *task)
            yield made.row | (judged(made.folder, photographs) if made.there else {})


def read(folder: Path, count: int) -> np.ndarray:
    """Evenly spaced photographs, cropped to the shape of a face, normalised."""
    import PIL.Image

    files = sorted(folder.glob("*/*"))
    found = []
    for file in files[:: max(len(files) // count, 1)][:count]:
        image = PIL.Image.open(file).convert("RGB")
        width = image.height * WIDTH // HEIGHT
        left = (image.width - width) // 2
        image = image.crop((left, 0, left + width, image.height))
        found.append(np.asarray(image.resize((WIDTH, HEIGHT), PIL.Image.Resampling.BILINEAR)))
    pixels = np.stack(found).astype(np.float32)
    return ((pixels - 127.5) / np.float32(128)).transpose(0, 3, 1, 2)


def judged(folder: Path, photographs: np.ndarray) -> dict[str, float]:
    """Mean and worst cosine on photographs, and the mean on the probes kept with the result."""
    from dfq_jax.api.delivered import probe_array
    from dfq_jax.io.artifacts.artifact import load_artifact

    contract = load_artifact(folder).quantized.model.contract
    probes = np.asarray(probe_array((folder / "probe.npz").read_bytes(), contract))
    found = {}
    for name, images in (("real", photographs), ("made", probes.transpose(0, 3, 1, 2))):
        exact, rough = (embedded(folder / f, images) for f in ("float.onnx", "model.onnx"))
        cosine = np.sum(exact * rough, axis=1)
        found |= {name: float(cosine.mean()), f"{name}_worst": float(cosine.min())}
    return found


def embedded(file: Path, images: np.ndarray) -> np.ndarray:
    """Embeddings of length 1."""
    from dfq_jax.io.runtime.session import open_session

    session = open_session(file, optimize=True)
    name = session.get_inputs()[0].name
    made = [session.run(None, {name: images[i : i + 1]})[0] for i in range(len(images))]
    vectors = np.concatenate(made).reshape(len(images), -1).astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


TASK = Task(
    columns=(
        Column("real", "cosine, photographs", ".4f"),
        Column("real_worst", "worst", ".3f"),
        Column("made", "cosine, synthetic", ".4f"),
    ),
    needs=(WEIGHTS, IMAGES),
    schemes=("w8a8", "w6a6", "w4a8"),
    rows=rows,
)
