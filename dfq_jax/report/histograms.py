"""How the weights of layers lie on their grids, as a picture."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.sites import Site
from dfq_jax.report.grid import MADE_BY
from dfq_jax.report.plots import name_in_chart

MOST = 6
"""Layers that are drawn."""


class Codes(NamedTuple):
    """How often a kernel has each of its codes.

    Attributes:
      layer: name.
      bits: of the kernel.
      lowest: code that is counted first.
      counts: of codes.
    """

    layer: str
    bits: int
    lowest: int
    counts: Integer[np.ndarray, " codes"]


def codes_of_layers(quantized: QuantizedModel, layers: Sequence[str]) -> list[Codes]:
    """The codes of the first few of these layers that have a quantized kernel."""
    sites = {layer: Site(layer) for layer in layers}
    table = dict(quantized.plan.entries)
    known = [layer for layer in layers if sites[layer] in table]
    found = []
    for layer in known[:MOST]:
        codes = quantized.codes(layer)
        lowest = int(codes.min())
        counts = np.bincount(codes.astype(np.int64).ravel() - lowest)
        found.append(Codes(layer, table[sites[layer]].levels.bits, lowest, counts))
    return found


def histograms_png(found: Sequence[Codes]) -> bytes:
    """A PNG of how often each code occurs, a panel for each kernel.

    Returns:
      The bytes of the PNG, the same for the same codes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow, and not every run draws
    from matplotlib.figure import Figure

    columns = min(len(found), 2)
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.6 * columns, 1.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, codes in zip(panels, found, strict=False):
        edges = codes.lowest - 0.5 + np.arange(len(codes.counts) + 1)
        panel.stairs(codes.counts, edges, fill=True, color="#7a8ba8")  # one shape, not one a code
        panel.set_yscale("symlog")
        panel.set_title(f"{name_in_chart(codes.layer)} ({codes.bits} bits)", fontsize=7)
        panel.tick_params(labelsize=6)
    for panel in panels[len(found) :]:
        panel.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata=MADE_BY)
    return buffer.getvalue()
