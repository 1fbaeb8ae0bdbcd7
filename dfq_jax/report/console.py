"""Where a command writes: `rich` on a terminal, plain lines in a pipe; results apart from logs.

Nothing here knows JAX, so that the first line appears before it is imported.
"""

import contextlib
import re
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console
from rich.text import Text

from dfq_jax.base.durations import spoken
from dfq_jax.optim.progress import Progress as Step
from dfq_jax.optim.progress import RunPhase, UnitReport, Watcher
from dfq_jax.report.outlook import Outlook

if TYPE_CHECKING:
    from dfq_jax.report.live import Line

OPTION = re.compile(r"""`([a-z][a-z_]*)=(["']?)([^`]*?)\2`""")
"""How messages name an option: `name=`, `name=value`."""
FLAGS = {"n": "-n", "rules": "--rule"}
"""Flags that are not called as in Python."""
LOG_EVERY = 5.0
SILENT = 10.0
"""Seconds without a line after which a pipe is told that the work goes on."""
LEAST_NAME = 12
"""Letters that a name keeps however narrow a terminal is."""
PIPED = 160
"""Letters of a line of a table where nobody knows how wide it may be."""


class Results(Console):
    """Stdout. Without a reader the command ends; rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Called while the error is handled."""
        raise BrokenPipeError


class Lossy:
    """A text file that loses what cannot be written: a full disk must not end the work."""

    def __init__(self, file: Any) -> None:
        """Writes to `file` as long as that can be written."""
        self._file = file

    def __getattr__(self, name: str) -> Any:
        """All else is that of the file."""
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Writes, or loses, a text."""
        with contextlib.suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is kept, if that can be."""
        with contextlib.suppress(OSError):
            self._file.flush()


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
        log = cast(TextIO, Lossy(sys.stderr))
        self.out, self.log = Results(highlight=False), Log(file=log, highlight=False)
        self.quiet = quiet
        self.line: Line | None = None
        self.outlook: Outlook | None = None
        self.logged_at = self.spoke_at = 0.0
        self.started = time.perf_counter()

    def say(self, text: str) -> None:
        """One line of result."""
        if not self.quiet:
            written(self.out, text)

    def note(self, text: str) -> None:
        """One line of log."""
        self.spoke_at = time.monotonic()
        written(self.log, text, style="dim")

    def stage(self, text: str) -> None:
        """One line saying what begins now, with the seconds since the start and those left."""
        left = self.left
        self.note(f"[{time.perf_counter() - self.started:6.1f} s{left and f', {left}'}] {text}")

    def every(self, text: str) -> None:
        """A log line, at most one every few seconds."""
        if time.monotonic() - self.logged_at > LOG_EVERY:
            self.logged_at = time.monotonic()
            self.stage(text)

    def phase(self, phase: RunPhase) -> None:
        """A part of the run begins."""
        now = time.perf_counter()
        self.outlook = self.outlook.next(phase, now) if self.outlook else Outlook(now, phase, now)
        if self.line is not None:
            self.line.says(phase.what)

    @property
    def left(self) -> str:
        """How long the run will take yet, in words; empty where nobody knows."""
        if self.outlook is None:
            return ""
        return f"about {spoken(self.outlook.left(time.perf_counter()))} left"

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return round(time.perf_counter() - self.started, 2)

    def error(self, text: str) -> None:
        """One message of failure."""
        written(self.log, text, sign="error:")

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; aligned plain columns where stdout is not a terminal."""
        if self.quiet:
            return
        rows = [[one_line(cell) for cell in row] for row in rows]
        rows = within(self.out.width if self.out.is_terminal else PIPED, header, rows)
        if self.out.is_terminal:
            from rich.table import Table

            table = Table(title=title, title_justify="left", box=None, header_style="bold")
            for index, name in enumerate(header):
                table.add_column(name, justify="left" if index == 0 else "right")
            for row in rows:
                table.add_row(*map(Text, row))
            self.out.print(table)
            return
        if title:
            self.say(title)
        for line in column_lines([header, *rows]):
            self.say(line)

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Within, it is always said what is being done, for how long, and how long it will take."""
        from dfq_jax.report.live import Line, heartbeat

        try:
            if self.log.is_terminal:
                times = lambda: f"{spoken(self.elapsed)}{self.left and f', {self.left}'}"
                self.line = Line(self.log, times)
                with self.line.progress:
                    yield
            else:
                with heartbeat(self.beat, SILENT / 4):
                    yield
        finally:
            self.line, self.outlook = None, None

    def beat(self) -> None:
        """A line, if there has been none for long."""
        if self.outlook is not None and time.monotonic() - self.spoke_at > SILENT:
            self.stage(f"still {self.outlook.phase.what}")

    def step(self, at: Step) -> None:
        """Shows how far synthesis or learning is."""
        done, total, label = at.batch * at.steps + at.step, at.batches * at.steps, at.what
        if at.part is not None:  # units take more or fewer steps
            done, total, label = at.step, at.steps, f"{label} unit {at.batch + 1}/{at.batches}"
        parts = ", ".join(f"{name} {value:.4g}" for name, value in at.parts.items())
        if self.outlook is not None:
            self.outlook = self.outlook.moved(at.done, time.perf_counter())
        counted = f"{done}/{total} {'layers' if at.what == 'solving' else 'steps'}"
        if self.line is not None:
            self.line.moves(label, done, total, counted, parts)
        else:
            self.every(f"{label} {counted}{parts and f': {parts}'}")

    @property
    def watcher(self) -> Watcher:
        """Whoever reads, as one who watches a run."""
        return Watcher(self.stage, self.step, self.unit, self.phase)

    def unit(self, index: int, units: int, found: UnitReport) -> None:
        """Tells of a unit whose rounding was learned."""
        self.stage(
            f"unit {index + 1}/{units} {one_line(found.name)} ({found.method}): "
            f"{found.before:.4g} -> {found.after:.4g}{'' if found.kept else ', left as it was'}"
            + "".join(f"; {one_line(note)}" for note in found.notes)
        )


