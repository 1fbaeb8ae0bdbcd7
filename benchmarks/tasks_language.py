"""Language: stories260K, judged by the perplexity of five stories; calibrated on its own text.

Rows of 256 tokens are sampled once; two of them make one of 512, as long as the longest story
needs. The text of the stories is read with runs of white space as one space.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import artifacts
import numpy as np
from common import Column, Row
from task_runs import Asked, Task, quantized

WEIGHTS, TOKENS = "models/stories260K.bin", "models/tok512.bin"
TEXT = "models/tinystories_sample.txt"
LENGTH, SAMPLED, ROWS = 512, 256, 32
END = "<|endoftext|>"


class Stories(NamedTuple):
    """Text with what it is in bytes."""

    rows: "object"
    bytes: int


def rows(asked: Asked) -> Iterable[Row]:
    """The float network, then one row a scheme and preset."""
    stories, text = read(asked.shared), own_text(asked)
    floats = False
    for preset in asked.presets:
        for scheme in asked.schemes or TASK.schemes:
            how = ("--size", LENGTH, "--images", text)
            made = quantized("stories260K", asked.shared / WEIGHTS, scheme, preset, asked, *how)
            if made.there and not floats:
                floats = True
                exact = {"network": "stories260K", "scheme": "float", "preset": ""}
                yield exact | judged(made.folder / "float.onnx", stories)
            found = judged(made.folder / "model.onnx", stories) if made.there else {}
            yield made.row | found


def read(shared: Path) -> Stories:
    """The stories as rows of ids, and their bytes."""
    from dfq_jax.data.text import in_rows, read_tokenizer

    tokens = read_tokenizer(shared / TOKENS, 512)
    parts = (shared / TEXT).read_text(encoding="utf-8").split(END)
    texts = [" ".join(part.split()) for part in parts if part.strip()]
    ids = [tokens.encode(text) for text in texts]
    return Stories(in_rows(ids, LENGTH), sum(len(text.encode()) for text in texts))


def own_text(asked: Asked) -> Path:
    """A file of rows that the network wrote, made once for each seed."""
    import dfq_jax as dfq

    path = artifacts.FOLDER / f"stories-rows-{asked.seed}.npy"
    if not path.exists():
        model = dfq.load(asked.shared / WEIGHTS, size=SAMPLED)
        found = np.asarray(dfq.synthesize(model, "sampled", ROWS, seed=asked.seed).array)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, found.reshape(-1, LENGTH))
    return path


def judged(file: Path, stories: Stories) -> dict[str, float]:
    """Perplexity and bits a byte of a file in ONNX Runtime."""
    from dfq_jax.data.text import TextRows, nats
    from dfq_jax.io.runtime.session import feed, open_session

    session = open_session(file, optimize=True, precise=True)
    known = stories.rows
    if not isinstance(known, TextRows):
        raise TypeError("stories are rows")
    scores = [
        session.run(None, feed(session, known.ids[i : i + 1]))[0] for i in range(len(known.ids))
    ]
    costs = nats(np.concatenate(scores), known)
    bits = float(costs.sum()) / np.log(2) / stories.bytes
    return {"perplexity": float(np.exp(costs.mean())), "bits": bits}


TASK = Task(
    columns=(Column("perplexity", "perplexity", ".3f"), Column("bits", "bits a byte", ".4f")),
    needs=(WEIGHTS, TOKENS, TEXT),
    schemes=("w8a8", "w4g32", "w4a8"),
    rows=rows,
)
