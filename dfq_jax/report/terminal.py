"""The words and rows of results, as a person reads them."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dfq_jax.allocation.diagnosis import worst_first
from dfq_jax.optim.progress import UnitReport
from dfq_jax.report.analyze import Report
from dfq_jax.report.console import one_line, shortened
from dfq_jax.report.decibels import decibel_cell, in_decibels, share_of_error
from dfq_jax.report.outputs import LEAST_SQNR, OutputReport, leading, overlapping, positive_ones
from dfq_jax.report.trust import trust_words

MEASURED: Mapping[str, Callable[[float], str]] = {
    "psnr_db": lambda value: f"PSNR {in_decibels(value)}",
    "cosine": "cosine {:.4f}".format,
    "divergence_nats": "divergence {:.4f} nats a token".format,
}
"""{measure of `quantization.outputs`: how it is told}."""
MOST_LETTERS = 64
"""Of a name inside of a sentence."""
LOST = 6.0
"""From how many dB on it is told that an output is worse behind its softmax or sigmoid."""


def named(name: str) -> str:
    """A name inside of a sentence: on one line, and not too long to be read over."""
    return shortened(one_line(name), MOST_LETTERS)


def duration_line(made: Mapping[str, Any]) -> str:
    """How long the making of images took, and how much of that went into compiling."""
    compiling = made.get("compile_seconds")
    of_it = "" if compiling is None else f" ({compiling} s compiling)"
    return f"in {made['seconds']} s{of_it}"


def layer_rows(report: Report) -> list[list[str]]:
    """The per-layer table: name, bits, share of work, fidelity."""
    total = max(report.macs, 1)
    return [
        [
            x.name,
            x.kind,
            f"{x.weight_bits or 'float'}/{x.input_bits or 'float'}",
            f"{100 * x.macs / total:.1f} %",
            f"{x.params:,}",
            decibel_cell(x.sqnr),
        ]
        for x in report.layers
    ]


LAYER_HEADER = ("layer", "operator", "bits w/a", "of MACs", "weights", "SQNR dB")


def coverage_line(report: Report) -> str:
    """What was quantized, weighted by work, and what stays float."""
    count = sum(x.integer for x in report.layers)
    line = (
        f"quantized {count}/{len(report.layers)} layers ({100 * report.coverage:.1f} % of MACs, "
        f"{100 * report.weight_coverage:.1f} % of weights, "
        f"{report.average_bits:.2f} bits a weight on average)"
    )
    left = [
        named(x.name) + (f" ({x.reason})" if x.reason else "")
        for x in report.layers
        if not x.integer
    ]
    if left:
        line += f"; float: {', '.join(left[:5])}" + (", …" if len(left) > 5 else "")
    return line


def float_line(report: Report) -> str:
    """What computes in float under every plan, by reason; empty if nothing does."""
    by_reason: dict[str, list[str]] = {}
    for kind in report.in_float:
        shares = [
            f"{100 * own / whole:.1f} % of {what}"
            for own, whole, what in (
                (kind.macs, report.macs, "MACs"),
                (kind.params, report.params, "weights"),
            )
            if own
        ]
        told = f", {', '.join(shares)}" if shares else ""
        by_reason.setdefault(kind.reason, []).append(f"{kind.count} {kind.kind}{told}")
    groups = [f"{', '.join(kinds)} ({reason})" for reason, kinds in by_reason.items()]
    return f"in float: {'; '.join(groups)}" if groups else ""


def blame_line(report: Report) -> str:
    """Which layer costs most, a sentence and a space; empty where layers were not compared."""
    if not report.costs:
        return ""
    worst, *_ = worst_first(report.costs)
    return (
        f"{named(worst.name)} costs most: quantized alone, it leaves the output "
        f"an SQNR of {in_decibels(round(worst.alone_db, 1) or 0.0)}. "
    )


def shared_line(report: Report) -> str:
    """Which tensor suffers most on a grid that it shares; empty if none does."""
    if not report.shared_grids:
        return ""
    worst, *others = report.shared_grids
    more = f"; {len(others)} more in the report" if others else ""
    return (
        f"unequal parts on one grid: {named(worst.part)} keeps {worst.shared_db:.0f} dB on "
        f"that of {named(worst.tensor)}, {worst.own_db:.0f} dB on its own{more}"
    )


def units_lines(report: Report) -> list[str]:
    """What learned rounding was worth, a line for each method; none if nothing was learned."""
    by_method: dict[str, list[UnitReport]] = {}
    for unit in report.units:
        by_method.setdefault(unit.method, []).append(unit)
    return [units_line(method, units) for method, units in by_method.items()]


def units_line(method: str, units: Sequence[UnitReport]) -> str:
    """The units of one method in a line; a unit that got worse counts as it was."""
    shares = [u.after / u.before if u.kept and u.before > 0 else 1.0 for u in units]
    mean = statistics.geometric_mean([max(share, 1e-12) for share in shares])
    worse = sum(not unit.kept for unit in units)
    several = len(units) > 1
    whose = f"errors of {len(units)} units" if several else "the error of one unit"
    on_average = " on average" if several else ""
    stayed = "was left as it was" if worse == 1 else "were left as they were"
    left = f"; {worse} would have got worse and {stayed}" if worse else ""
    return (
        f"{method}: {whose} fell to {100 * mean:.0f} %{on_average}, "
        f"in {sum(u.seconds for u in units):.0f} s{left}"
    )


def trust_lines(report: Report) -> list[str]:
    """How far to trust the result: expected loss, agreement, and what limits what they say."""
    lines = [] if report.estimate is None else trust_words(report.estimate)
    lines.append(f"{compared(report)} (not an accuracy)")
    if len(report.outputs) > 1:
        lines += [output_line(output) for output in report.outputs]
    if report.confidence == "low":
        lines.append("LOW CONFIDENCE in these numbers")
    return lines + [f"note: {note}" for note in report.notes]


def compared(report: Report) -> str:
    """What was compared with the float network, on what, and how alike it is."""
    sqnr = f"SQNR {in_decibels(report.sqnr)}"
    if not report.classes:
        off = f", an error of {100 * share_of_error(report.sqnr):.2g} %"
        told = off if LEAST_SQNR <= report.sqnr < math.inf else ""
        return (
            f"values of outputs on {report.images} {report.held_out}: {sqnr}{told}"
            f"{own_measure(report)}"
        )
    what = "the sign of the output" if report.classes == 1 else "the float network"
    return (
        f"agreement with {what} {100 * report.agreement:.1f} % of {report.whose}{report.images} "
        f"{report.held_out}{positive_ones(report.outputs)}, output {sqnr}{own_measure(report)}"
    )


def own_measure(report: Report) -> str:
    """The task's own measure of the part that suffers most, after a comma; empty without one."""
    of = leading([output for output in report.outputs if output.measure])
    return "" if of is None or of.fidelity is None else f", {MEASURED[of.measure](of.fidelity)}"


def output_line(output: OutputReport) -> str:
    """One part of an output: its fidelity, and how often it decides as the float network."""
    what = {"classes": "class", "signs": "sign", "values": ""}[output.kind]
    same = "" if output.agreement is None else f", same {what} {100 * output.agreement:.1f} %"
    same += "" if output.positive is None else f" ({overlapping(output)})"
    ruined = " RUINED" if output.fault else ""
    behind = "softmax" if output.kind == "classes" else "sigmoid"
    smaller = output.shown < output.sqnr - LOST
    lost = f" ({in_decibels(output.shown)} behind its {behind})" if smaller else ""
    return f"  output {named(output.name)}: SQNR {in_decibels(output.sqnr)}{lost}{same}{ruined}"
