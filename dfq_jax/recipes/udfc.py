"""UDFC: what rounding takes from a layer is put back by the layer that reads it; no data.

Bai et al. 2023, "Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning".
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float

from dfq_jax.graph.query import weighted_nodes
from dfq_jax.numerics.affine import fake_quantize
from dfq_jax.pruning.residuals import restored_in_order
from dfq_jax.quantization.calibrate import guard_biases
from dfq_jax.quantization.sites import Site
from dfq_jax.recipes.dfq_biases import placed
from dfq_jax.recipes.quantized import Quantized


def udfc_rounding(made: Quantized) -> Quantized:
    """A quantized network each of whose layers makes up for the rounding of those that it reads.

    With `--restore udfc` it is the paper's whole method: what is left makes up for channels that
    are gone first, then for rounding.

    Args:
      made: by `dfq`, with grids from extreme to extreme (`Observers(weights=MinMax())`).

    Returns:
      The same plan and scales, biases corrected analytically; the kernels lie on their grids.

    Reference:
      The paper's formulas are not known; `numerics.substitution.put_back` has ours.
    """
    quantized, reference = made.quantized, made.reference
    affines, table = quantized.affines, quantized.plan.table

    def rounded(name: str, kernel: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        site = Site(name)
        if site not in affines:
            return kernel
        exact = jax.device_put(np.float32(kernel))
        return np.asarray(fake_quantize(exact, affines[site], table[site].grid))

    names = [node.name for node in weighted_nodes(reference.graph)]
    kernels = {name: np.asarray(reference.params[name]["kernel"]) for name in names}
    found = restored_in_order(reference.graph, kernels, rounded)
    on_grid = {name: jax.device_put(np.float32(v)) for name, v in found.items()}
    model = placed(reference, on_grid, correct=True)
    return made._replace(quantized=guard_biases(dataclasses.replace(quantized, model=model)))
