"""Biases of DFQ: corrected for rounded kernels, by statistics or by images."""

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float, Shaped

from dfq_jax.base.words import BiasCorrection
from dfq_jax.errors import UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.rewrite import with_params
from dfq_jax.numerics.levels import on_levels
from dfq_jax.optim.progress import Watcher
from dfq_jax.passes.moments import correct_biases_analytically
from dfq_jax.quantization.calibrate import guard_biases
from dfq_jax.quantization.kernel_shifts import correct_kernel_shifts, layers_on_levels
from dfq_jax.quantization.node_by_node import on_grids
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
    blind: bool,
) -> QuantizedModel:
    """The network with biases corrected, and norms re-estimated if asked for.

    Blind are networks without statistics whose images are noise.
    """
    quantized = begun
    if bias != "none":
        watch.says("correcting biases")
        if blind and images is not None and bias != "empirical":
            quantized = correct_kernel_shifts(begun, images)
            bias = "empirical" if bias == "both" else "none"
        if bias != "none":
            quantized = corrected(quantized, begun.model, images, bias)
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


def corrected_analytically(quantized: QuantizedModel) -> QuantizedModel:
    """The network with biases corrected for the rounding of its kernels; looked at in NumPy."""
    host, rounded = jax.device_get(quantized.model), jax.device_get(on_grids(quantized))
    kernels = {name: rounded.params[name]["kernel"] for name in layers_on_levels(quantized)}
    corrected = correct_biases_analytically(host, kernels).params
    biases = {
        name: {"bias": jax.device_put(corrected[name]["bias"])}
        for name in kernels
        if "bias" in corrected[name]
    }
    model = with_params(quantized.model, biases)
    return QuantizedModel(model, quantized.plan, quantized.qparams)


def rounded_kernels(quantized: QuantizedModel) -> dict[str, Kernel]:
    """{layer: kernel on its levels}, for every layer with a quantized kernel."""
    rounded, table = {}, quantized.plan.table
    for name in layers_on_levels(quantized):
        kernel, site = quantized.model.params[name]["kernel"], Site(name)
        rounded[name] = on_levels(kernel, table[site].levels, quantized.qparams[site])
    return rounded


def placed(reference: Model, kernels: Mapping[str, Kernel], *, correct: bool) -> Model:
    """The float network with other kernels, its biases corrected for them if asked for."""
    model = correct_biases_analytically(reference, kernels) if correct else reference
    return with_params(model, {name: {"kernel": kernel} for name, kernel in kernels.items()})
