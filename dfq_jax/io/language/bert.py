"""BERT encoders from a folder of Hugging Face: `model.safetensors` with its `config.json`.

Devlin et al. 2019, "BERT". Where a sentence encoder's `1_Pooling/config.json` and `modules.json`
lie beside them, the output is the mean over tokens, of length 1 (Reimers and Gurevych 2019,
"Sentence-BERT", section 3); else it is the last layer's values of every token. Ids of padding say
themselves that they do not count, so the network reads nothing but ids.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dfq_jax.errors import CheckpointError, UnsupportedModelError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import (
    Activation,
    Add,
    Curve,
    Div,
    LayerNorm,
    MatMul,
    Maximum,
    Reduce,
    Reshape,
)
from dfq_jax.graph.token_ops import Embed, Present
from dfq_jax.io.language.builder import IDS, Heads, TokenNetwork, scaled_queries
from dfq_jax.io.readers.pickle_policy import show
from dfq_jax.io.readers.safetensors import read_safetensors
from dfq_jax.io.zoo.bind import check_finite
from dfq_jax.types import Tokens

CONFIG = "config.json"
LARGEST = 1 << 20
"""Bytes of a file of settings."""
CURVES: Mapping[str, Curve] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}
"""{`hidden_act`: the curve}."""
LEAST = 1e-12
"""What lengths and counts are at least."""


class BertFacts(NamedTuple):
    """What a configuration says.

    Attributes:
      width: values of a token.
      heads: of every attention.
      layers: how many blocks.
      vocabulary: ids.
      positions: longest row that there are positions for.
      inner: values between the layers of a feed-forward part.
      kinds: of tokens; a sentence alone has the first.
      padding: the id of what does not count.
      curve: between the layers of a feed-forward part.
      eps: of layer norms.
      pooled: whether the mean over tokens comes out, else every token.
      unit: whether that mean has length 1.
    """

    width: int
    heads: int
    layers: int
    vocabulary: int
    positions: int
    inner: int
    kinds: int
    padding: int
    curve: Curve
    eps: float
    pooled: bool = False
    unit: bool = False


class BertFile(NamedTuple):
    """What a folder holds.

    Attributes:
      facts: its configuration.
      tensors: its weights by name.
      notes: for the user.
      sha256: of the weights' file.
    """

    facts: BertFacts
    tensors: Mapping[str, Float[np.ndarray, "..."]]
    notes: tuple[str, ...]
    sha256: str


def is_bert(path: Path) -> bool:
    """Whether a file of weights lies beside the configuration of a BERT."""
    if path.suffix.lower() != ".safetensors" or not (path.parent / CONFIG).is_file():
        return False
    try:
        return settings_in(path.parent / CONFIG).get("model_type") == "bert"
    except CheckpointError:
        return False


def settings_in(path: Path) -> dict[str, Any]:
    """A file of settings; empty if there is none.

    Raises:
      CheckpointError: if it is no JSON object, or absurdly large.
    """
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{show(path.name)} cannot be read: {show(error)}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{show(path.name)} is no JSON object.")
    return found


def read_bert(path: Path) -> BertFile:
    """Reads an encoder and its settings.

    Raises:
      CheckpointError: for a damaged file, or weights that are not those of its configuration.
      UnsupportedModelError: for a kind of BERT that is not built here.
    """
    where = show(path.name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {show(error)}.") from error
    tensors = read_safetensors(data, where)
    facts, notes = facts_of(path.parent, where)
    tensors = {name.removeprefix("bert."): array for name, array in tensors.items()}
    floats: dict[str, np.ndarray] = {}
    for name, shape in shapes_of(facts):
        if name not in tensors or tensors[name].shape != shape:
            found = "there is none" if name not in tensors else f"it is {tensors[name].shape}"
            raise CheckpointError(
                f"{where} does not fit its {CONFIG}: {name} should be {shape}, {found}."
            )
        floats[name] = np.asarray(tensors[name], np.float32)
    try:
        check_finite(floats)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return BertFile(facts, floats, notes, hashlib.sha256(data).hexdigest())


def facts_of(folder: Path, where: str) -> tuple[BertFacts, tuple[str, ...]]:
    """What the settings in a folder say, and notes on it.

    Raises:
      CheckpointError: for settings that are missing or mean nothing.
      UnsupportedModelError: for what is not built here.
    """
    said = settings_in(folder / CONFIG)
    kind = said.get("position_embedding_type", "absolute")
    if kind != "absolute" or said.get("is_decoder"):
        raise UnsupportedModelError(
            f"{where}: position_embedding_type {kind!r}, is_decoder {said.get('is_decoder')}: only "
            "encoders with absolute positions are built here; export it as .pt2 instead."
        )
    act = said.get("hidden_act")
    if not isinstance(act, str) or act not in CURVES:
        raise UnsupportedModelError(
            f"{where}: hidden_act {show(act)!r} is none of {', '.join(CURVES)}."
        )
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    names = (*names, "max_position_embeddings", "intermediate_size", "type_vocab_size")
    numbers = [said.get(n) for n in names]
    eps, padding = said.get("layer_norm_eps", 1e-12), said.get("pad_token_id", 0)
    whole = all(type(n) is int and 1 <= n <= 1 << 24 for n in numbers)
    if not whole or not isinstance(eps, float) or type(padding) is not int:
        raise CheckpointError(f"{where}: its {CONFIG} gives no usable sizes: {show(numbers)}.")
    width, heads, layers, vocabulary, positions, inner, kinds = (int(n or 0) for n in numbers)
    if width % heads or not 0 <= padding < vocabulary:
        raise CheckpointError(
            f"{where}: {heads} heads do not divide {width}, or padding {padding} is no id."
        )
    pooling = settings_in(folder / "1_Pooling" / CONFIG)
    pooled = pooling.get("pooling_mode_mean_tokens") is True
    unit = pooled and normalises(folder)
    sentence = "the mean over tokens" + (", of length 1" if unit else "")
    note = f"its output is {sentence if pooled else 'the last layer, every token'}"
    sizes = (width, heads, layers, vocabulary, positions, inner, kinds, padding)
    return BertFacts(*sizes, CURVES[act], eps, pooled, unit), (note,)


def normalises(folder: Path) -> bool:
    """Whether a sentence encoder's list of modules ends by normalising."""
    path = folder / "modules.json"
    try:
        found = json.loads(path.read_text()) if path.is_file() else []
    except (OSError, ValueError, RecursionError):
        return False
    kinds = [str(x.get("type", "")) for x in found if isinstance(x, dict)]
    return any(kind.endswith("Normalize") for kind in kinds)


