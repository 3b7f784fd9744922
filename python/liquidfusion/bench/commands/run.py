"""``run``: one strategy at one size on one task."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from liquidfusion.bench.commands.options import INPUT, Input, Model, Output, Rivals, takes_options

if TYPE_CHECKING:
    from liquidfusion.bench.caches import CacheOptions
else:
    CacheOptions = Any


def _task_names() -> list[str]:
    from liquidfusion.bench.tasks import TASKS

    return list(TASKS)


@takes_options()
def run(
    model: Model,
    cache: CacheOptions,
    task: Annotated[
        str,
        typer.Option("--task", "-t", help="What to measure: see `tasks`.", autocompletion=_task_names, **INPUT),
    ] = "generate",
    given: Input = Input(),  # noqa: B008 - frozen
    baseline: Annotated[
        bool | None,
        typer.Option("--baseline/--no-baseline", help="Measure the full cache, too.", show_default="by task", **INPUT),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Measure so often; each is saved.", **INPUT)] = 1,
    rivals: Rivals = Rivals(),  # noqa: B008 - frozen
    output: Output = Output(),  # noqa: B008 - frozen
) -> None:
    """Measure one strategy at one cache size on one task, and write the result as JSON."""
    from liquidfusion import files
    from liquidfusion.bench import inputs, models, results, runner
    from liquidfusion.bench.terminal.result import Terminal, combined

    if rivals.rival:
        _beside_rivals(model, cache, task, given, rivals, repeat, output)
        return
    options = inputs.task_options(runner.find_task(task), given.common(), given.set_ or [])
    files.check_writable(output.output_dir)
    terminal = Terminal(quiet=output.quiet or output.as_json)
    with terminal.waiting(f"loading {model.model}"):
        loaded = models.load(model.model, device=model.device, dtype=model.dtype)
    documents, paths = [], []
    try:
        for index in range(repeat):
            label = f"{cache.strategy} · {task}" + (f" · {index + 1} of {repeat}" if repeat > 1 else "")
            with terminal.progress(label) as progress:
                documents.append(
                    runner.run(loaded, task, cache, baseline=baseline, seed=given.seed, progress=progress, **options)
                )
            paths.append(results.save(documents[-1], output.output_dir))
    finally:  # a full disk must not swallow what was measured
        if documents and output.as_json:
            typer.echo(results.to_json(documents[0] if repeat == 1 else documents), nl=False)
        elif documents and not output.quiet:
            terminal.show(combined(documents), paths)
        else:
            for path in paths:
                typer.echo(path)


def _beside_rivals(
    model: Model, cache: CacheOptions, task: str, given: Input, rivals: Rivals, repeat: int, output: Output
) -> None:
    """Measure the cache, what the task compares with, and rivals of the same size, as a sweep does."""
    from liquidfusion.bench import inputs
    from liquidfusion.bench.caches import SIZES
    from liquidfusion.bench.commands.sweep import measure
    from liquidfusion.bench.rivals import parse
    from liquidfusion.bench.sweep.cells import Cell, reference

    options = inputs.options_by_task([task], given.common(), given.set_ or [])[task]
    sizes = {name: getattr(cache, name) for name in SIZES}
    others = [rival for text in rivals.rival or [] for rival in parse(text, python=rivals.python, **sizes)]
    cells = [
        Cell(model.model, task, one, options, given.seed, model.dtype, index)
        for one in (reference(task), cache, *others)
        for index in range(repeat)
    ]
    measure(list({cell.key: cell for cell in cells}.values()), output.output_dir, model.device, 1, output)
