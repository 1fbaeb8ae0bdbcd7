"""What a person reads: `rich` on a terminal, plain lines in a pipe; results apart from logs."""

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dfq_jax.optim.progress import Progress as Step
from dfq_jax.quantize.diagnosis import worst_first
from dfq_jax.quantize.finished import UnitReport
from dfq_jax.report.analyze import Report
from dfq_jax.report.outputs import OutputReport
from dfq_jax.report.trust import trust_words

LOG_EVERY = 5.0

LOST = 6.0
"""From how many dB on it is told that an output is worse behind its softmax or sigmoid."""


class Results(Console):
    """Stdout. Without a reader the command ends; rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Called while the error is handled."""
        raise BrokenPipeError


class Log(Console):
    """Stderr. Without a reader the work goes on; rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Called while the error is handled."""
        self.quiet = True


class Terminal:
    """Where a command writes.

    `quiet` (for `--json`) keeps stdout for the one JSON object; logs always go to stderr.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        """Opens stdout and stderr as they are now."""
        self.out, self.log = Results(highlight=False), Log(stderr=True, highlight=False)
        self.quiet = quiet
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.doing = ""
        self.logged_at = 0.0
        self.started = time.perf_counter()

    def say(self, text: str) -> None:
        """One line of result."""
        if not self.quiet:
            self.out.print(Text(printable(text)), soft_wrap=True)

    def note(self, text: str) -> None:
        """One line of log."""
        self.log.print(Text(printable(text), style="dim"), soft_wrap=True)

    def stage(self, text: str) -> None:
        """One line saying what begins now, with the seconds since the start."""
        self.note(f"[{time.perf_counter() - self.started:6.1f} s] {text}")

    def every(self, text: str) -> None:
        """A log line, at most one every few seconds."""
        if time.monotonic() - self.logged_at > LOG_EVERY:
            self.logged_at = time.monotonic()
            self.stage(text)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return round(time.perf_counter() - self.started, 2)

    def error(self, text: str) -> None:
        """One message of failure."""
        self.log.print(Text("error: ", style="bold red") + Text(printable(text)), soft_wrap=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; aligned plain columns where stdout is not a terminal."""
        if self.quiet:
            return
        rows = [[one_line(cell) for cell in row] for row in rows]
        if self.out.is_terminal:
            table = Table(title=title, title_justify="left", box=None, header_style="bold")
            for index, name in enumerate(header):
                table.add_column(name, justify="left" if index == 0 else "right")
            for row in rows:
                table.add_row(*map(Text, row))
            self.out.print(table)
            return
        if title:
            self.say(title)
        for line in aligned([header, *rows]):
            self.say(line)

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """A progress bar for the synthesis and the learning inside."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[parts]}"),
        )
        bar = Progress(*columns, console=self.log, transient=True)
        with bar if self.log.is_terminal else contextlib.nullcontext():
            self.bar = bar if self.log.is_terminal else None
            try:
                yield
            finally:
                self.bar, self.task = None, None

    def step(self, at: Step) -> None:
        """Shows how far synthesis or learning is."""
        done, total, label = at.batch * at.steps + at.step, at.batches * at.steps, at.what
        if label == "learning":  # units take more or fewer steps
            done, total, label = at.step, at.steps, f"learning unit {at.batch + 1}/{at.batches}"
        parts = ", ".join(f"{name} {value:.4g}" for name, value in at.parts.items())
        if self.bar is not None:
            if self.task is None:
                self.task = self.bar.add_task(label, total=total, parts="")
            elif label != self.doing:
                self.bar.reset(self.task, description=label, total=total)
            self.doing = label
            self.bar.update(self.task, completed=done, parts=parts)
        else:
            self.every(f"{label} {done}/{total} steps: {parts}")

    def unit(self, index: int, units: int, found: UnitReport) -> None:
        """Tells of a unit whose rounding was learned."""
        self.stage(
            f"unit {index + 1}/{units} {one_line(found.name)} ({found.method}): "
            f"{found.before:.4g} -> {found.after:.4g}{'' if found.kept else ', left as it was'}"
        )


def duration_line(made: Mapping[str, Any]) -> str:
    """How long the making of images took, and how much of that went into compiling."""
    compiling = made.get("compile_seconds")
    of_it = "" if compiling is None else f" ({compiling} s compiling)"
    return f"in {made['seconds']} s{of_it}"


def printable(text: str) -> str:
    """Text without control characters, so that no layer name can steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Printable text in which even line breaks are escaped: a name."""
    return printable(text).replace("\n", "\\n")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with columns of equal width, the first to the left, others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def layer_rows(report: Report) -> list[list[str]]:
    """The per-layer table: name, bits, share of work, fidelity."""
    total = max(sum(x.macs for x in report.layers), 1)
    return [
        [
            x.name,
            x.kind,
            f"{x.weight_bits or 'float'}/{x.input_bits or 'float'}",
            f"{100 * x.macs / total:.1f} %",
            f"{x.params:,}",
            f"{x.sqnr:.1f}",
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
        one_line(x.name) + (f" ({x.reason})" if x.reason else "")
        for x in report.layers
        if not x.integer
    ]
    if left:
        line += f"; float: {', '.join(left[:5])}" + (", …" if len(left) > 5 else "")
    return line


def float_line(report: Report) -> str:
    """What computes in float without multiplying, by reason; empty if nothing does."""
    by_reason: dict[str, list[str]] = {}
    for kind in report.in_float:
        by_reason.setdefault(kind.reason, []).append(f"{kind.count} {kind.kind}")
    groups = [f"{', '.join(kinds)} ({reason})" for reason, kinds in by_reason.items()]
    return f"in float: {'; '.join(groups)}" if groups else ""


def blame_line(report: Report) -> str:
    """Which layer costs most, a sentence and a space; empty where layers were not compared."""
    if not report.costs:
        return ""
    worst, *_ = worst_first(report.costs)
    return (
        f"{one_line(worst.name)} costs most: quantized alone, it leaves the output "
        f"{round(worst.alone_db, 1) or 0.0} dB. "
    )


def shared_line(report: Report) -> str:
    """Which tensor suffers most on a grid that it shares; empty if none does."""
    if not report.shared_grids:
        return ""
    worst, *others = report.shared_grids
    more = f"; {len(others)} more in the report" if others else ""
    return (
        f"unequal parts on one grid: {one_line(worst.part)} keeps {worst.shared_db:.0f} dB on "
        f"that of {one_line(worst.tensor)}, {worst.own_db:.0f} dB on its own{more}"
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
    whose = "the pixels of " if report.dense else ""
    what = "the sign of the output" if report.classes == 1 else "the float network"
    agreement = f"agreement with {what} {100 * report.agreement:.1f} % of {whose}{report.images} "
    lines = [] if report.estimate is None else trust_words(report.estimate)
    lines += [
        f"{agreement if report.classes else f'on {report.images} '}"
        f"{report.held_out}, output SQNR {report.sqnr:.1f} dB (not an accuracy)"
    ]
    if len(report.outputs) > 1:
        lines += [output_line(output) for output in report.outputs]
    if report.confidence == "low":
        lines.append("LOW CONFIDENCE in these numbers")
    return lines + [f"note: {note}" for note in report.notes]


def output_line(output: OutputReport) -> str:
    """One part of an output: its fidelity, and how often it decides as the float network."""
    what = {"classes": "class", "signs": "sign", "values": ""}[output.kind]
    same = "" if output.agreement is None else f", same {what} {100 * output.agreement:.1f} %"
    ruined = " RUINED" if output.fault else ""
    lost = f" ({output.shown:.1f} dB as returned)" if output.shown < output.sqnr - LOST else ""
    return f"  output {one_line(output.name)}: SQNR {output.sqnr:.1f} dB{lost}{same}{ruined}"