def shapes_of(facts: BertFacts) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(weight, its shape) of all that a network reads, one after the other."""
    d, inner = facts.width, facts.inner
    for name, rows in (("word", facts.vocabulary), ("position", facts.positions)):
        yield f"embeddings.{name}_embeddings.weight", (rows, d)
    yield "embeddings.token_type_embeddings.weight", (facts.kinds, d)
    yield from vectors("embeddings.LayerNorm", d)
    for layer in range(facts.layers):
        at = f"encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            yield f"{at}.attention.{part}.weight", (d, d)
            yield f"{at}.attention.{part}.bias", (d,)
        yield from vectors(f"{at}.attention.output.LayerNorm", d)
        yield f"{at}.intermediate.dense.weight", (inner, d)
        yield f"{at}.intermediate.dense.bias", (inner,)
        yield f"{at}.output.dense.weight", (d, inner)
        yield f"{at}.output.dense.bias", (d,)
        yield from vectors(f"{at}.output.LayerNorm", d)


def vectors(norm: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The two weights of a layer norm."""
    yield f"{norm}.weight", (width,)
    yield f"{norm}.bias", (width,)


def bert(file: BertFile, length: int) -> Model:
    """The network of a folder, for rows of so many tokens; all are of the first kind."""
    facts, w = file.facts, file.tensors
    b = TokenNetwork(Tokens(length, facts.vocabulary))
    counted = b.add("counted", Present(facts.padding), IDS)
    mask = b.add("mask", Reshape((1, 1, length)), counted)
    fixed = w["embeddings.position_embeddings.weight"][:length]
    fixed = fixed + w["embeddings.token_type_embeddings.weight"][0]
    words = w["embeddings.word_embeddings.weight"]
    x = b.add("embeddings.word_embeddings", Embed(), IDS, table=words)
    x = b.add("embeddings.add", Add(), x, b.constant("embeddings.places", fixed))
    x = normed(b, "embeddings.LayerNorm", x, file)
    for layer in range(facts.layers):
        x = block(b, f"encoder.layer.{layer}", x, file, mask)
    return b.finish(pooled(b, x, counted, facts) if facts.pooled else x)


def dense(b: TokenNetwork, name: str, x: str, w: Mapping[str, Float[np.ndarray, "..."]]) -> str:
    """Adds a layer with its bias."""
    return b.linear(name, x, w[f"{name}.weight"], w[f"{name}.bias"])


def normed(b: TokenNetwork, name: str, x: str, file: BertFile) -> str:
    """Adds a layer norm."""
    scale, bias = (file.tensors[f"{name}.{slot}"] for slot in ("weight", "bias"))
    return b.add(name, LayerNorm(file.facts.eps), x, scale=scale, bias=bias)


def block(b: TokenNetwork, name: str, x: str, file: BertFile, mask: str) -> str:
    """Adds one block: attention, then a feed-forward part, a norm behind each."""
    facts, w = file.facts, file.tensors
    size = facts.width // facts.heads
    at, parts = f"{name}.attention.self", []
    for part in ("query", "key", "value"):
        given = [w[f"{at}.{part}.{slot}"] for slot in ("weight", "bias")]
        if part == "query":
            given = [scaled_queries(v, size) for v in given]
        made = b.linear(f"{at}.{part}", x, *given)
        parts.append(b.split(f"{at}.{part}.heads", made, facts.heads, size))
    found = b.attended(
        at, (parts[0], parts[1], parts[2]), Heads(facts.heads, facts.heads, size), mask
    )
    at = f"{name}.attention.output"
    x = normed(
        b, f"{at}.LayerNorm", b.add(f"{at}.add", Add(), dense(b, f"{at}.dense", found, w), x), file
    )
    inner = dense(b, f"{name}.intermediate.dense", x, w)
    inner = b.add(f"{name}.intermediate.act", Activation(facts.curve), inner)
    at = f"{name}.output"
    return normed(
        b, f"{at}.LayerNorm", b.add(f"{at}.add", Add(), dense(b, f"{at}.dense", inner, w), x), file
    )


def pooled(b: TokenNetwork, x: str, counted: str, facts: BertFacts) -> str:
    """Adds the mean over the tokens that count; of length 1 it is their sum of length 1."""
    row = b.add("pooling.row", Reshape((1, b.read.length)), counted)
    total = b.add("pooling.sum", MatMul(), row, x)
    total = b.add("pooling.flat", Reshape((facts.width,)), total)
    kind, source = ("l2", total) if facts.unit else ("sum", counted)
    size = b.add("pooling.size", Reduce(kind, (-1,), keepdims=True), source)
    least = b.constant("pooling.least", np.full((1,), LEAST))
    return b.add("pooling", Div(), total, b.add("pooling.some", Maximum(), size, least))
