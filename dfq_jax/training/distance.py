"""How far a network on its levels is from its teacher, on images that neither learned from."""

import jax
from jaxtyping import Array, Float

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.numerics.softmax import divergence
from dfq_jax.quantization.narrowing import gap_of
from dfq_jax.quantization.simulate import QuantizedModel, simulation_hook

JUDGED = 64
"""Images that are judged together."""


def distance(teacher: Model, quantized: QuantizedModel, images: Float[Array, "n h w c"]) -> float:
    """How far outputs are from the teacher's: as in `engine.TrainingReport.before`."""
    rows = [images[i : i + JUDGED] for i in range(0, len(images), JUDGED)]
    return sum(float(gap(teacher, quantized, x)) * len(x) for x in rows) / len(images)


@jax.jit
def gap(
    teacher: Model, quantized: QuantizedModel, images: Float[Array, "n h w c"]
) -> Float[Array, ""]:
    """`distance` on a batch."""
    exact = evaluate(teacher, images)[0]
    rough = evaluate(
        quantized.model, images, hook=simulation_hook(quantized.plan, quantized.qparams)
    )[0]
    if exact[0].ndim == 2 and exact[0].shape[1] > 1:
        return divergence(exact[0], rough[0])
    return gap_of(rough, exact)
