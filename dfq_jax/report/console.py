"""Where a command writes: `rich` on a terminal, plain lines in a pipe; results apart from logs.

Nothing here knows JAX, so that the first line appears before it is imported.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dfq_jax.optim.progress import Progress as Step
from dfq_jax.quantize.unit_report import UnitReport

LOG_EVERY = 5.0


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
