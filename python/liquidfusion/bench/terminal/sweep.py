"""The table of a sweep, live on a terminal and printed at its end."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from liquidfusion.bench.runner import find_task
from liquidfusion.bench.sweep.cells import Cell
from liquidfusion.bench.sweep.work import Outcome
from liquidfusion.bench.terminal.output import number
from liquidfusion.bench.terminal.progress import Lines


class SweepView:
    """Shows each cell's main figure as it is measured.

    Parameters
    ----------
    work
        All cells of the sweep.
    quiet
        Show nothing.
    """

    def __init__(self, work: Sequence[Cell], *, quiet: bool = False) -> None:
        self._work = work
        self._states = {cell.key: Text("·", style="dim") for cell in work}
        self._console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._row = self._bar.add_task("starting", total=len(work))
        self._live = Live(console=self._console, get_renderable=self._render, transient=True, refresh_per_second=4)
        self._is_live = self._console.is_terminal and not quiet
        self._lines = Lines("sweep", self._console)
        self._done = 0

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        else:
            self._lines.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:
            self._live.stop()
        else:
            self._lines.__exit__()

    def step(self, cell: Cell, done: int, total: int) -> None:
        """Show how far the cell at work is."""
        self._states[cell.key] = Text(f"{100 * done // max(total, 1)} %", style="yellow")
        completed = self._done + min(done / max(total, 1), 0.99)
        self._bar.update(self._row, description=_title(cell), completed=completed)
        self._lines.label = _title(cell)
        self._lines.report(completed, len(self._work))

    def finish(self, outcome: Outcome) -> None:
        """Show a cell's result."""
        self._done += 1
        self._bar.update(self._row, completed=self._done)
        self._lines.report(self._done, len(self._work))
        if outcome.document is None:
            self._states[outcome.cell.key] = Text("failed", style="bold red")
        else:
            metric = outcome.document["metrics"].get(find_task(outcome.cell.task).main)
            text = "done" if metric is None else number(metric["value"])
            self._states[outcome.cell.key] = Text(text, style="dim" if outcome.resumed else "")
        if not self._is_live:
            state = outcome.error or self._states[outcome.cell.key].plain
            self._console.print(Text(f"{self._done}/{len(self._work)} {_title(outcome.cell)}: {state}"), soft_wrap=True)

    def tables(self) -> Iterator[Text | Table]:
        """A title and a table for each model and task: strategies down, sizes across."""
        for model, task in dict.fromkeys((cell.model, cell.task) for cell in self._work):
            group = [cell for cell in self._work if (cell.model, cell.task) == (model, task)]
            bounded = list(dict.fromkeys(cell.size for cell in group if cell.size != "unbounded"))
            yield Text(f"{find_task(task).main.replace('_', ' ')} · {task} · {Path(model).name}", style="italic")
            grid = Table(box=None, pad_edge=False, header_style="bold")
            grid.add_column("strategy")
            for size in bounded or ["unbounded"]:
                grid.add_column(_size(size), justify="right")
            for method in dict.fromkeys(cell.method for cell in group):
                states = {cell.size: self._states[cell.key] for cell in group if cell.method == method}
                row = [states.get(size, states.get("unbounded", Text(""))) for size in bounded or ["unbounded"]]
                grid.add_row(method, *row)
            yield grid
            yield Text()

    def print(self) -> None:
        """Print the tables on standard output."""
        console = Console()
        for part in self.tables():
            console.print(part)

    def _render(self) -> Group:
        return Group(*self.tables(), self._bar)


def _title(cell: Cell) -> str:
    again = f" ({cell.repeat + 1})" if cell.repeat else ""
    return f"{cell.task} · {cell.method} {_size(cell.size)}{again}"


def _size(size: str) -> str:
    with contextlib.suppress(ValueError):
        return f"{float(size):g} %"
    return f"{size[:-1]} tokens" if size[:-1].isdigit() else size
