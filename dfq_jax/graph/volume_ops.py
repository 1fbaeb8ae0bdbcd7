"""Convolution of volumes; it belongs to the union in `graph/ops.py`."""

import dataclasses

Triple = tuple[int, int, int]
VolumePads = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True, slots=True)
class Conv3d:
    """Convolution of volumes Float[n d h w cin].

    Slots: kernel Float[kd kh kw cin/groups cout], optional bias Float[cout].
    """

    strides: Triple = (1, 1, 1)
    padding: VolumePads = ((0, 0), (0, 0), (0, 0))
    groups: int = 1
    dilation: Triple = (1, 1, 1)
