"""Llama networks from files of llama2.c: seven sizes, then all weights in float32.

Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models", section 2.2: RMS norms
before each part, rotary positions, SwiGLU; heads that ask may share those that answer.
"""

import hashlib
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dfq_jax.data.text import BEGIN
from dfq_jax.errors import CheckpointError, UnsupportedModelError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import Activation, Add, Mul
from dfq_jax.graph.token_ops import Embed, RmsNorm, Rotary
from dfq_jax.io.language.builder import IDS, Heads, TokenNetwork, Weights, scaled_queries
from dfq_jax.io.readers.pickle_policy import show
from dfq_jax.io.zoo.bind import check_finite
from dfq_jax.types import Tokens

HEADER = struct.Struct("<7i")
NEWER = b"24ka"
"""First bytes of the later versions of such files, some of them of integers."""
OF_A_LAYER = ("attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")
EPS = 1e-5
MOST = 1 << 24
"""Of any size: no table is larger."""


class LlamaSizes(NamedTuple):
    """The header of a file.

    Attributes:
      dim: values of a token.
      hidden: values between the layers of a feed-forward part.
      layers: how many blocks.
      heads: that ask.
      kv_heads: that answer.
      vocab: ids.
      seq: longest row that there are positions for.
      tied: whether the table of tokens also makes the scores; else a kernel of its own does.
    """

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    seq: int
    tied: bool

    @property
    def size(self) -> int:
        """Values of a head."""
        return self.dim // self.heads

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{tensor: shape}, in the order of the file; kernels are (outputs, inputs)."""
        n, d, kv = self.layers, self.dim, self.kv_heads * self.size
        found = {
            "tok_embeddings": (self.vocab, d),
            "attention_norm": (n, d),
            "wq": (n, d, d),
            "wk": (n, kv, d),
            "wv": (n, kv, d),
            "wo": (n, d, d),
            "ffn_norm": (n, d),
            "w1": (n, self.hidden, d),
            "w2": (n, d, self.hidden),
            "w3": (n, self.hidden, d),
            "norm": (d,),
            "cos": (self.seq, self.size // 2),
            "sin": (self.seq, self.size // 2),
        }
        return found | ({} if self.tied else {"output": (self.vocab, d)})

    @property
    def bytes(self) -> int:
        """Of the file."""
        return HEADER.size + 4 * sum(math.prod(shape) for shape in self.shapes.values())


class LlamaFile(NamedTuple):
    """What a file holds.

    Attributes:
      sizes: its header.
      tensors: its weights by name.
      sha256: of all of it.
    """

    sizes: LlamaSizes
    tensors: Mapping[str, Float[np.ndarray, "..."]]
    sha256: str


def is_llama(path: Path) -> bool:
    """Whether a file is to be read as one of llama2.c: `.bin`, and nothing that PyTorch writes."""
    if path.suffix.lower() != ".bin":
        return False
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError:
        return False
    return start not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def read_llama(path: Path) -> LlamaFile:
    """Reads a file of llama2.c; its sizes are held against its length before anything is made.

    Raises:
      CheckpointError: if it is cut short, too long, or its sizes are none; or holds no numbers.
      UnsupportedModelError: if it is of a later version.
    """
    where = show(path.name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {show(error)}.") from error
    if data.startswith(NEWER):
        raise UnsupportedModelError(
            f"{where} is of a later version of llama2.c: export it again as version 0."
        )
    if len(data) < HEADER.size:
        raise CheckpointError(
            f"{where} has {len(data)} bytes, too few for the {HEADER.size} of its header: "
            "download it again."
        )
    sizes = sizes_of(HEADER.unpack_from(data), where)
    if len(data) != sizes.bytes:
        raise CheckpointError(
            f"{where} has {len(data)} bytes, the sizes in its header ask for {sizes.bytes} "
            f"({', '.join(f'{k} {v}' for k, v in sizes._asdict().items())}): download it again."
        )
    tensors, at = {}, HEADER.size
    for name, shape in sizes.shapes.items():
        count = math.prod(shape)
        tensors[name] = np.frombuffer(data, "<f4", count, at).reshape(shape)
        at += 4 * count
    try:
        check_finite(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return LlamaFile(sizes, tensors, hashlib.sha256(data).hexdigest())


def sizes_of(numbers: tuple[int, ...], where: str) -> LlamaSizes:
    """The sizes of a header.

    Raises:
      CheckpointError: naming the numbers, if no network has them.
    """
    dim, hidden, layers, heads, keys, vocab, seq = numbers
    sizes = LlamaSizes(dim, hidden, layers, heads, keys, abs(vocab), seq, vocab > 0)
    fits = all(1 <= n <= MOST for n in sizes[:7])
    fits = fits and heads % keys == 0 and dim % heads == 0 and (dim // heads) % 2 == 0
    if not fits or vocab == 1:
        raise CheckpointError(
            f"{where} is no file of llama2.c: dim, hidden, layers, heads, kv_heads, vocab, seq are "
            f"{', '.join(map(str, numbers))}. Heads divide dim into even parts, kv_heads heads."
        )
    return sizes


def llama(file: LlamaFile, length: int) -> Model:
    """The network of a file, for rows of so many tokens.

    Rotary planes are of the two halves of a head here, of neighbours in the file: rows of the
    kernels of queries and keys are reordered, which leaves all their products as they are.
    """
    sizes, w = file.sizes, file.tensors
    heads = Heads(sizes.heads, sizes.kv_heads, sizes.size)
    b = TokenNetwork(Tokens(length, sizes.vocab, begin=BEGIN if sizes.vocab > BEGIN else None))
    mask = b.causal("causal", heads.sharers)
    x = b.add("tok_embeddings", Embed(), IDS, table=w["tok_embeddings"])
    for i in range(sizes.layers):
        own = {name: w[name][i] for name in OF_A_LAYER}
        x = block(b, f"layers.{i}", x, own, heads, (w["cos"][:length], w["sin"][:length], mask))
    x = b.add("norm", RmsNorm(EPS), x, scale=w["norm"])
    return b.finish(b.linear("output", x, w["tok_embeddings" if sizes.tied else "output"]))


def block(
    b: TokenNetwork,
    name: str,
    x: str,
    w: Mapping[str, Weights],
    heads: Heads,
    places: tuple[Weights, Weights, str],
) -> str:
    """Adds one block: attention, then a feed-forward part, each on a norm of what was before.

    Args:
      b: receives it.
      name: of the block.
      x: what it reads.
      w: its weights by name.
      heads: of its attention.
      places: cosines and sines of rotary positions, and the mask.
    """
    cos, sin, mask = places
    y = b.add(f"{name}.attention_norm", RmsNorm(EPS), x, scale=w["attention_norm"])
    at = f"{name}.attention"
    turned = {}
    asking = scaled_queries(w["wq"], heads.size)
    for part, weight, count in (("wq", asking, heads.queries), ("wk", w["wk"], heads.keys)):
        made = b.linear(f"{at}.{part}", y, planes(weight, heads.size))
        made = b.split(f"{at}.{part}.heads", made, count, heads.size)
        turned[part] = b.add(f"{at}.{part}.rotary", Rotary(), made, cos=cos, sin=sin)
    values = b.split(f"{at}.wv.heads", b.linear(f"{at}.wv", y, w["wv"]), heads.keys, heads.size)
    found = b.attended(at, (turned["wq"], turned["wk"], values), heads, mask)
    x = b.add(f"{at}.add", Add(), x, b.linear(f"{at}.wo", found, w["wo"]))
    y = b.add(f"{name}.ffn_norm", RmsNorm(EPS), x, scale=w["ffn_norm"])
    at = f"{name}.feed_forward"
    gate = b.add(f"{at}.silu", Activation("silu"), b.linear(f"{at}.w1", y, w["w1"]))
    gated = b.add(f"{at}.mul", Mul(), gate, b.linear(f"{at}.w3", y, w["w3"]))
    return b.add(f"{at}.add", Add(), x, b.linear(f"{at}.w2", gated, w["w2"]))


def planes(weight: Weights, size: int) -> Weights:
    """A kernel (outputs, inputs) whose rotary planes are of neighbours, for those of halves."""
    order = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])
    return weight.reshape(-1, size, weight.shape[-1])[:, order].reshape(weight.shape)
