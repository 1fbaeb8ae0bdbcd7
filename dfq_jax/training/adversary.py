"""Terms of a generator that plays against the student: where the two networks disagree most."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dfq_jax.synthesis.terms.base import Observed
from dfq_jax.training.losses import Lesson
from dfq_jax.values import Bound, bound


def opposed(loss: Callable[[Lesson], Float[Array, ""]], *, after: int = 0) -> Bound[Array]:
    """A loss of the student's with its sign turned: the less, the more it has left to learn.

    Slopes pass through the student's rounding straight, or there were none.

    Args:
      loss: of a `Lesson`, as a student's term has it.
      after: rounds in which the generator is not set against the student yet.
    """
    return bound(opposing, loss, after)


def opposing(
    loss: Callable[[Lesson], Float[Array, ""]], after: int, observed: Observed
) -> Float[Array, ""]:
    """What `opposed` computes; the lesson is what a generator's terms share."""
    gap = -loss(observed.shared)
    return jnp.where(observed.step < after, 0.0, gap) if after else gap


def quiet(observed: Observed) -> Float[Array, ""]:
    """-mean |f| of the last tensor that the teacher's terms compare: images that excite nothing."""
    return -jnp.mean(jnp.abs(list(observed.shared.teacher.taps.values())[-1]))


def own_entropy(observed: Observed) -> Float[Array, ""]:
    """L_ins: `-1/b sum_b sum_k p_bk log p_bk`, how unsure the teacher is of each image."""
    log_p = jax.nn.log_softmax(observed.logits)
    return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, -1))


def imbalance(observed: Observed) -> Float[Array, ""]:
    """L_bal: `sum_k q_k log q_k` of the mean `q` over images, least where classes are balanced."""
    mean = jnp.mean(jax.nn.softmax(observed.logits), 0)
    return jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-12)))
