"""``report``: pages and tables from directories of results."""

from pathlib import Path
from typing import Annotated

import typer

from liquidfusion.bench.commands.options import takes_options


@takes_options()
def report(
    directory: Annotated[Path, typer.Argument(help="A directory of results.")] = Path("benchmark_results"),
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Where the report goes.", show_default="the directory itself"),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Also write every chart as SVG into this directory.")] = None,
    png: Annotated[bool, typer.Option("--png", help="Charts as PNG, too (needs cairosvg).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths and the tables' data as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the paths.")] = False,
) -> None:
    """Make one HTML page and a Markdown table of all results in a directory."""
    from liquidfusion.bench import results
    from liquidfusion.bench.report import page as reporting

    found = reporting.read(directory)
    target = output_dir or directory
    written = reporting.write(found, target, images=images or (target if png else None), png=png)
    if as_json:
        rows = [
            {"model": r.model, "task": r.task, "strategy": r.strategy, "budget": r.budget, "context": r.context}
            | {"metrics": r.metrics}
            for r in found.rows
        ]
        typer.echo(results.to_json({"files": [str(path) for path in written], "rows": rows}), nl=False)
        return
    if not quiet:
        typer.echo(reporting.markdown(found))
    for path in written:
        typer.echo(path)
