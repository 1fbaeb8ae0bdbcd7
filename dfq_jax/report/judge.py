"""What is thought of a network by its outputs; the one place where remedies are judged."""

import jax.numpy as jnp
import numpy as np

from dfq_jax.quantize.levels import Judged, Outputs
from dfq_jax.report.analyze import agreeing, decibels


def judged(exact: Outputs, rough: Outputs) -> Judged:
    """The SQNR of the output that suffers most, and how far the (first) output agrees.

    Args:
      exact: outputs of the float network, Float[n ...] each.
      rough: of the other network, for the same images.

    Returns:
      Both; the SQNR is minus infinity where an output is not finite.
    """
    fidelity = min(sqnr(a, b) for a, b in zip(exact, rough, strict=True))
    return Judged(fidelity, float(jnp.mean(agreeing(jnp.asarray(exact[0]), jnp.asarray(rough[0])))))


def sqnr(exact: np.ndarray, rough: np.ndarray) -> float:
    """Signal to noise of one output in dB."""
    a, b = exact.astype(np.float64), rough.astype(np.float64)
    found = decibels(np.array([np.sum(a**2), np.sum((a - b) ** 2)]))
    return float("-inf") if np.isnan(found) else found
