"""Distribution correction: a unit's inputs moved towards the statistics its layers recorded.

Liu et al. 2023, "PD-Quant: Post-Training Quantization based on Prediction Difference Metric",
section 3.3. Images made from the same statistics hardly need it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from dfq_jax.graph.evaluate import Tensor, evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.optim.fit import fit
from dfq_jax.optim.schedules import adam_with_plateau
from dfq_jax.optim.steps import Now, descent
from dfq_jax.quantization.second_moments import pieces
from dfq_jax.reconstruction.method import Correction
from dfq_jax.reconstruction.units import Host
from dfq_jax.values import bound

BATCH = 32
FLOOR = 1e-5
"""Smallest learning rate."""
PATIENCE = 100
"""Steps without a gain before the rate falls."""


def corrected_inputs(
    model: Model, inputs: Host, correction: Correction, key: Key[Array, ""]
) -> Host:
    """The inputs with which a unit's layers see more of the statistics they recorded.

    Each image is moved on its own: its means and deviations over positions are drawn to the moments
    of each layer that has some, which are those behind the batch norm, since that is folded.

    Args:
      model: the float unit, with moments.
      inputs: of all images.
      correction: how strongly, and for how long.
      key: the only source of randomness, of which there is none yet.

    Returns:
      Inputs; the same if the unit has no moments.
    """
    if not model.moments:
        return inputs
    done = [moved(model, piece, correction, key) for piece in pieces(inputs, BATCH)]
    return np.concatenate(done)


def moved(model: Model, start: Host, correction: Correction, key: Key[Array, ""]) -> Host:
    """`corrected_inputs` of one batch."""
    rule = bound(adam_with_plateau, correction.learning_rate, patience=PATIENCE, floor=FLOOR)
    context = {"model": model, "start": jax.device_put(start)}
    found = fit(
        descent(bound(gaps_and_distance, correction.closeness), rule),
        jax.device_put(start),
        context,
        steps=correction.steps,
        key=key,
        chunk=100,
    )
    return np.asarray(found.x)


def gaps_and_distance(
    closeness: float, x: Tensor, context: Any, now: Now
) -> tuple[Float[Array, ""], PyTree]:
    """What is minimised: gaps of statistics, and the distance from where the inputs were."""
    model, start = context["model"], context["start"]
    gaps = statistics_gap(model, x) / x.shape[0]
    distance = jnp.mean(jnp.sum((x - start) ** 2, axis=-1)) / closeness
    return gaps + distance, ({"statistics": gaps, "distance": distance}, ())


def statistics_gap(model: Model, x: Float[Array, "n ... c"]) -> Float[Array, ""]:
    """Squared gaps of each image's means and deviations from the moments, summed."""
    total = jnp.zeros(())
    layers = [node.name for node in model.graph.nodes if node.name in model.moments]
    for name, out in evaluate(model, x, taps=layers)[1].items():
        axes = tuple(range(1, out.ndim - 1))
        mean, deviation = jnp.mean(out, axes), jnp.sqrt(jnp.var(out, axes) + 1e-12)
        wanted = model.moments[name]
        total += jnp.sum((mean - wanted.mean) ** 2)
        total += jnp.sum((deviation - jnp.sqrt(wanted.var)) ** 2)
    return total
