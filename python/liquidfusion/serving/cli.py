"""The command ``liquidfusion``.

Exit codes: 0 done; 1 it failed (model, memory, port); 2 a bad option or value; 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from liquidfusion.exceptions import ConfigError, LiquidFusionError

KEY = "LIQUIDFUSION_API_KEY"
_NEEDED = ("fastapi", "httptools", "prometheus_client", "uvicorn")

_CACHE: dict[str, Any] = {"rich_help_panel": "What a row keeps"}
_LOAD: dict[str, Any] = {"rich_help_panel": "Load"}
_HTTP: dict[str, Any] = {"rich_help_panel": "HTTP"}

app = typer.Typer(
    help="A KV cache with a hard memory bound for language models. `liquidfusion-bench` measures it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 it failed, 2 a bad option or value, 130 interrupted.",
)


def _strategies() -> list[str]:
    from liquidfusion import _core

    return [str(entry["name"]) for entry in _core.strategies()]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and how it was built.")] = False,
) -> None:
    """Handle options that need no command."""
    if version:
        from liquidfusion import _core

        typer.echo(" ".join(f"{name}={value}" for name, value in _core.build_info().items()))
        raise typer.Exit


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="smollm2 (embedded), a local directory or a hub id.")] = "smollm2",
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for every network.", **_HTTP)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.", **_HTTP)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help=f"Serve only who sends it; several for several users. Also from {KEY}.", **_HTTP),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in requests.", **_HTTP)] = None,
    max_body: Annotated[str, typer.Option(help="Largest body of a request.", **_HTTP)] = "8MiB",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for a request, its wait included.", **_HTTP)] = 600,
    drain: Annotated[float, typer.Option(min=1, help="Seconds for requests to end on SIGTERM.", **_HTTP)] = 30,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, … or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (float32 on CPU), float32, bfloat16 or float16.")] = "auto",
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy", "-s", autocompletion=_strategies, help="See `liquidfusion-bench strategies`.", **_CACHE
        ),
    ] = "liquid_fusion",
    budget: Annotated[int, typer.Option(min=1, help="Tokens per layer and head.", **_CACHE)] = 2048,
    bits: Annotated[
        str | None,
        typer.Option(help="16, 8, 4, or keys and values: 4,2.", show_default="the model's own", **_CACHE),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", metavar="NAME=VALUE", help="Of the strategy: sink_size=8.", **_CACHE),
    ] = None,
    rows: Annotated[str, typer.Option(help="Requests that run side by side; auto: what fits.", **_LOAD)] = "auto",
    queue_limit: Annotated[
        int | None, typer.Option(min=0, help="Requests that may wait.", show_default="4 for each row", **_LOAD)
    ] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens read at once.", **_LOAD)] = 512,
    step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one step.", **_LOAD)] = 1024,
    conversations: Annotated[
        str, typer.Option(help="Memory for rows of finished answers; 0 keeps none.", **_LOAD)
    ] = "1GiB",
    conversations_dir: Annotated[
        Path | None, typer.Option(help="Keep them there, too: they survive a restart.", file_okay=False, **_LOAD)
    ] = None,
) -> None:
    """Serve a model to OpenAI's clients."""
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        raise LiquidFusionError(f"serve needs {', '.join(missing)}: pip install 'liquidfusion[serve]'")
    from liquidfusion.serving import launch, web
    from liquidfusion.serving.app import create_app

    settings = launch.Settings(
        model=model,
        name=name,
        device=device,
        dtype=dtype,
        strategy=strategy,
        budget=budget,
        bits=launch.precision(bits),
        rows=_rows(rows),
        queue_limit=queue_limit,
        chunk=chunk,
        step_tokens=step_tokens,
        conversations=launch.size(conversations),
        directory=conversations_dir,
        parameters=dict(_pair(text) for text in parameter or ()),
    )
    keys = [*(api_key or ()), *os.environ.get(KEY, "").split()]
    most = launch.size(max_body)
    typer.echo(f"loading {model}", err=True)
    service = launch.build(settings)

    async def stop() -> None:
        await launch.stop(service)

    application = create_app(service, keys=keys, most_bytes=most, timeout=timeout, stop=stop)
    server = web.server(application, host=host, port=port, drain=drain, log_level="warning")
    if not keys and host not in ("127.0.0.1", "localhost", "::1"):
        typer.echo(f"warning: everybody who reaches {host} is served; --api-key asks for one", err=True)
    # uvicorn raises the signal that stopped it again: after a stop in good order that must not look like a failure.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    web.run(server, lambda url: typer.echo(f"{service.name} at {url}/v1 ({service.summary()})", err=True))


def _rows(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"rows {text!r}; auto, or 1 or more, is accepted")
    return int(text)


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"parameter {text!r}; NAME=VALUE is accepted")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, {"true": True, "false": False}.get(value.lower(), value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; every foreseen error is one line on standard error."""
    try:
        outcome = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except ConfigError as error:
        return _fail(str(error), 2)
    except LiquidFusionError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}", 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # a bad command line
            return _fail(f"{error.format_message()} (try --help)", getattr(error, "exit_code", 2))
        if type(error).__name__ == "OutOfMemoryError":
            return _fail(f"out of memory: {str(error).splitlines()[0]}", 1)
        raise


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
