"""Stochastic rounding: up with a probability of the fraction, so errors are zero in the mean.

Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section 3. There it rounds what
training updates; here kernels, once:

    code = floor(w / s + u),  u ~ U(0, 1):   E[s code] = w
"""

import zlib

import jax
from jaxtyping import Array, Key

from dfq_jax.graph.graph import Model
from dfq_jax.numerics.rounding import rounded_at_random
from dfq_jax.quantization.calibrate import guard_biases
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.recipes.dfq_biases import placed
from dfq_jax.recipes.quantized import Quantized


def stochastic(made: Quantized, *, seed: int = 0) -> Quantized:
    """A quantized network with its kernels rounded at random instead of to nearest.

    Args:
      made: by `dfq`.
      seed: of the draws; equal seeds give equal networks.

    Returns:
      The same plan and scales, biases of the float network; the kernels of `quantized.model` lie on
      their grids.
    """
    quantized = placed_at_random(made.quantized, made.reference, jax.random.key(seed))
    return made._replace(quantized=guard_biases(quantized))


@jax.jit
def placed_at_random(
    quantized: QuantizedModel, reference: Model, key: Key[Array, ""]
) -> QuantizedModel:
    """The network with every quantized kernel of the float one rounded at random."""
    affines = quantized.affines
    own = lambda name: jax.random.fold_in(key, zlib.crc32(name.encode()))
    kernels = {
        site.node: rounded_at_random(
            reference.params[site.node]["kernel"], affines[site], spec.grid, own(site.node)
        )
        for site, spec in quantized.plan.entries
        if site.argument is None
    }
    model = placed(reference, kernels, correct=False)
    return QuantizedModel(model, quantized.plan, quantized.qparams)
