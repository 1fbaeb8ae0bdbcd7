"""Mixed precision to look at: the front of loss against cost as a picture, and as rows of text."""

import io
from collections.abc import Sequence

from dfq_jax.quantize.bits import Allocation, Losses
from dfq_jax.quantize.choices import Space
from dfq_jax.quantize.costs import Unit

AXIS: dict[Unit, str] = {
    "bits": "average bits of a weight",
    "bytes": "bytes of weights in the file",
    "bops": "bit operations an image",
}
LEAST = 1e-9
"""Losses below this are drawn as this."""
BITS_HEADER = ("chosen", "what", "bits", "uniform", "predicted loss", "at 8 bits")
FRONT_HEADER = ("budget", "predicted loss", "bits of weights", "bits of tensors")


def front_png(
    front: Sequence[Allocation], chosen: Allocation, uniform: Allocation | None = None
) -> bytes:
    """A PNG of a front with the allocation that was chosen from it.

    Args:
      front: by rising cost, all in one unit.
      chosen: an allocation in that unit.
      uniform: another one to compare with.

    Returns:
      The bytes of the PNG, the same for the same front.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow, and few runs draw
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw = lambda points, style, label: axes.plot(
        [p.cost.amount for p in points],
        [max(p.loss, LEAST) for p in points],
        style,
        label=label,
    )
    draw(front, ".-", "best allocations")
    draw([chosen], "o", f"chosen ({chosen.cost})")
    if uniform is not None:
        draw([uniform], "x", f"uniform ({uniform.cost})")
    axes.set_yscale("log")
    axes.set_xlabel(AXIS[chosen.cost.unit])
    axes.set_ylabel("predicted divergence, nats")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def bit_rows(
    space: Space, losses: Losses, chosen: Allocation, uniform: Allocation
) -> list[list[str]]:
    """One row for each kernel and tensor, under `BITS_HEADER`.

    Args:
      space: what could be chosen.
      losses: predicted loss of each candidate of each choice.
      chosen: the allocation.
      uniform: the one to compare with.

    Returns:
      Name, kind, bits of both, the predicted loss with the chosen bits and with the most.
    """
    return [
        [
            choice.name,
            "kernel" if choice.weight else "tensor",
            str(bits),
            str(others),
            f"{row[space.bits.index(bits)]:.2e}",
            f"{row[-1]:.2e}",
        ]
        for choice, row, bits, others in zip(
            space.choices, losses, chosen.bits, uniform.bits, strict=True
        )
    ]


def front_rows(space: Space, front: Sequence[Allocation]) -> list[list[str]]:
    """One row for each point of a front, under `FRONT_HEADER`."""
    return [
        [
            str(point.cost),
            f"{point.loss:.2e}",
            summary(space, point, weight=True),
            summary(space, point, weight=False),
        ]
        for point in front
    ]


def summary(space: Space, point: Allocation, *, weight: bool) -> str:
    """How many kernels, or tensors, have how many bits: `3x4 2x8`; empty if there are none."""
    bits = [b for c, b in zip(space.choices, point.bits, strict=True) if c.weight == weight]
    return " ".join(f"{bits.count(b)}x{b}" for b in space.bits if b in bits)
