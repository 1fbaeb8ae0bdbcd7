"""The whole quantized network in integers, as one program, to compare other ways with."""

from functools import partial

import jax

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.quantization.integer import integer_node
from dfq_jax.quantization.simulate import QuantizedModel, argument_hook


@jax.jit
def integer_predict(quantized: QuantizedModel, images: jax.Array) -> jax.Array:
    """First output of the quantized network for normalised images."""
    hook = argument_hook(quantized.plan, quantized.qparams)
    apply = partial(integer_node, quantized)
    return evaluate(quantized.model, images, hook=hook, apply=apply)[0][0]
