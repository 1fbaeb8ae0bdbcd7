"""What a small difference of outputs is worth where they are no class scores, and its curvature.

Each has a random probe `r` with `E[r r^T]` its Hessian at no difference, as
`softmax.curvature_probe` is for classes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

LEAST = 1e-30
"""Power of outputs that are all alike."""


def normal_divergence(exact: Float[Array, "..."], rough: Float[Array, "..."]) -> Float[Array, ""]:
    """Mean squared difference over twice the variance of the outputs, in nats.

    That is the divergence of two normal distributions that have this variance, a value each.
    """
    return jnp.mean((exact - rough) ** 2) / (2 * spread(exact))


def spread(values: Float[Array, "..."]) -> Float[Array, ""]:
    """The variance of outputs; their power where they are all alike."""
    variance = jnp.var(values)
    power = jnp.maximum(jnp.mean(values**2), LEAST)
    return jnp.where(variance > LEAST, variance, power)


def normal_probe(key: Key[Array, ""], values: Float[Array, "..."]) -> Float[Array, "..."]:
    """The probe of `normal_divergence`."""
    signs = jax.random.rademacher(key, values.shape, values.dtype)
    return signs / jnp.sqrt(values.size * spread(values))


def cosine_gap(exact: Float[Array, "*n size"], rough: Float[Array, "*n size"]) -> Float[Array, ""]:
    """One less the cosine between vectors, mean over them."""
    a, b = unit(exact), unit(rough)
    return 1 - jnp.mean(jnp.sum(a * b, axis=-1))


def cosine_probe(key: Key[Array, ""], values: Float[Array, "*n size"]) -> Float[Array, "*n size"]:
    """The probe of `cosine_gap`: its Hessian is `(I - a a^T) / |v|^2` for the direction `a`."""
    a, rows = unit(values), values.size // values.shape[-1]
    signs = jax.random.rademacher(key, values.shape, values.dtype)
    across = signs - a * jnp.sum(a * signs, axis=-1, keepdims=True)
    return across / (length(values) * rows**0.5)


def unit(vectors: Float[Array, "*n size"]) -> Float[Array, "*n size"]:
    """Vectors of length 1."""
    return vectors / length(vectors)


def length(vectors: Float[Array, "*n size"]) -> Float[Array, "*n 1"]:
    """Of vectors, above 0."""
    return jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), LEAST**0.5)
