"""What a person sees: progress on standard error, results on standard output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # they import torch, and a list of strategies must not wait for it
    from liquidfusion.bench.planning import Plan
    from liquidfusion.bench.showing import Kept
    from liquidfusion.bench.tasks.task import Progress as Report


def number(value: float | None, unit: str = "") -> str:
    """Return a figure as people read it: three digits that count, bytes in binary units."""
    if value is None:
        return "-"
    if unit == "bytes":
        for name in ("B", "KiB", "MiB", "GiB"):
            if abs(value) < 1024 or name == "GiB":
                return f"{value:.3g} {name}" if abs(value) < 1000 else f"{value:.0f} {name}"
            value /= 1024
    if value == int(value) and abs(value) < 1e15:
        return f"{value:,.0f} {unit}".strip()
    digits = max(0, 3 - len(str(int(abs(value))))) if abs(value) >= 1 else 3
    return f"{value:,.{digits}f} {unit}".strip()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output."""
    grid = Table(*header, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    Console().print(grid)


def show_plan(plan: Plan, title: str, strategy: str) -> None:
    """Print a plan: the full cache beside the bounded one."""
    fits = {True: "yes", False: "no"}
    kept = "unbounded" if plan.budget is None else f"budget {plan.budget}"
    table(
        (title, "full cache", f"{strategy}, {kept}"),
        [
            ("weights", number(plan.weight_bytes, "bytes"), number(plan.weight_bytes, "bytes")),
            ("cache", number(plan.full_cache_bytes, "bytes"), number(plan.bounded_cache_bytes, "bytes")),
            ("fits", fits[plan.full_fits], fits[plan.bounded_fits]),
            ("largest batch", str(plan.full_largest_batch), str(plan.bounded_largest_batch)),
            (
                "least time per step",
                number(1000 * plan.full_least_seconds, "ms"),
                number(1000 * plan.bounded_least_seconds, "ms"),
            ),
            (
                "time to expect",
                number(1000 * plan.full_step_seconds, "ms"),
                number(1000 * plan.bounded_step_seconds, "ms"),
            ),
            ("speed-up to expect", "1", f"{plan.speedup:.2f}"),
            (
                "tokens/s at the largest batch",
                number(round(plan.full_tokens_per_second)),
                number(round(plan.bounded_tokens_per_second)),
            ),
        ],
    )


def show_kept(kept: Kept, layer: int | None, head: int | None, strategy: str, page: Path | None) -> None:
    """Print a text with what was kept of it, and where the page is."""
    from liquidfusion.bench.showing import terminal

    console = Console()
    console.print(terminal(kept, layer, head))
    share = kept.share(layer, head)
    console.print(
        Text(
            f"\n{strategy}: of {len(kept.tokens)} tokens a head keeps {share.sum():.0f}; "
            f"{(share == 0).sum()} are kept by none, {(share == 1).sum()} by all",
            style="dim",
        )
    )
    if page is not None:
        console.print(Text(str(page)), style="dim", soft_wrap=True)


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
        with self._errors.status(message) if self._errors.is_terminal else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Report]:
        """Show a bar with the time left; call what it yields with the steps done and the steps in all."""
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=self._errors,
            transient=True,
            disable=self._errors.quiet or not self._errors.is_terminal,
        )
        with bar:
            row = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(row, completed=done, total=total)

    def show(self, document: dict[str, Any], path: Path | None) -> None:
        """Print a result: the text of its first request if it has one, its figures, and where it is if it was saved."""
        out, metadata = Console(), document["metadata"]
        text = document["results"][0]["result"]["choices"][0]["text"]
        if text:
            out.print(Text(text.strip()), style="italic")
            out.print()
        with_full = any(metric["full"] is not None for metric in document["metrics"].values())
        grid = Table(box=None, pad_edge=False, header_style="bold")
        grid.add_column(_title(metadata))
        grid.add_column("value", justify="right")
        grid.add_column("95 % interval")
        if with_full:
            grid.add_column("full cache", justify="right")
        for name, metric in document["metrics"].items():
            interval = "" if metric["low"] is None else f"{number(metric['low'])} … {number(metric['high'])}"
            cells = [name.replace("_", " "), number(metric["value"], metric["unit"]), interval]
            if with_full:
                cells.append("" if metric["full"] is None else number(metric["full"], metric["unit"]))
            grid.add_row(*cells)
        out.print(grid)
        if path is not None:
            out.print(Text(str(path)), style="dim", soft_wrap=True)


def _title(metadata: dict[str, Any]) -> str:
    used = metadata["budgets_used"]
    size = "unbounded" if not used else f"budget {used[0]}" if len(used) == 1 else f"budgets {used[0]} to {used[-1]}"
    return f"{metadata['strategy']}, {size} · {metadata['model_name']}"
