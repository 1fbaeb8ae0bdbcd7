"""Channels that become pixels; it belongs to the union in `graph/ops.py`."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class DepthToSpace:
    """Channels as blocks of pixels: Float[n h w c*block^2] -> Float[n h*block w*block c].

    The channels of a block follow one another for each channel that is made (`inner`, PyTorch's
    pixel shuffle), else those that are made follow one another for each place of the block.
    Source: Shi et al. 2016, "Real-Time Single Image and Video Super-Resolution", section 2.2.
    """

    block: int
    inner: bool = True
