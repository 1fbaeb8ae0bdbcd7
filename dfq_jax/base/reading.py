"""How a model is read, as a user says it."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How to read a model.

    Attributes:
      arch: Architecture of a checkpoint, e.g. resnet18; default: told by its tensors.
      size: Pixels along each side, 48x192 (height x width), or tokens of a row; default: as made.
      layout: Whether images have their channels first (nchw) or last (nhwc); default: found.
      mean: Mean of each channel of pixels in [0, 1], e.g. 0.485,0.456,0.406.
      std: Deviation images are divided by, e.g. 0.229,0.224,0.225.
      no_bn_fallback: Accept an ONNX file whose batch norms were folded away.
      unchecked: Do not run an ONNX file beside what was imported from it.
    """

    arch: str | None = None
    size: int | str | None = None
    layout: Literal["nchw", "nhwc"] | None = None
    mean: str | None = None
    std: str | None = None
    no_bn_fallback: bool = False
    unchecked: bool = False
