"""The table of a stream, live on a terminal and as plain lines elsewhere."""

from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from liquidfusion.bench.jobs.streaming import Window
from liquidfusion.bench.terminal.output import number

_HEADER = ("tokens", "perplexity", "ms per call", "tokens/s", "cache", "memory", "peak")
_WIDTHS = (12, 12, 12, 10, 11, 11, 11)


class StreamView:
    """Shows each row of a stream when it is there: on a terminal the latest ones, above a bar with the time left.

    Parameters
    ----------
    tokens
        Tokens of the whole stream.
    quiet
        Show nothing.
    """

    def __init__(self, tokens: int, *, quiet: bool = False) -> None:
        self._console = Console(quiet=quiet)
        self._rows: deque[tuple[str, ...]] = deque(maxlen=max(5, self._console.height - 6))
        self._bar = Progress(
            TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=self._console
        )
        self._task = self._bar.add_task("", total=tokens)
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)
        self._is_live = self._console.is_terminal and not quiet

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        else:
            self._line(_HEADER)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:
            self._live.stop()

    def show(self, row: Window) -> None:
        """Show one more row."""
        cells = (
            number(row.tokens),
            number(row.perplexity),
            number(row.step_ms),
            number(row.tokens_per_second),
            *(number(value, "bytes") for value in (row.cache_bytes, row.resident_bytes, row.peak_bytes)),
        )
        self._rows.append(cells)
        self._bar.update(self._task, completed=row.tokens)
        if not self._is_live:
            self._line(cells)

    def _line(self, cells: tuple[str, ...]) -> None:
        line = "".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True))
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _render(self) -> Group:
        grid = Table(box=None, pad_edge=False, header_style="bold")
        for name in _HEADER:
            grid.add_column(name, justify="right")
        for cells in self._rows:
            grid.add_row(*cells)
        return Group(grid, self._bar)
