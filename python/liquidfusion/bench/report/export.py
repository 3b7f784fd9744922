"""Results as files for other programs: CSV, Parquet, and charts as SVG and PNG."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liquidfusion import files
from liquidfusion.bench.data import require
from liquidfusion.bench.report.charts import Section
from liquidfusion.bench.report.rows import Row

_FIGURES = ("value", "low", "high", "full", "n", "sd", "unit")


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one record for each figure of each row: what was measured, how, and the figure.

    Everything that tells rows apart has a column of its own; conditions are called ``with_…``, settings of the cache
    ``set_…``.
    """
    return [
        {
            "model": row.model,
            "task": row.task,
            "strategy": row.strategy,
            "size": row.label,
            "budget": row.budget,
            "context": row.context,
            "repeats": row.repeats,
            **{f"with_{name.replace(' ', '_')}": value for name, value in row.conditions},
            **{f"set_{name.replace(' ', '_')}": value for name, value in row.settings},
            "metric": name,
            **{part: metric[part] for part in _FIGURES},
        }
        for row in rows
        for name, metric in row.metrics.items()
    ]


def _columns(listed: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of all columns, the figures last."""
    names = list(dict.fromkeys(name for record in listed for name in record))
    last = ["metric", *_FIGURES]
    return [name for name in names if name not in last] + last


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the records of the rows as CSV."""
    listed = records(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(listed), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    files.write_text(path, text.getvalue())


def write_parquet(rows: Sequence[Row], path: Path) -> None:
    """Write the records of the rows as Parquet.

    Raises
    ------
    ConfigError
        The package pyarrow is missing.
    """
    arrow, parquet = require("pyarrow", "pyarrow"), require("pyarrow.parquet", "pyarrow")
    listed = records(rows)
    columns = {name: [record.get(name) for record in listed] for name in _columns(listed)}
    with files.replacing(path) as temporary:
        parquet.write_table(arrow.table(columns), temporary)


def write_images(parts: Sequence[Section], directory: Path, *, png: bool) -> list[Path]:
    """Write every chart as SVG, and as PNG if that is wanted; return the paths.

    Raises
    ------
    ConfigError
        PNG is wanted and the package resvg-py is missing.
    """
    draw = require("resvg_py", "resvg-py").svg_to_bytes if png else None
    written = []
    for stem, chart in {stem: chart for part in parts for stem, chart in part.charts.items()}.items():
        path, svg = directory / f"{stem}.svg", chart.standalone()
        files.write_text(path, svg)
        written.append(path)
        if draw is not None:
            path = path.with_suffix(".png")
            with files.replacing(path) as temporary:
                temporary.write_bytes(bytes(draw(svg_string=svg, zoom=3)))
            written.append(path)
    return written