def written(console: Console, text: str, *, style: str = "", sign: str = "") -> None:
    """Writes a message, on a terminal broken between words.

    Lines of code, which are indented behind the first line, are to be copied and stay whole, as
    paths do.

    Args:
      console: where to.
      text: the message.
      style: of it.
      sign: a word before it, that is seen from afar.
    """
    whole = f"{sign} {text}" if sign else text
    for index, line in enumerate(printable(flagged(whole)).split("\n")):
        code = index > 0 and line.startswith("  ")
        for part in [line] if code or not console.is_terminal else broken(line, console.width):
            shown = Text(part, style)
            if index == 0 and part.startswith(sign):
                shown.stylize("bold red", 0, len(sign))
            console.print(shown, soft_wrap=True)


def broken(line: str, width: int) -> list[str]:
    """A line as lines of so many letters, each indented alike; longer words stay whole."""
    indent = " " * (len(line) - len(line.lstrip(" ")))
    how = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": indent}
    return textwrap.wrap(line, width, **how) or [""]


def flagged(text: str) -> str:
    """A message with options as flags: `layout="nchw"` as --layout nchw, `mean=` as --mean."""

    def flag(found: re.Match[str]) -> str:
        name, value = found[1], found[3]
        spelled = FLAGS.get(name, f"--{name.replace('_', '-')}")
        if value.startswith("("):
            value = ("x" if name == "size" else ",").join(re.findall(r"[^(), ]+", value))
        return spelled if value in ("", "True") else f"{spelled} {value}"

    return OPTION.sub(flag, text)


def printable(text: str) -> str:
    """Text without control characters, so that no layer name can steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Printable text in which even line breaks are escaped: a name."""
    return printable(text).replace("\n", "\\n")


def shortened(name: str, most: int) -> str:
    """A name of at most so many letters, cut in the middle: both of its ends tell layers apart."""
    if len(name) <= most:
        return name
    kept = max(most, 3) - 1
    return f"{name[: kept // 2]}…{name[len(name) - (kept - kept // 2) :]}"


def within(width: int, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows with their first column shortened to fit; cells have a space on both sides."""
    others = [max(len(row[i]) for row in [header, *rows]) for i in range(1, len(header))]
    room = max(width - sum(others) - 2 * len(header), LEAST_NAME)
    names = told_apart([row[0] for row in rows], room)
    return [[name, *row[1:]] for name, row in zip(names, rows, strict=True)]


def told_apart(names: Sequence[str], most: int) -> list[str]:
    """Names shortened to so many letters; those that would come out alike get a number.

    Converters call a layer after all that they fused, and such names differ in their middle.
    """
    short = [shortened(name, most) for name in names]
    alike: dict[str, list[str]] = {}
    for name, cut in zip(names, short, strict=True):
        if name not in alike.setdefault(cut, []):
            alike[cut].append(name)

    def numbered(name: str, cut: str) -> str:
        place = alike[cut].index(name) + 1
        end = f"#{place}"
        return cut if len(alike[cut]) == 1 else shortened(name, most - len(end)) + end

    return [numbered(name, cut) for name, cut in zip(names, short, strict=True)]


def column_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with columns of equal width, the first to the left, others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
