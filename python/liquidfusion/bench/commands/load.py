"""The command ``load``."""

from pathlib import Path
from typing import Annotated, Any

import typer

_WHEN: dict[str, Any] = {"rich_help_panel": "When requests are due"}
_WHAT: dict[str, Any] = {"rich_help_panel": "What they ask"}
_OUTPUT: dict[str, Any] = {"rich_help_panel": "Output"}


def load(
    url: Annotated[str, typer.Argument(help="The server's base URL.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str, typer.Option("--model", "-m", help="The model's name there.", **_WHAT)] = "smollm2",
    requests: Annotated[int, typer.Option(min=1, help="How many.", **_WHEN)] = 100,
    rate: Annotated[float | None, typer.Option(min=1e-6, help="Open loop: requests a second.", **_WHEN)] = None,
    even: Annotated[
        bool, typer.Option("--even", help="At even and not at random (Poisson) distances.", **_WHEN)
    ] = False,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: so many at once.", show_default="8 without --rate", **_WHEN)
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="A .jsonl of timestamp (ms), input_length, output_length.", exists=True, dir_okay=False, **_WHEN
        ),
    ] = None,
    prompt_tokens: Annotated[str, typer.Option(help="About: 512, 64-512 or lognormal:MEDIAN,SIGMA.", **_WHAT)] = "128",
    max_tokens: Annotated[str, typer.Option(help="Of the answers, likewise.", **_WHAT)] = "64",
    chat: Annotated[bool, typer.Option("--chat/--completions", help="Which endpoint.", **_WHAT)] = True,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for answers of full length.", **_WHAT)] = True,
    temperature: Annotated[float, typer.Option(min=0, help="Of the answers.", **_WHAT)] = 0.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key.", show_envvar=True, **_WHAT)
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request.", **_WHEN)] = 600.0,
    seed: Annotated[int, typer.Option(help="Seeds everything that is drawn.", **_WHEN)] = 0,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where the result goes.", **_OUTPUT)] = Path(
        "benchmark_results"
    ),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON and nothing else.", **_OUTPUT)
    ] = False,
) -> None:
    """Send many requests to a server, and measure what their senders see."""
    import asyncio
    import sys

    from liquidfusion.bench import machine, results
    from liquidfusion.bench.jobs import loading
    from liquidfusion.exceptions import ConfigError, LiquidFusionError

    if sum(way is not None for way in (rate, concurrency, trace)) > 1:
        raise ConfigError("rate, concurrency and trace say the same thing; one of them is accepted")
    if rate is None and trace is None:
        concurrency = concurrency or 8
    target = loading.Target(
        url=url,
        model=model,
        key=api_key,
        chat=chat,
        ignore_eos=ignore_eos,
        timeout=timeout,
        extra={"temperature": temperature},
    )
    lengths = loading.Lengths(prompt_tokens), loading.Lengths(max_tokens)
    plan = loading.arrivals(requests, *lengths, rate=rate, even=even, seed=seed)
    if trace is not None:
        plan = loading.trace(trace)[:requests]
    results.check_writable(output_dir)

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total} answered", end="" if done < total else "\n", file=sys.stderr, flush=True)

    records, seconds = asyncio.run(loading.run(target, plan, concurrency=concurrency, seed=seed, progress=progress))
    found = loading.metrics(records, seconds)
    document = {
        "metadata": {
            "task": "load",
            "model_name": model,
            "url": url,
            "task_options": {
                "requests": len(plan),
                "rate": rate,
                "even": even,
                "concurrency": concurrency,
                "trace": trace and trace.name,
                "prompt_tokens": prompt_tokens,
                "max_tokens": max_tokens,
                "chat": chat,
                "ignore_eos": ignore_eos,
                "temperature": temperature,
            },
            "seed": seed,
            "created": results.now().isoformat(timespec="seconds"),
            "seconds": seconds,
            "versions": machine.versions(),
        },
        "results": [record.as_dict() for record in records],
        "metrics": {name: metric.as_dict() for name, metric in found.items()},
    }
    path = output_dir / f"load_{results.safe(model)}_{results.stamp()}.json"
    results.write_atomic(path, results.to_json(document))
    if as_json:
        typer.echo(results.to_json(document), nl=False)
        return
    for name, value in loading.shown(found):
        typer.echo(f"{name:<44}{value}")
    typer.echo(str(path))
    if not found["answered"].value:
        first = next(record.error for record in records if record.error)
        raise LiquidFusionError(f"no request was answered; the first said: {first}")
