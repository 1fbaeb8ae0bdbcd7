"""SQuant: kernels rounded so that the sums of their errors vanish; no data, no training.

Guo et al. 2022, "SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian Approximation".
"""

from functools import partial

import jax

from dfq_jax.graph.graph import Model
from dfq_jax.numerics.squant import squant_kernel
from dfq_jax.quantization.calibrate import guard_biases
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.recipes.dfq_biases import placed
from dfq_jax.recipes.quantized import Quantized


def squant(made: Quantized, *, correct: bool = False) -> Quantized:
    """A quantized network with its kernels rounded by SQuant instead of to nearest.

    Args:
      made: by `dfq`; the paper's kernels have their extremes for ranges
        (`Observers(weights=MinMax())`).
      correct: correct biases analytically for what this rounding leaves; the paper does not. False
        takes the biases of the float network, whatever corrections `made` has.

    Returns:
      The same plan and scales; the kernels of `quantized.model` lie on their grids.
    """
    quantized = placed_by_squant(made.quantized, made.reference, correct=correct)
    return made._replace(quantized=guard_biases(quantized))


@partial(jax.jit, static_argnames="correct")
def placed_by_squant(
    quantized: QuantizedModel, reference: Model, *, correct: bool
) -> QuantizedModel:
    """The network with every quantized kernel of the float one placed."""
    plan, qparams = quantized.plan, quantized.qparams
    affines = quantized.affines
    kernels = {
        site.node: squant_kernel(reference.params[site.node]["kernel"], affines[site], spec.grid)
        for site, spec in plan.entries
        if site.argument is None
    }
    return QuantizedModel(placed(reference, kernels, correct=correct), plan, qparams)
