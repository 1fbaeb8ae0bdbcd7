"""The line that always says what a run does: redrawn on a terminal, now and then in a pipe."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

REDRAWN = 2.0
"""Times a second."""


class AskedColumn(ProgressColumn):
    """A column whose text is asked for whenever the line is drawn."""

    def __init__(self, text: Callable[[], str]) -> None:
        """Remembers whom to ask."""
        super().__init__(Column(no_wrap=True))
        self.text = text

    def render(self, task: Task) -> Text:
        """The text of now."""
        return Text(self.text())


class Line:
    """The line of a terminal."""

    def __init__(self, console: Console, times: Callable[[], str]) -> None:
        """Makes it; `shown` draws it."""
        self.progress = Progress(
            SpinnerColumn("line"),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[steps]}", table_column=Column(no_wrap=True)),
            AskedColumn(times),
            TextColumn(
                "{task.fields[parts]}", table_column=Column(no_wrap=True, overflow="ellipsis")
            ),
            console=console,
            transient=True,
            refresh_per_second=REDRAWN,
        )
        self.task = self.progress.add_task("reading", total=None, steps="", parts="")
        self.doing = ""

    def says(self, doing: str) -> None:
        """Something begins of which no part can be told."""
        self.doing = doing
        self.set(total=None, steps="", parts="")

    def moves(self, doing: str, done: int, total: int, counted: str, parts: str) -> None:
        """So many steps of something are done, `counted` in words."""
        if doing != self.doing:
            self.doing = doing
            self.progress.reset(self.task)
        self.set(total=total, completed=done, steps=counted, parts=parts)

    def set(self, **fields: Any) -> None:
        """Changes what is drawn."""
        self.progress.update(self.task, description=self.doing, **fields)


@contextlib.contextmanager
def heartbeat(beat: Callable[[], None], every: float) -> Iterator[None]:
    """Calls `beat` every so many seconds, from another thread."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(every):
            beat()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
