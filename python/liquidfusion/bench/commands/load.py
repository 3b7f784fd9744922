"""``load``: many requests to a server."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from liquidfusion.bench.commands.options import Output, takes_options
from liquidfusion.exceptions import ConfigError, LiquidFusionError

_WHEN: dict[str, Any] = {"rich_help_panel": "When requests are due"}
_WHAT: dict[str, Any] = {"rich_help_panel": "What they ask"}


@dataclass(frozen=True, slots=True)
class When:
    """When requests are due."""

    requests: Annotated[int, typer.Option(min=1, help="How many.", **_WHEN)] = 100
    rate: Annotated[float | None, typer.Option(min=1e-6, help="Open loop: so many a second.", **_WHEN)] = None
    even: Annotated[bool, typer.Option("--even", help="At even, not at random (Poisson) distances.", **_WHEN)] = False
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: so many at once.", show_default="8 without --rate", **_WHEN)
    ] = None
    trace: Annotated[
        Path | None, typer.Option(help="A .jsonl of timestamp (ms), input_length and output_length.", **_WHEN)
    ] = None
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request.", **_WHEN)] = 600.0
    seed: Annotated[int, typer.Option(help="Seeds everything that is drawn.", **_WHEN)] = 0


@dataclass(frozen=True, slots=True)
class What:
    """What requests ask."""

    prompt_tokens: Annotated[str, typer.Option(help="About: 512, 64-512 or lognormal:MEDIAN,SIGMA.", **_WHAT)] = "128"
    max_tokens: Annotated[str, typer.Option(help="Of the answers, likewise.", **_WHAT)] = "64"
    chat: Annotated[bool, typer.Option("--chat/--completions", help="Which endpoint.", **_WHAT)] = True
    ignore_eos: Annotated[bool, typer.Option(help="Ask for answers of full length.", **_WHAT)] = True
    temperature: Annotated[float, typer.Option(min=0, help="Of the answers.", **_WHAT)] = 0.0


@takes_options()
def load(
    url: Annotated[str, typer.Argument(help="The server's base URL.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str, typer.Option("--model", "-m", help="The model's name there.")] = "smollm2",
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="The server's.")] = None,
    when: When = When(),
    what: What = What(),
    output: Output = Output(),  # noqa: B008 - frozen
) -> None:
    """Send many requests to an OpenAI-compatible server, and measure what their senders see."""
    import asyncio

    from liquidfusion import files
    from liquidfusion.bench import results
    from liquidfusion.bench.jobs import loading
    from liquidfusion.bench.terminal.result import Terminal

    concurrency = when.concurrency
    if sum(way is not None for way in (when.rate, concurrency, when.trace)) > 1:
        raise ConfigError("rate, concurrency and trace say the same thing; one of them is accepted")
    if when.rate is None and when.trace is None:
        concurrency = concurrency or 8
    target = loading.Target(
        url=url,
        model=model,
        key=api_key,
        chat=what.chat,
        ignore_eos=what.ignore_eos,
        timeout=when.timeout,
        extra={"temperature": what.temperature},
    )
    if when.trace is not None:
        plan = loading.trace(when.trace)[: when.requests]
    else:
        lengths = loading.Lengths(what.prompt_tokens), loading.Lengths(what.max_tokens)
        plan = loading.arrivals(when.requests, *lengths, rate=when.rate, even=when.even, seed=when.seed)
    files.check_writable(output.output_dir)
    with Terminal(quiet=output.quiet or output.as_json).progress(f"load · {model}") as progress:
        records, seconds = asyncio.run(
            loading.run(target, plan, concurrency=concurrency, seed=when.seed, progress=progress)
        )
    options = {**asdict(when), **asdict(what), "requests": len(plan), "concurrency": concurrency}
    document = loading.document(target, records, seconds, options)
    path = output.output_dir / f"load_{results.safe(model)}_{results.stamp()}.json"
    files.write_text(path, results.to_json(document))
    if output.as_json:
        typer.echo(results.to_json(document), nl=False)
        return
    found = loading.metrics(records, seconds)
    for name, value in () if output.quiet else loading.shown(found):
        typer.echo(f"{name:<44}{value}")
    typer.echo(path)
    if not found["answered"].value:
        first = next(record.error for record in records if record.error)
        raise LiquidFusionError(f"no request was answered; the first said: {first}")
