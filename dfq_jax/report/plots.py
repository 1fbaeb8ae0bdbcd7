"""Mixed precision to look at: the front of loss against cost as a picture, and as rows of text."""

import io
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from dfq_jax.allocation.allocate import Allocation, LossTable
from dfq_jax.allocation.choices import Space
from dfq_jax.allocation.costs import Budget, BudgetUnit
from dfq_jax.allocation.diagnosis import LayerCost, worst_first
from dfq_jax.report.grid import MADE_BY

AXIS: dict[BudgetUnit, str] = {
    "bits": "average bits of a weight",
    "bytes": "bytes of weights in the file",
    "bops": "bit operations an example",
}
LEAST = 1e-9
"""Losses below this are drawn as this."""
MOST_BARS = 60
MOST_PERCENT = 200.0
"""Bars end here: an output whose error is twice its energy is lost."""
MOST_LETTERS = 36
BITS_HEADER = ("chosen", "what", "bits", "uniform", "predicted loss", "at 8 bits")
FRONT_HEADER = ("budget", "predicted loss", "bits of weights", "bits of tensors")


@runtime_checkable
class FrontPoint(Protocol):
    """What is drawn of an allocation."""

    @property
    def cost(self) -> Budget:
        """What it takes."""
        ...

    @property
    def loss(self) -> float:
        """The predicted divergence, in nats."""
        ...


def front_png(
    front: Sequence[FrontPoint], chosen: FrontPoint, uniform: FrontPoint | None = None
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
    figure.savefig(buffer, format="png", dpi=120, metadata=MADE_BY)
    return buffer.getvalue()


def costs_png(costs: Sequence[LayerCost]) -> bytes:
    """A PNG of what each layer costs alone, and of the error that has gathered behind it.

    Args:
      costs: of the layers in execution order, from the top; of many, the worst are drawn.

    Returns:
      The bytes of the PNG, the same for the same costs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    worst = worst_first(costs)[:MOST_BARS]
    drawn = [cost for cost in costs if cost in worst]
    figure = Figure(figsize=(9.0, 1.2 + 0.2 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    alone, gathered = figure.subplots(1, 2, sharey=True)
    rows = range(len(drawn))
    bars = [min(100 * cost.noise, MOST_PERCENT) for cost in drawn]
    worse = {cost.name for cost in worst[:5]}
    alone.barh(rows, bars, color=["#b00020" if c.name in worse else "#7a8ba8" for c in drawn])
    known = [(i, c.so_far_db) for i, c in enumerate(drawn) if c.so_far_db is not None]
    share = [min(100 * 10 ** (-db / 10), MOST_PERCENT) for _, db in known]
    gathered.barh([i for i, _ in known], share, color="#7a8ba8")
    alone.set_yticks(rows, [name_in_chart(cost.name) for cost in drawn], fontsize=7)
    alone.set_ylim(len(drawn) - 0.4, -0.6)
    alone.set_title("only this layer quantized", fontsize=9)
    alone.set_xlabel("error of the network's output, % of its energy", fontsize=8)
    gathered.set_title("all layers up to this one quantized", fontsize=9)
    gathered.set_xlabel("error of this layer's output, % of its energy", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata=MADE_BY)
    return buffer.getvalue()


def name_in_chart(name: str) -> str:
    """A name for a chart: its end, if it is long, without what a font cannot draw."""
    plain = "".join(c if c.isascii() and c.isprintable() and c != "$" else "?" for c in name)
    return plain if len(plain) <= MOST_LETTERS else f"...{plain[-MOST_LETTERS + 3 :]}"


def bit_rows(
    space: Space, losses: LossTable, chosen: Allocation, uniform: Allocation
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
