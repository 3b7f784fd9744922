"""``sweep``: strategies x sizes x parameters x tasks x models."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from liquidfusion.bench.commands.options import CACHE, INPUT, Device, Input, Output, Rivals, Shown, takes_options


@dataclass(frozen=True, slots=True)
class Caches:
    """Which caches are measured: each strategy at each size with each number of bits."""

    strategies: Annotated[
        str | None,
        typer.Option("--strategies", "-s", help="Strategies, with commas.", show_default="all", **CACHE),
    ] = None
    cache_sizes: Annotated[
        str | None,
        typer.Option("--cache-sizes", "-c", help="Percentages, with commas.", show_default="4,20,40,80,100", **CACHE),
    ] = None
    budgets: Annotated[str | None, typer.Option(help="Sizes in tokens, with commas.", **CACHE)] = None
    memory: Annotated[
        str | None, typer.Option(help="Sizes in bytes for each row, with commas: 64MiB,128MiB.", **CACHE)
    ] = None
    bits: Annotated[
        list[str] | None,
        typer.Option(
            help="Of each number of keys and values: 16, 8, 4, or of both: 4,2. Give it again for another.",
            show_default="the model's own",
            **CACHE,
        ),
    ] = None
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", metavar="NAME=VALUE,…", help="Any of the parameters below by name.", **CACHE),
    ] = None


@dataclass(frozen=True, slots=True)
class Work:
    """How a sweep gets done."""

    jobs: Annotated[int, typer.Option(min=1, help="Processes; CUDA devices are taken in turn.")] = 1
    repeat: Annotated[int, typer.Option(min=1, help="Measure each cell so often.")] = 1


@takes_options()
def sweep(
    models: Annotated[str, typer.Option("--models", "-m", help="Models, with commas between them.")] = "smollm2",
    caches: Caches = Caches(),
    tasks: Annotated[str, typer.Option("--tasks", "-t", help="Tasks, with commas.", **INPUT)] = "generate,perplexity",
    given: Input = Input(),  # noqa: B008 - frozen
    rivals: Rivals = Rivals(),  # noqa: B008 - frozen
    device: Device = Device(),  # noqa: B008 - frozen
    work: Work = Work(),
    output: Output = Output(),  # noqa: B008 - frozen
    grid: dict[str, list[Any]] | None = None,
) -> None:
    """Measure strategies x sizes x tasks x models; start it again and it continues where it stopped."""
    from liquidfusion.bench import inputs
    from liquidfusion.bench.parameters import strategy_names
    from liquidfusion.bench.sweep.cells import Grid

    sizes = (caches.cache_sizes, caches.budgets, caches.memory)
    percent = "4,20,40,80,100" if sizes == (None, None, None) else caches.cache_sizes
    cells = Grid(
        models=inputs.words(models),
        tasks=inputs.options_by_task(inputs.words(tasks), given.common(), given.set_ or []),
        strategies=strategy_names() if caches.strategies is None else inputs.words(caches.strategies),
        cache_sizes=inputs.numbers("cache-sizes", percent, float),
        budgets=inputs.numbers("budgets", caches.budgets, int),
        memory=inputs.words(caches.memory),
        bits=caches.bits or [],
        parameters=(grid or {}) | inputs.parameters(caches.parameter or []),
        rival=rivals.rival or [],
        rival_python=rivals.python,
        seed=given.seed,
        dtype=device.dtype,
        repeat=work.repeat,
    ).cells()
    measure(cells, output.output_dir, device.device, work.jobs, output)


def measure(cells: Sequence[Any], directory: Path, device: str, jobs: int, shown: Shown | Output) -> None:
    """Measure the cells, show them, and end with code 1 if any failed."""
    from liquidfusion.bench import results
    from liquidfusion.bench.sweep import work
    from liquidfusion.bench.terminal.sweep import SweepView

    outcomes = []
    with SweepView(cells, quiet=shown.quiet or shown.as_json) as view:
        for outcome in work.sweep(cells, directory, devices=work.devices_of(device, jobs), progress=view.step):
            outcomes.append(outcome)
            view.finish(outcome)
    if shown.as_json:
        summary = [
            {"file": str(o.cell.path(directory)), "error": o.error, "metrics": o.document and o.document["metrics"]}
            for o in outcomes
        ]
        typer.echo(results.to_json(summary), nl=False)
    elif shown.quiet:
        typer.echo(directory)
    else:
        view.print()
        typer.echo(f"{len(outcomes)} results in {directory}; see them with: liquidfusion-bench report {directory}")
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        print(f"error: {len(failed)} of {len(outcomes)} cells failed; the first: {failed[0].error}", file=sys.stderr)
        raise typer.Exit(1)
