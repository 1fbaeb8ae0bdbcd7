"""Networks beyond classifiers, of which the package keeps the graphs (`store_networks.py`)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dfq_jax.types import InputContract

BLUE_FIRST = (
    "it reads the channels of an image in the order blue, green, red: give it images so, and keep "
    "that order in front of the files that are written"
)
EMBEDS = (
    "its output is an embedding, of which only the direction counts: quantize it with "
    '`task="embedding"`'
)


@dataclasses.dataclass(frozen=True)
class TaskNetwork:
    """A network that is no classifier.

    Attributes:
      build: makes the module.
      contract: what an image must be.
      remarks: what its users should know, in sentences.
      heads: keys of the weights whose first axis counts classes.
    """

    build: Callable[[], Any]
    contract: InputContract
    remarks: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


def imdn() -> Any:
    """IMDN for enlarging four times, in evaluation mode."""
    import task_modules

    return task_modules.Imdn().eval()


def fastestdet() -> Any:
    """FastestDet for 80 classes: one map of objectness, boxes and classes a sixteenth as large."""
    import task_modules

    return task_modules.FastestDet().eval()


def mobilefacenet() -> Any:
    """MobileFaceNet for faces of 112x96: 128 values, of which the direction tells the person."""
    import task_modules

    return task_modules.MobileFaceNet().eval()


def plain(height: int, width: int, mean: float = 0.0, std: float = 1.0) -> InputContract:
    """Images of that size with one normalisation for all colours."""
    return InputContract(height, width, mean=(mean,) * 3, std=(std,) * 3)


ANY_SIZE = ("N", "height", "width")
CLASS_SCORES = "detect_head.cls_layers.conv5x5."
NETWORKS: Mapping[str, TaskNetwork] = {
    "imdn_x4": TaskNetwork(imdn, dataclasses.replace(plain(48, 48), names=ANY_SIZE)),
    "fastestdet": TaskNetwork(
        fastestdet,
        plain(352, 352),
        (BLUE_FIRST,),
        tuple(
            f"{CLASS_SCORES}{key}" for key in ("3.weight", *(f"4.{k}" for k in ("weight", "bias")))
        )
        + tuple(f"{CLASS_SCORES}4.running_{k}" for k in ("mean", "var")),
    ),
    "mobilefacenet": TaskNetwork(mobilefacenet, plain(112, 96, 0.5, 128 / 255), (EMBEDS,)),
}
"""{name under which a network is known: how it is made and what it reads}."""
