"""``report``: pages and tables from directories of results."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liquidfusion.bench.commands.options import OUTPUT, takes_options

if TYPE_CHECKING:
    from liquidfusion.bench.report.rows import Found


@dataclass(frozen=True, slots=True)
class Files:
    """What is written, and what is printed of it."""

    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir", "-o", help="Where the report goes.", show_default="the last directory itself", **OUTPUT
        ),
    ] = None
    images: Annotated[
        Path | None, typer.Option(help="Also write every chart as SVG into this directory.", **OUTPUT)
    ] = None
    png: Annotated[bool, typer.Option("--png", help="Charts as PNG, too (needs resvg-py).", **OUTPUT)] = False
    parquet: Annotated[
        bool, typer.Option("--parquet", help="Also write the figures as report.parquet (needs pyarrow).", **OUTPUT)
    ] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths and the tables' data as JSON.", **OUTPUT)] = (
        False
    )
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the paths.", **OUTPUT)] = False


@takes_options()
def report(
    directory: Annotated[Path, typer.Argument(help="A directory of results.")] = Path("benchmark_results"),
    other: Annotated[
        Path | None, typer.Argument(help="Another one, to compare with the first.", show_default=False)
    ] = None,
    files: Files = Files(),
) -> None:
    """Make one HTML page, a Markdown table and a CSV file of all results in a directory, or compare two directories."""
    from liquidfusion.bench.report import rows

    found = rows.read(directory)
    if other is None:
        _one(found, files.output_dir or directory, files)
    else:
        _two((found, rows.read(other)), (directory, other), files.output_dir or other, files)


def _one(found: "Found", target: Path, chosen: Files) -> None:
    from liquidfusion.bench.report import export, page

    parts = page.sections(found)
    text = page.markdown(parts, found.errors, found.skipped_words())
    written = _write(target, "report", page.page(found), text)
    export.write_csv(found.rows, target / "report.csv")
    written.append(target / "report.csv")
    if chosen.parquet:
        export.write_parquet(found.rows, target / "report.parquet")
        written.append(target / "report.parquet")
    if chosen.images is not None or chosen.png:
        written += export.write_images(parts, chosen.images or target, png=chosen.png)
    listed = [
        {"model": r.model, "task": r.task, "strategy": r.strategy, "budget": r.budget, "context": r.context}
        | {"size": r.label, "repeats": r.repeats, "conditions": dict(r.conditions), "settings": dict(r.settings)}
        | {"cache_bytes": r.bytes(), "metrics": r.metrics}
        for r in found.rows
    ]
    _print(written, text, {"rows": listed, "skipped": found.skipped, "errors": found.errors}, chosen)
    _tell([found])


def _two(found: tuple["Found", "Found"], directories: tuple[Path, Path], target: Path, chosen: Files) -> None:
    from liquidfusion.bench.report import compare, page

    compared = compare.compare(found[0].rows, found[1].rows)
    names = (str(directories[0]), str(directories[1]))
    short = (directories[0].name, directories[1].name) if directories[0].name != directories[1].name else names
    intro, parts = compare.intro(compared, names), compare.sections(compared, short)
    text = (
        page.markdown(parts)
        .replace("# Results", "# Comparison", 1)
        .replace("\n\n", "\n\n" + "\n\n".join(intro) + "\n\n", 1)
    )
    title = f"LiquidFusion: {short[1]} compared with {short[0]}"
    written = _write(target, "comparison", page.html(title, intro, parts, []), text)
    listed = [
        {"model": p.one.model, "task": p.one.task, "strategy": p.one.strategy, "size": p.one.label}
        | {"context": p.one.context, "first": p.one.value(), "second": p.other.value(), "change": p.change}
        | {"kind": "ratio" if p.ratio else "difference", "low": p.low, "high": p.high, "paired": p.paired}
        for p in compared.pairs
    ]
    alone = [[{"task": r.task, "strategy": r.strategy, "size": r.label} for r in side] for side in compared.alone]
    _print(written, text, {"between": compared.between, "pairs": listed, "alone": alone}, chosen)
    _tell(found)


def _write(target: Path, stem: str, html: str, markdown: str) -> list[Path]:
    from liquidfusion import files

    written = [target / f"{stem}.html", target / f"{stem}.md"]
    for path, text in zip(written, (html, markdown), strict=True):
        files.write_text(path, text)
    return written


def _print(written: list[Path], text: str, data: dict[str, Any], chosen: Files) -> None:
    from liquidfusion.bench import results

    if chosen.as_json:
        typer.echo(results.to_json({"files": [str(path) for path in written], **data}), nl=False)
        return
    if not chosen.quiet:
        typer.echo(text)
    for path in written:
        typer.echo(path)


def _tell(found: "tuple[Found, ...] | list[Found]") -> None:
    """Name, on standard error, the files that are no results."""
    for one in found:
        if one.skipped:
            print(one.skipped_words(), file=sys.stderr)
