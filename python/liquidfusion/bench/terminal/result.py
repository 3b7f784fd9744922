"""A result of ``run``: progress while it is measured, its figures afterwards."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from liquidfusion.bench.terminal.output import number
from liquidfusion.bench.terminal.progress import Lines, bar

if TYPE_CHECKING:  # it imports torch, and a list of strategies must not wait for it
    from liquidfusion.bench.tasks.task import Progress as Report


class Terminal:
    """Progress and results on a terminal.

    Parameters
    ----------
    quiet
        Show no progress.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._errors = Console(stderr=True, quiet=quiet)

    @contextlib.contextmanager
    def waiting(self, message: str) -> Iterator[None]:
        """Show that something is going on."""
        with self._errors.status(message) if self._errors.is_terminal else Lines(message, self._errors):
            yield

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Report]:
        """Show how far the work is and the time left; call what it yields with the steps done and the steps in all."""
        if not self._errors.is_terminal or self._errors.quiet:
            with Lines(label, self._errors) as lines:
                yield lines.report
            return
        with bar(label, self._errors) as shown:
            (row,) = shown.task_ids
            yield lambda done, total: shown.update(row, completed=done, total=total)

    def show(self, document: dict[str, Any], paths: Sequence[Path]) -> None:
        """Print a result: the text of its first request if it has one, its figures, and where they were saved."""
        out, metadata = Console(), document["metadata"]
        text = document["results"][0]["result"]["choices"][0]["text"]
        if text:
            out.print(Text(text.strip()), style="italic")
            out.print()
        with_full = any(metric["full"] is not None for metric in document["metrics"].values())
        repeats = document.get("repeats", 1)
        grid = Table(box=None, pad_edge=False, header_style="bold")
        grid.add_column(_title(metadata))
        grid.add_column("value" if repeats == 1 else f"mean of {repeats}", justify="right")
        grid.add_column("95 % interval" if repeats == 1 else "standard deviation")
        if with_full:
            grid.add_column("full cache", justify="right")
        for name, metric in document["metrics"].items():
            second = interval(metric) if repeats == 1 else f"± {number(metric['sd'])}"
            cells = [name.replace("_", " "), number(metric["value"], metric["unit"]), second]
            if with_full:
                cells.append("" if metric["full"] is None else number(metric["full"], metric["unit"]))
            grid.add_row(*cells)
        out.print(grid)
        for path in paths:
            out.print(Text(str(path)), style="dim", soft_wrap=True)


def interval(metric: dict[str, Any]) -> str:
    """Return a metric's interval, the number of its samples if that is one, or nothing."""
    low, high = metric["low"], metric["high"]
    if low is not None and high is not None and math.isfinite(metric["value"]):
        return f"{number(low)} … {number(high)}"
    return "n = 1" if metric.get("n") == 1 else ""


def combined(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return repeats of one measurement as one document: the first's texts, the mean of each figure and its spread."""
    if len(documents) == 1:
        return documents[0]
    from liquidfusion.bench.stats import mean_and_spread

    metrics = {}
    for name, metric in documents[0]["metrics"].items():
        mean, spread = mean_and_spread([document["metrics"][name]["value"] for document in documents])
        metrics[name] = metric | {"value": mean, "sd": spread}
    return documents[0] | {"metrics": metrics, "repeats": len(documents)}


def _title(metadata: dict[str, Any]) -> str:
    used = metadata["budgets_used"]
    size = "unbounded" if not used else f"budget {used[0]}" if len(used) == 1 else f"budgets {used[0]} to {used[-1]}"
    return f"{metadata['strategy']}, {size} · {metadata['model_name']}"
