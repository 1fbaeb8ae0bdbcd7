"""A result in a few lines of text, and its layers in the order in which they deserve a look."""

import math
from collections.abc import Mapping
from typing import Any

from dfq_jax.report.analyze import LayerReport, Report
from dfq_jax.report.console import column_lines, one_line, told_apart
from dfq_jax.report.terminal import (
    LAYER_HEADER,
    coverage_line,
    float_line,
    layer_rows,
    shared_line,
    trust_lines,
    units_lines,
)

MOST_LAYERS = 10
MOST_LETTERS = 40
"""Of a name, so that lines fit a terminal."""


def worst_layers(report: Report) -> list[tuple[int, LayerReport]]:
    """Layers with their places from 1, worst first: by what they cost alone where that is known."""
    alone = {cost.name: cost.alone_db for cost in report.costs}

    def key(entry: tuple[int, LayerReport]) -> tuple[float, float]:
        layer = entry[1]
        fidelity = -math.inf if math.isnan(layer.sqnr) else layer.sqnr
        return alone.get(layer.name, math.inf), fidelity

    return sorted(enumerate(report.layers, 1), key=key)


def in_short(report: Report, settings: Mapping[str, Any]) -> str:
    """What came of a quantization, in one line."""
    count = sum(layer.integer for layer in report.layers)
    loss = "" if report.estimate is None else f", {trust_lines(report)[0]}"
    ended = f"FAILED: {report.failure}" if report.failure else "passed"
    return (
        f"{settings.get('scheme', '')} {settings.get('preset', '')}: {ended}, "
        f"{count}/{len(report.layers)} layers in integers{loss}"
    ).strip()


def summary(report: Report, settings: Mapping[str, Any]) -> str:
    """What came of a quantization as text: the verdict, what it rests on, and the worst layers.

    Args:
      report: how far the result can be trusted.
      settings: the resolved configuration.
    """
    rows = layer_rows(report)
    worst = [rows[place - 1] for place, _ in worst_layers(report)[:MOST_LAYERS]]
    names = told_apart([one_line(row[0]) for row in worst], MOST_LETTERS)
    table = [[name, *row[1:]] for name, row in zip(names, worst, strict=True)]
    more = len(rows) - len(worst)
    lines = [
        ", ".join(f"{name} {value}" for name, value in settings.items()),
        f"FAILED: {report.failure}" if report.failure else "",
        coverage_line(report),
        float_line(report),
        shared_line(report),
        *units_lines(report),
        *trust_lines(report),
        f"the worst layers{f' of {len(rows)}' if more else ''}:",
        *column_lines([LAYER_HEADER, *table]),
    ]
    return "\n".join(filter(None, lines))
