"""The quantized network and its float simulation, a hook of the one evaluator."""

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped

from dfq_jax.errors import PlanError
from dfq_jax.graph.evaluate import Hook, Slots, Tensor, chained, evaluate
from dfq_jax.graph.graph import Model, Node
from dfq_jax.numerics.affine import Affine, NumpyOrJax, bias_scale, dequantize, quantize_bias
from dfq_jax.numerics.levels import (
    Levels,
    Parameters,
    QuantizedArray,
    affine_of,
    codes_of,
    on_levels,
    quantized,
    scales_of,
    with_scales,
)
from dfq_jax.quantization.plan import Plan, Site

QParams = Mapping[Site, Parameters]
"""{site: scale and zero point, or what else its levels have}: the traced half of a plan."""


@partial(jax.tree_util.register_dataclass, data_fields=["model", "qparams"], meta_fields=["plan"])
@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """A folded network with everything needed to run it on its levels.

    Attributes:
      model: float parameters; kernels need not be on their levels (nearest rounding puts them
        there, and leaves kernels that learned rounding already placed).
      plan: what is quantized, static.
      qparams: scales and zero points, or what else the levels of a site have.
    """

    model: Model
    plan: Plan
    qparams: QParams

    @property
    def scales(self) -> dict[Site, Float[Array, "..."]]:
        """What may be trained of the levels, apart from zero points: `jax.grad` takes it."""
        return {site: scales_of(parameters) for site, parameters in self.qparams.items()}

    def with_scales(self, scales: Mapping[Site, Float[Array, "..."]]) -> "QuantizedModel":
        """The network with other scales at some sites."""
        changed = {site: with_scales(self.qparams[site], scale) for site, scale in scales.items()}
        return dataclasses.replace(self, qparams={**self.qparams, **changed})

    @property
    def affines(self) -> Mapping[Site, Affine]:
        """The scales and zero points of a network that has uniform grids only.

        Raises:
          PlanError: if a site has other levels.
        """
        return {site: affine_of(parameters) for site, parameters in self.qparams.items()}

    def kernel(self, layer: str) -> QuantizedArray:
        """The kernel of a layer as codes with their levels.

        Raises:
          PlanError: if it stays in float.
        """
        levels, parameters = self.kernel_levels(layer)
        return quantized(self.model.params[layer]["kernel"], levels, parameters)

    def codes(self, layer: str) -> Integer[np.ndarray, "..."]:
        """The codes of a layer's kernel, by NumPy as files have them: ties must fall alike.

        Nothing is compiled for its shape.

        Raises:
          PlanError: if it stays in float.
        """
        levels, parameters = self.kernel_levels(layer)
        host = jax.device_get((self.model.params[layer]["kernel"], parameters))
        return np.asarray(codes_of(host[0], levels, host[1]))

    def kernel_levels(self, layer: str) -> tuple[Levels, Parameters]:
        """What the kernel of a layer may hold, and its scales.

        Raises:
          PlanError: if it stays in float.
        """
        spec = self.plan.spec(Site(layer))
        if spec is None:
            raise PlanError(f"the kernel of {layer!r} is not quantized; it is in `model.params`.")
        return spec.levels, self.qparams[Site(layer)]


def simulation_hook(plan: Plan, qparams: QParams) -> Hook:
    """Fake-quantizes kernels, biases and edges as `plan` says. Build it inside the jitted function.

    Biases of layers that sum integers sit on the int32 grid of scale `x_scale * w_scale`, as in the
    deployed file; those of others stay in float.
    """
    return chained(argument_hook(plan, qparams), weight_hook(plan, qparams))


def weight_hook(plan: Plan, qparams: QParams) -> Hook:
    """Fake-quantizes kernels and biases only."""
    table = plan.table

    def hook(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        kernel, data = Site(node.name), Site(node.name, 0)
        if kernel in table:
            snapped = on_levels(slots["kernel"], table[kernel].levels, qparams[kernel])
            slots = {**slots, "kernel": snapped}
            if "bias" in slots and plan.multiplies(node):
                bias = snap_bias(slots["bias"], qparams[data], qparams[kernel])
                slots = {**slots, "bias": bias}
        return slots, args

    return hook


def argument_hook(plan: Plan, qparams: QParams) -> Hook:
    """Fake-quantizes edges only."""
    table = plan.table

    def snap(site: Site, x: Tensor) -> Tensor:
        if site not in table:
            return x
        return on_levels(x, table[site].levels, qparams[site])

    def hook(node: Node, slots: Slots, args: tuple[Tensor, ...]):
        return slots, tuple(snap(Site(node.name, i), x) for i, x in enumerate(args))

    return hook


def snap_bias(
    bias: Float[NumpyOrJax, " chan"], data: Parameters, kernel: Parameters
) -> Float[NumpyOrJax, " chan"]:
    """A bias rounded to its int32 grid."""
    scales = scales_of(data), scales_of(kernel)
    scale, codes = bias_scale(*scales), quantize_bias(bias, *scales)
    return dequantize(codes, Affine(scale, codes[:1] * 0))


def simulate(quantized: QuantizedModel, images: Shaped[Array, "n ..."]) -> Tensor:
    """First output of the quantized network, computed in float with fake quantization.

    Args:
      quantized: the network.
      images: normalised, NHWC.

    Returns:
      Logits, Float[n classes] for a classifier.
    """
    hook = simulation_hook(quantized.plan, quantized.qparams)
    return evaluate(quantized.model, images, hook=hook)[0][0]
