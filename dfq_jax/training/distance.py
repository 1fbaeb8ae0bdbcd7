"""How far a network on its levels is from its teacher, on images that neither learned from."""

from functools import partial

import jax
from jaxtyping import Array, Float, Shaped

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.graph.tasks import predicts_tokens
from dfq_jax.numerics.softmax import divergence
from dfq_jax.quantization.narrowing import gap_of
from dfq_jax.quantization.simulate import QuantizedModel, simulation_hook
from dfq_jax.training.losses import directions_between

JUDGED, ROWS = 64, 8
"""Images, and rows of tokens, that are judged together."""


def distance(
    teacher: Model,
    quantized: QuantizedModel,
    images: Shaped[Array, "n ..."],
    *,
    directions: bool = False,
) -> float:
    """How far outputs are from the teacher's: as in `engine.TrainingReport.before`.

    Args:
      teacher: the float network.
      quantized: on its levels.
      images: normalised, or rows of ids.
      directions: outputs count as directions, not as scores or values.
    """
    size = ROWS if predicts_tokens(teacher) else JUDGED
    rows = [images[i : i + size] for i in range(0, len(images), size)]
    apart = lambda x: float(gap(teacher, quantized, x, directions)) * len(x)
    return sum(apart(x) for x in rows) / len(images)


@partial(jax.jit, static_argnums=3)
def gap(
    teacher: Model,
    quantized: QuantizedModel,
    images: Shaped[Array, "n ..."],
    directions: bool = False,
) -> Float[Array, ""]:
    """`distance` on a batch."""
    exact = evaluate(teacher, images)[0]
    rough = evaluate(
        quantized.model, images, hook=simulation_hook(quantized.plan, quantized.qparams)
    )[0]
    if directions:
        return directions_between(exact[0], rough[0])
    if predicts_tokens(teacher) or (exact[0].ndim == 2 and exact[0].shape[1] > 1):
        return divergence(exact[0], rough[0])
    return gap_of(rough, exact)
