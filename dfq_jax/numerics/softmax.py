"""How far class probabilities move, exactly and to second order."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Logits = Float[Array, "... classes"]


def divergence(exact: Logits, rough: Logits) -> Float[Array, ""]:
    """Mean Kullback-Leibler divergence `KL(softmax(exact) || softmax(rough))`, in nats.

    Args:
      exact: scores; the mean is over all axes but the last. A single score counts as the logit of
        yes against no.
      rough: other scores of the same shape.

    Returns:
      0 for equal scores, else positive.

    Reference:
      Cai et al. 2020, "ZeroQ: A Novel Zero Shot Quantization Framework".
    """
    return jnp.mean(divergences(exact, rough))


def divergences(exact: Logits, rough: Logits, temperature: float = 1.0) -> Float[Array, "..."]:
    """`KL(softmax(exact / T) || softmax(rough / T))` of each row of scores, as in `divergence`."""
    log_p, log_q = (jax.nn.log_softmax(two_sided(v) / temperature) for v in (exact, rough))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def two_sided(scores: Logits) -> Float[Array, "... sides"]:
    """The scores; a single one with a 0 beside it."""
    if scores.shape[-1] > 1:
        return scores
    return jnp.concatenate([scores, jnp.zeros_like(scores)], axis=-1)


def curvature_probe(key: Key[Array, ""], scores: Logits) -> Logits:
    """A random `r` with `E[r r^T]` the Hessian of `divergence(scores, .)` at the scores themselves.

    That is the Fisher matrix of the labels, `(diag(p) - p p^T) / rows` for each row of scores:
    `r = (I - p 1^T) diag(sqrt(p)) e / sqrt(rows)` with random signs `e`.

    Args:
      key: for the signs.
      scores: where; a single score counts as in `divergence`.

    Returns:
      In the shape of the scores.

    Reference:
      Hutchinson 1989, "A stochastic estimator of the trace ...", applied to the factor of the
      Gauss-Newton matrix as in Schraudolph 2002, "Fast Curvature Matrix-Vector Products".
    """
    p = jax.nn.softmax(two_sided(scores))
    signed = jax.random.rademacher(key, p.shape, p.dtype) * jnp.sqrt(p)
    rows = p.size // p.shape[-1]
    probe = (signed - p * jnp.sum(signed, axis=-1, keepdims=True)) / rows**0.5
    return probe[..., : scores.shape[-1]]
