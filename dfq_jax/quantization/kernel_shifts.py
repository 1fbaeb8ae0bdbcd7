"""Biases corrected for rounded kernels by what layers read of images, without statistics.

DFQ takes a layer's mean input from recorded statistics. A network that recorded none, or whose
exporter folded them away, shows what its layers read of images: where those are noise its means are
rough, but rounding shifts outputs so far that rough ones mend most of it.
"""

import jax
import numpy as np
from jaxtyping import Array, Float, Shaped

from dfq_jax.graph.evaluate import walked
from dfq_jax.graph.query import weighted_nodes
from dfq_jax.graph.rewrite import with_params
from dfq_jax.quantization.node_by_node import apply_float, in_batches, on_grids
from dfq_jax.quantization.plan import Site
from dfq_jax.quantization.side_by_side import mean_gap
from dfq_jax.quantization.simulate import QuantizedModel

SIGNIFICANCE = 6.0
"""Standard errors from which on a shift that noise shows counts: images are unlike photographs by
more than chance makes them unlike one another."""


def correct_kernel_shifts(
    quantized: QuantizedModel,
    images: Shaped[Array, "n ..."],
    *,
    significance: float = SIGNIFICANCE,
) -> QuantizedModel:
    """Removes from every bias the mean shift of its layer's output that its rounded kernel causes.

    Every layer reads what it reads in the float network. What rounding did to earlier layers is
    left to them, so that errors of these images do not add up along the network.

    Args:
      quantized: a calibrated network; its kernels are not rounded yet.
      images: normalised.
      significance: shrinks shifts as in `side_by_side.correct_biases`; 0 applies all in full.

    Returns:
      The same network with `b -= E[x] * (W_rounded - W)` per channel, the mean over images and
      positions.

    Reference:
      Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
      equation (17), with the mean input that images show; the shrinkage is our addition.
    """
    model, changes = quantized.model, {}
    for name, shifts in shifts_by_image(quantized, images).items():
        bias = np.asarray(model.params[name].get("bias", np.float32(0)))
        changes[name] = {"bias": jax.device_put(bias - mean_gap(shifts, significance))}
    return QuantizedModel(with_params(model, changes), quantized.plan, quantized.qparams)


def shifts_by_image(
    quantized: QuantizedModel, images: Shaped[Array, "n ..."]
) -> dict[str, Float[np.ndarray, "n chan"]]:
    """{layer: mean shift of its output over positions by its rounded kernel, for each image}."""
    model, rounded = quantized.model, on_grids(quantized).params
    found: dict[str, list[np.ndarray]] = {name: [] for name in layers_on_levels(quantized)}
    for batch in in_batches(images):
        for name, args, exact in walked(model, batch.images, apply=apply_float):
            if name in found:
                slots = {**model.params[name], "kernel": rounded[name]["kernel"]}
                shifted = apply_float(model.graph[name], slots, args)
                means = [by_channel(batch.counting(values)) for values in (shifted, exact)]
                found[name].append(means[0] - means[1])
    return {name: np.concatenate(each).astype(np.float32) for name, each in found.items()}


def layers_on_levels(quantized: QuantizedModel) -> tuple[str, ...]:
    """The layers with a quantized kernel."""
    layers = (node.name for node in weighted_nodes(quantized.model.graph))
    return tuple(name for name in layers if quantized.plan.spec(Site(name)) is not None)


def by_channel(values: Float[np.ndarray, "n ... chan"]) -> Float[np.ndarray, "n chan"]:
    """Means over positions, in double precision."""
    return values.mean(tuple(range(1, values.ndim - 1)), dtype=np.float64)
