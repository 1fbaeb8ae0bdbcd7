"""Encoders of Hugging Face against PyTorch, and folders that hold none."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from llamas import bert_folder

from dfq_jax.errors import CheckpointError, UnsupportedModelError, UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.io.load import load
from dfq_jax.io.readers.safetensors import read_safetensors

IDS = np.array([[5, 9, 3, 0, 0, 0], [7, 29, 2, 2, 11, 1]], np.int32)


def by_torch(path, ids, *, pooled):
    """The encoder in PyTorch's own layers, in float64."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    tensors = read_safetensors(path.read_bytes(), "net")
    w = {k: torch.tensor(np.array(v), dtype=torch.float64) for k, v in tensors.items()}
    ids, counted = torch.tensor(ids).long(), torch.tensor(ids) != 0
    norm = lambda x, at: f.layer_norm(x, (16,), w[f"{at}.weight"], w[f"{at}.bias"], 1e-12)
    dense = lambda x, at: f.linear(x, w[f"{at}.weight"], w[f"{at}.bias"])
    heads = lambda x: x.reshape(*x.shape[:2], 2, 8).transpose(1, 2)
    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for n in range(2):
        at = f"encoder.layer.{n}"
        parts = (heads(dense(x, f"{at}.attention.self.{p}")) for p in ("query", "key", "value"))
        y = f.scaled_dot_product_attention(*parts, attn_mask=counted[:, None, None, :])
        y = dense(y.transpose(1, 2).reshape(x.shape), f"{at}.attention.output.dense")
        x = norm(x + y, f"{at}.attention.output.LayerNorm")
        y = dense(f.gelu(dense(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
        x = norm(x + y, f"{at}.output.LayerNorm")
    if not pooled:
        return x.numpy()
    mean = (x * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)
    return f.normalize(mean, dim=-1).numpy()


@pytest.mark.torch
@pytest.mark.parametrize("pooled", [True, False])
def test_the_encoder_of_a_folder_computes_what_pytorch_does(tmp_path, pooled):
    path = bert_folder(tmp_path / "net", pooled=pooled)
    found = load(path, size=6)
    assert ("of length 1" in found.notes[0]) is pooled
    made = evaluate(found.model, jnp.asarray(IDS))[0][0]
    np.testing.assert_allclose(made, by_torch(path, IDS, pooled=pooled), atol=2e-5)


def test_padding_does_not_count(tmp_path):
    path = bert_folder(tmp_path / "net")
    short, whole = load(path, size=3).model, load(path, size=6).model
    a = evaluate(short, jnp.asarray(IDS[:1, :3]))[0][0]
    np.testing.assert_allclose(a, evaluate(whole, jnp.asarray(IDS[:1]))[0][0], atol=1e-5)


def test_rows_end_where_positions_do(tmp_path):
    with pytest.raises(UsageError, match="rows of 1 to 12 tokens"):
        load(bert_folder(tmp_path / "net"), size=13)


@pytest.mark.parametrize(
    ("other", "error", "told"),
    [
        ({"num_hidden_layers": 3}, CheckpointError, "layer.2.*there is none"),
        ({"num_hidden_layers": 1 << 24}, CheckpointError, "there is none"),
        ({"hidden_size": 32}, CheckpointError, "should be"),
        ({"num_attention_heads": 3}, CheckpointError, "do not divide"),
        ({"vocab_size": "many"}, CheckpointError, "no usable sizes"),
        ({"pad_token_id": 99}, CheckpointError, "is no id"),
        ({"hidden_act": "swishy"}, UnsupportedModelError, "hidden_act"),
        ({"position_embedding_type": "relative_key"}, UnsupportedModelError, "absolute positions"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, other, error, told):
    path = bert_folder(tmp_path / "net")
    config = path.parent / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | other))
    with pytest.raises(error, match=told):
        load(path)
