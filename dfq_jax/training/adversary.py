"""Terms of a generator that plays against the student: where the two networks disagree most."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.numerics.softmax import divergence
from dfq_jax.synthesis.terms.base import Observed
from dfq_jax.values import Bound, bound


def agreement(*, after: int = 0) -> Bound[Array]:
    """-KL(t, s): the less, the more the student's answers differ from the teacher's.

    Slopes pass through the student's rounding straight, or there were none.

    Args:
      after: rounds in which the generator is not set against the student yet.
    """
    return bound(agreeing, after)


def agreeing(after: int, observed: Observed) -> Float[Array, ""]:
    """What `agreement` computes."""
    gap = -divergence(observed.logits, observed.shared)
    return jnp.where(observed.step < after, 0.0, gap) if after else gap


def own_entropy(observed: Observed) -> Float[Array, ""]:
    """L_ins: `-1/b sum_b sum_k p_bk log p_bk`, how unsure the teacher is of each image."""
    log_p = jax.nn.log_softmax(observed.logits)
    return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, -1))


def imbalance(observed: Observed) -> Float[Array, ""]:
    """L_bal: `sum_k q_k log q_k` of the mean `q` over images, least where classes are balanced."""
    mean = jnp.mean(jax.nn.softmax(observed.logits), 0)
    return jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-12)))
