"""How far a piece of work is: a bar on a terminal, a line every few seconds in a log."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from liquidfusion.bench.terminal.output import duration

EVERY = 5.0
"""Seconds between two lines of a log."""


class Lines:
    """Prints, every few seconds, how far the work is and how long the rest will take; also when it says nothing itself.

    Parameters
    ----------
    label
        What is at work.
    console
        Where lines go.
    """

    def __init__(self, label: str, console: Console) -> None:
        self.label = label
        self._console = console
        self._start = time.monotonic()
        self._done, self._total, self._since = 0.0, 0.0, self._start
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Lines":
        if not self._console.quiet:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()

    def report(self, done: float, total: float) -> None:
        """Take note of the steps done and the steps in all."""
        self._done, self._total, self._since = done, total, time.monotonic()

    def line(self) -> str:
        """Return the line of this moment."""
        spent = time.monotonic() - self._start
        if not self._done or not self._total:
            return f"{self.label}: {duration(spent)} so far"
        left = (self._since - self._start) * (self._total - self._done) / self._done - (time.monotonic() - self._since)
        share = 100 * self._done / self._total
        return f"{self.label}: {share:.0f} %, {duration(spent)} so far, about {duration(max(left, 0))} left"

    def _run(self) -> None:
        while not self._end.wait(EVERY):
            self._console.print(Text(self.line()), soft_wrap=True)


@contextmanager
def bar(label: str, console: Console) -> Iterator[Progress]:
    """Show a bar with the time left on a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        shown.add_task(label, total=None)
        yield shown
