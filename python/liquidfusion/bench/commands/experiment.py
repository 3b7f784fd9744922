"""``experiment``: a sweep that is written down in YAML."""

from pathlib import Path
from typing import Annotated

import typer

from liquidfusion.bench.commands import sweep
from liquidfusion.bench.commands.options import Shown, takes_options


def _names() -> list[str]:
    from liquidfusion.bench.sweep import experiments

    return [f"experiment={name}" for name in experiments.available([Path("configs")])]


@takes_options()
def experiment(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE...",
            help="experiment=NAME takes NAME.yaml; other keys override it: seed=1 tasks.perplexity.context=512",
            autocompletion=_names,
            show_default=False,
        ),
    ] = None,
    config_dir: Annotated[
        list[Path] | None, typer.Option(help="Where your experiments are.", show_default="configs, then those shipped")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the settings and count the cells only.")] = False,
    shown: Shown = Shown(),  # noqa: B008 - frozen
) -> None:
    """Run a sweep that is written down in YAML."""
    from dataclasses import asdict

    import yaml

    from liquidfusion.bench.sweep import experiments

    chosen = experiments.load(settings or [], config_dir or [Path("configs")])
    cells = chosen.cells()
    if dry_run:
        typer.echo(yaml.safe_dump(asdict(chosen), sort_keys=False), nl=False)
        typer.echo(f"# {len(cells)} cells")
        return
    sweep.measure(cells, Path(chosen.output_dir), chosen.device, chosen.jobs, shown)
