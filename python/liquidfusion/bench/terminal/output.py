"""Figures and tables as people read them."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

NOT_A_NUMBER = "not a number"


def number(value: float | None, unit: str = "") -> str:
    """Return a figure as people read it: three digits that count, bytes in binary units, a dash for none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return NOT_A_NUMBER
    if unit == "bytes":
        for name in ("B", "KiB", "MiB", "GiB"):
            if abs(value) < 1024 or name == "GiB":
                return f"{value:.3g} {name}" if abs(value) < 1000 else f"{value:.0f} {name}"
            value /= 1024
    if value == int(value) and abs(value) < 1e15:
        return f"{value:,.0f} {unit}".strip()
    if abs(value) >= 1e6:
        return f"{value:.3g} {unit}".strip()
    digits = max(0, 3 - len(str(int(abs(value))))) if abs(value) >= 1 else 3
    return f"{value:,.{digits}f} {unit}".strip()


def duration(seconds: float) -> str:
    """Return a time as people say it: 42 s, 3 min, 1 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output."""
    grid = Table(*header, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    Console().print(grid)
