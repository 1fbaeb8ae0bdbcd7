"""Small networks of tokens with random weights, as files of llama2.c and of Hugging Face."""

import json
import struct
from pathlib import Path

import numpy as np

LLAMA = (16, 24, 2, 4, 2, 32, 20)
"""dim, hidden, layers, heads, kv_heads, vocab, seq."""


def llama_file(path: Path, sizes=LLAMA, *, tied: bool = True, seed: int = 0) -> Path:
    """Writes a file of llama2.c; returns its path."""
    dim, hidden, layers, heads, keys, vocab, seq = sizes
    rng, size = np.random.default_rng(seed), dim // heads
    kv = keys * size
    near = lambda *shape: 1 + 0.2 * rng.normal(size=shape)
    draw = lambda *shape: rng.normal(size=shape) / np.sqrt(shape[-1])
    angles = np.arange(seq)[:, None] / 10_000.0 ** (np.arange(0, size, 2) / size)
    parts = [
        rng.normal(size=(vocab, dim)),
        near(layers, dim),
        *(draw(layers, out, dim) for out in (dim, kv, kv)),
        draw(layers, dim, dim),
        near(layers, dim),
        draw(layers, hidden, dim),
        draw(layers, dim, hidden),
        draw(layers, hidden, dim),
        near(dim),
        np.cos(angles),
        np.sin(angles),
        *([] if tied else [draw(vocab, dim)]),
    ]
    header = struct.pack("<7i", *sizes[:5], vocab if tied else -vocab, seq)
    path.write_bytes(header + b"".join(np.asarray(p, "<f4").tobytes() for p in parts))
    return path


def llama_scores(path: Path, ids: np.ndarray) -> np.ndarray:
    """The scores of such a file, as plainly as they can be computed, in float64."""
    data = path.read_bytes()
    dim, hidden, layers, heads, keys, vocab, seq = struct.unpack("<7i", data[:28])
    size, kv = dim // heads, keys * (dim // heads)
    values, at = np.frombuffer(data, "<f4", offset=28).astype(np.float64), 0

    def take(*shape):
        nonlocal at
        at += int(np.prod(shape))
        return values[at - int(np.prod(shape)) : at].reshape(shape)

    table = take(abs(vocab), dim)
    norm1, wq, wk = take(layers, dim), take(layers, dim, dim), take(layers, kv, dim)
    wv, wo, norm2 = take(layers, kv, dim), take(layers, dim, dim), take(layers, dim)
    w1, w2 = take(layers, hidden, dim), take(layers, dim, hidden)
    w3, last = take(layers, hidden, dim), take(dim)
    cos, sin = take(seq, size // 2), take(seq, size // 2)
    head = table if vocab > 0 else take(abs(vocab), dim)
    rms = lambda x, w: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w

    def turned(x, place):
        even, odd, c, s = x[0::2], x[1::2], cos[place], sin[place]
        out = np.empty_like(x)
        out[0::2], out[1::2] = even * c - odd * s, even * s + odd * c
        return out

    found = []
    for row in ids:
        x = table[row]
        for n in range(layers):
            y, made = rms(x, norm1[n]), np.zeros_like(x)
            q, k, v = (y @ w[n].T for w in (wq, wk, wv))
            for t in range(len(row)):
                for h in range(heads):
                    own, other = slice(h * size, (h + 1) * size), h * keys // heads
                    its = slice(other * size, (other + 1) * size)
                    mine = turned(q[t, own], t)
                    scores = [mine @ turned(k[u, its], u) / np.sqrt(size) for u in range(t + 1)]
                    chances = np.exp(np.array(scores) - max(scores))
                    made[t, own] = chances / chances.sum() @ v[: t + 1, its]
            x = x + made @ wo[n].T
            y = rms(x, norm2[n])
            gate = y @ w1[n].T
            x = x + (gate / (1 + np.exp(-gate)) * (y @ w3[n].T)) @ w2[n].T
        found.append(rms(x, last) @ head.T)
    return np.stack(found)


BERT = {
    **{"model_type": "bert", "hidden_act": "gelu", "hidden_size": 16, "intermediate_size": 24},
    **{"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 30, "pad_token_id": 0},
    **{"max_position_embeddings": 12, "type_vocab_size": 2, "layer_norm_eps": 1e-12},
}


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    """The bytes of a file of these float32 arrays."""
    header, at = {}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": array.shape,
            "data_offsets": [at, at + 4 * array.size],
        }
        at += 4 * array.size
    text = json.dumps(header).encode()
    body = b"".join(np.asarray(a, "<f4").tobytes() for a in tensors.values())
    return len(text).to_bytes(8, "little") + text + body


def bert_folder(folder: Path, *, pooled: bool = True, seed: int = 0, **other) -> Path:
    """Writes an encoder with its settings; returns the path of its weights."""
    said, rng = BERT | other, np.random.default_rng(seed)
    d, inner = said["hidden_size"], said["intermediate_size"]
    draw = lambda *shape: rng.normal(size=shape) / np.sqrt(shape[-1])
    found = {
        f"embeddings.{name}_embeddings.weight": rng.normal(size=(said[rows], d))
        for name, rows in (
            ("word", "vocab_size"),
            ("position", "max_position_embeddings"),
            ("token_type", "type_vocab_size"),
        )
    }
    norms = ["embeddings.LayerNorm"]
    for n in range(said["num_hidden_layers"]):
        at = f"encoder.layer.{n}"
        layers = {f"{at}.attention.{p}": (d, d) for p in ("self.query", "self.key", "self.value")}
        layers |= {f"{at}.attention.output.dense": (d, d)}
        layers |= {f"{at}.intermediate.dense": (inner, d), f"{at}.output.dense": (d, inner)}
        for name, shape in layers.items():
            found[f"{name}.weight"] = draw(*shape)
            found[f"{name}.bias"] = 0.1 * rng.normal(size=shape[0])
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    for name in norms:
        found[f"{name}.weight"] = 1 + 0.2 * rng.normal(size=d)
        found[f"{name}.bias"] = 0.1 * rng.normal(size=d)
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(said))
    if pooled:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
        (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Normalize"}]')
    path = folder / "model.safetensors"
    path.write_bytes(safetensors(found))
    return path
