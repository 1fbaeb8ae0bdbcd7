"""Biases of DFQ: corrected for rounded kernels, by statistics or by images."""

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float, Shaped

from dfq_jax.base.words import BiasCorrection
from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import weighted_nodes
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.levels import on_levels
from dfq_jax.optim.progress import Watcher
from dfq_jax.passes.moments import correct_biases_analytically
from dfq_jax.quantization.calibrate import guard_biases
from dfq_jax.quantization.plan import Site
from dfq_jax.quantization.reestimate import reestimate_norms
from dfq_jax.quantization.side_by_side import correct_biases
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.recipes.quantized import Quantized

Kernel = Float[Array, "..."]


def mended(
    begun: QuantizedModel,
    images: Shaped[Array, "n ..."] | None,
    bias: BiasCorrection,
    watch: Watcher,
    *,
    reestimate: bool,
) -> QuantizedModel:
    """The network with biases corrected, and norms re-estimated if asked for."""
    quantized = begun
    if bias != "none":
        watch.says("correcting biases")
        quantized = corrected(begun, begun.model, images, bias)
    return reestimated(quantized, begun.model, images) if reestimate else quantized


def with_biases_corrected(made: Quantized, images: Shaped[Array, "n ..."]) -> Quantized:
    """A network that was made to learn from, biases as in float, as it is without learning."""
    quantized = corrected(made.quantized, made.reference, images, "analytic")
    return made._replace(quantized=guard_biases(quantized))


def corrected(
    quantized: QuantizedModel,
    reference: Model,
    images: Shaped[Array, "n ..."] | None,
    bias: BiasCorrection,
) -> QuantizedModel:
    """The network with its biases corrected; without moments by images, if there are some."""
    if bias != "empirical":
        quantized = corrected_analytically(quantized)
    if images is not None and (bias != "analytic" or not reference.moments):
        quantized = correct_biases(quantized, reference, images)
    return quantized


def reestimated(
    quantized: QuantizedModel, reference: Model, images: Shaped[Array, "n ..."] | None
) -> QuantizedModel:
    """The network with its norms re-estimated.

    Raises:
      UsageError: without images, or for a network without statistics.
    """
    if images is None:
        raise UsageError(
            "dfq(reestimate=True) got no images to see statistics on; synthesize some."
        )
    return reestimate_norms(quantized, reference, images)


@jax.jit
def corrected_analytically(quantized: QuantizedModel) -> QuantizedModel:
    """The network with biases corrected for the rounding of its kernels."""
    model = correct_biases_analytically(quantized.model, rounded_kernels(quantized))
    return QuantizedModel(model, quantized.plan, quantized.qparams)


def rounded_kernels(quantized: QuantizedModel) -> dict[str, Kernel]:
    """{layer: kernel on its levels}, for every layer with a quantized kernel."""
    plan, rounded = quantized.plan, {}
    for node in weighted_nodes(quantized.model.graph):
        site = Site(node.name)
        spec = plan.spec(site)
        if spec is not None:
            kernel = quantized.model.params[node.name]["kernel"]
            rounded[node.name] = on_levels(kernel, spec.levels, quantized.qparams[site])
    return rounded


def placed(reference: Model, kernels: Mapping[str, Kernel], *, correct: bool) -> Model:
    """The float network with other kernels, its biases corrected for them if asked for."""
    model = correct_biases_analytically(reference, kernels) if correct else reference
    return with_params(model, {name: {"kernel": kernel} for name, kernel in kernels.items()})
