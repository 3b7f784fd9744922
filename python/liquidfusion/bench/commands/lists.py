"""``tasks`` and ``strategies``: what there is to choose from."""

import typer

from liquidfusion import _core
from liquidfusion.bench.commands.options import ListJsonOption


def tasks(as_json: ListJsonOption = False) -> None:
    """List the tasks and their own options."""
    from liquidfusion.bench import results
    from liquidfusion.bench.tasks import TASKS
    from liquidfusion.bench.terminal.output import table

    if as_json:
        listed = [{"task": t.name, "measures": t.summary, "options": t.options()} for t in TASKS.values()]
        typer.echo(results.to_json(listed), nl=False)
        return
    rows = [
        (task.name, task.summary, " ".join(f"{k}={v}" for k, v in task.options().items() if v is not None))
        for task in TASKS.values()
    ]
    table(("task", "measures", "options and defaults"), rows)


def strategies(as_json: ListJsonOption = False) -> None:
    """List the strategies, what each keeps, and the paper it comes from."""
    from liquidfusion.bench import results
    from liquidfusion.bench.terminal.output import table

    if as_json:
        typer.echo(results.to_json([dict(entry) for entry in _core.strategies()]), nl=False)
        return
    table(
        ("strategy", "keeps", "parameters", "paper"),
        [
            (str(s["name"]), str(s["summary"]), ", ".join(map(str, s["parameters"])), str(s["paper"] or ""))
            for s in _core.strategies()
        ],
    )
