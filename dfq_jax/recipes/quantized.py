"""What the methods of quantization make: the network on its grids beside the float one."""

from collections.abc import Mapping
from typing import NamedTuple

from dfq_jax.graph.graph import Model
from dfq_jax.quantization.simulate import QuantizedModel


class Quantized(NamedTuple):
    """A quantized network and the float one it was made from, node for node the same.

    Attributes:
      quantized: the network.
      reference: folded and equalized, in float.
      used_images: whether calibration or bias correction looked at the images.
      uncapped: activations that lost their ceiling of 6 to equalization.
      unsplit: {layer: why its channels were not split}, where splitting was asked for.
    """

    quantized: QuantizedModel
    reference: Model
    used_images: bool
    uncapped: tuple[str, ...] = ()
    unsplit: Mapping[str, str] = {}
