"""Codes between classes: Qimera's superposed latent embeddings.

Choi et al. 2021, "Qimera: Data-free Quantization with Synthetic Boundary Supporting Samples". With
vectors `E` of classes, noise `n`, a linear map `M` and shares `l` that sum to 1,

    plain:       M norm(E_y + n)                        label y
    superposed:  sum_m l_m M norm(E_{y_m} + n_m)        label sum_m l_m y_m,  l = softmax(normal)

`norm` makes mean 0 and deviation 1 over the features of each vector; released code takes the
statistics of superposed vectors over the batch as well.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from dfq_jax.training.generator import Drawn, uniform_layer
from dfq_jax.values import bound

EPSILON = 1e-5


def superposed_classes(
    *, mixed: int = 2, chance: float = 0.4, width: int = 64, length: int = 64, rows: bool = False
) -> tuple[Callable[..., PyTree], Callable[..., Drawn]]:
    """What a generator's codes are made of, and how they are drawn.

    Args:
      mixed: classes of a superposed code, drawn with replacement.
      chance: that a step's codes are superposed, all of them.
      width: of a class's vector.
      length: of a code.
      rows: vectors begin as the rows of the teacher's classifier, which sets their width.
    """
    return bound(class_embeddings, width, length, rows), bound(superposed, mixed, chance)


def class_embeddings(
    width: int, length: int, from_rows: bool, key: Key[Array, ""], classes: int, rows: Array | None
) -> dict[str, PyTree]:
    """Vectors of classes and the map to codes, before the first step."""
    vector_key, map_key = jax.random.split(key)
    drawn = jax.random.normal(vector_key, (classes, width))
    vectors = drawn if rows is None or not from_rows else rows
    return {"vectors": vectors, "map": uniform_layer(map_key, vectors.shape[1:], (length,))}


def superposed(
    mixed: int, chance: float, made_of: Any, key: Key[Array, ""], size: int, classes: int
) -> Drawn:
    """What `superposed_classes` draws."""
    coin_key, label_key, noise_key, share_key = jax.random.split(key, 4)
    named = jax.random.randint(label_key, (size, mixed), 0, classes)
    vectors = made_of["vectors"][named]
    rough = standardised(vectors + jax.random.normal(noise_key, vectors.shape))
    codes = rough @ made_of["map"]["kernel"] + made_of["map"]["bias"]
    shares = jax.nn.softmax(jax.random.normal(share_key, (size, mixed)))
    alone = jax.nn.one_hot(jnp.zeros(size, jnp.int32), mixed)  # the first class, and no other
    shares = jnp.where(jax.random.bernoulli(coin_key, chance), shares, alone)
    labels = jnp.einsum("bm,bmk->bk", shares, jax.nn.one_hot(named, classes))
    return Drawn(jnp.einsum("bm,bmn->bn", shares, codes), labels)


def standardised(x: Float[Array, "b m f"]) -> Float[Array, "b m f"]:
    """Every vector with mean 0 and deviation 1."""
    mean = jnp.mean(x, -1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + EPSILON)
