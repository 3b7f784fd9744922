"""The command ``liquidfusion-bench``.

Exit codes: 0 done; 1 the run failed (model, memory, disk); 2 a bad option or value; 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from liquidfusion.bench import notices
from liquidfusion.bench.commands.chat import chat
from liquidfusion.bench.commands.experiment import experiment
from liquidfusion.bench.commands.lists import strategies, tasks
from liquidfusion.bench.commands.load import load
from liquidfusion.bench.commands.plan import plan
from liquidfusion.bench.commands.report import report
from liquidfusion.bench.commands.run import run
from liquidfusion.bench.commands.show import show
from liquidfusion.bench.commands.speed import speed
from liquidfusion.bench.commands.stream import stream
from liquidfusion.bench.commands.sweep import sweep
from liquidfusion.exceptions import ConfigError, LiquidFusionError

COMMANDS = (run, sweep, experiment, report, show, plan, speed, stream, chat, load, tasks, strategies)

app = typer.Typer(
    help="Measure what a bounded KV cache keeps of a language model, and what it saves.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 the run failed, 2 a bad option or value, 130 interrupted.",
)
for command in COMMANDS:
    app.command()(command)

_INTERRUPTED = "interrupted; finished results are kept"


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and how it was built.")] = False,
) -> None:
    """Handle options that need no command."""
    if version:
        from liquidfusion import _core

        typer.echo(" ".join(f"{name}={value}" for name, value in _core.build_info().items()))
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; every foreseen error is one line on standard error."""
    try:
        with notices.as_lines():
            outcome = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        code = outcome if isinstance(outcome, int) else 0
        return _fail(_INTERRUPTED, code) if code == 130 else code
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_INTERRUPTED, 130)
    except ConfigError as error:
        return _fail(str(error), 2)
    except LiquidFusionError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        # the reader of our output left: nothing to tell it, and the interpreter must not try again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}", 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # a bad command line
            return _fail(f"{error.format_message()} (try --help)", getattr(error, "exit_code", 2))
        if type(error).__name__ == "OutOfMemoryError":
            return _fail(f"out of memory: {str(error).splitlines()[0]}", 1)
        raise


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
