"""Options that several commands share, declared once; those of the cache come from the core's table of parameters."""

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from liquidfusion.bench import parameters as of_strategies

CACHE: dict[str, Any] = {"rich_help_panel": "Cache"}
STRATEGY: dict[str, Any] = {"rich_help_panel": "Parameters of the strategy"}
HOW: dict[str, Any] = {"rich_help_panel": "How the cache counts and runs"}  # the switches: two names need room
INPUT: dict[str, Any] = {"rich_help_panel": "Task and input"}
RIVALS: dict[str, Any] = {"rich_help_panel": "Rivals"}
OUTPUT: dict[str, Any] = {"rich_help_panel": "Output"}

ListJsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Command = Callable[..., None]


_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, … or mps.")]
_Dtype = Annotated[str, typer.Option(help="auto (float32 on CPU), float32, bfloat16 or float16.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.", **OUTPUT)]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the path of the result.", **OUTPUT)]


@dataclass(frozen=True, slots=True)
class Device:
    """Where a model runs, and in which precision."""

    device: _Device = "auto"
    dtype: _Dtype = "auto"


@dataclass(frozen=True, slots=True)
class Model:
    """A model, where it runs, and in which precision."""

    model: Annotated[str, typer.Option("--model", "-m", help="smollm2 (embedded), a local directory or a hub id.")] = (
        "smollm2"
    )
    device: _Device = "auto"
    dtype: _Dtype = "auto"


@dataclass(frozen=True, slots=True)
class Input:
    """What tasks read, and how much of it. A task that has no use for a given option refuses it."""

    prompt: Annotated[str | None, typer.Option(help="Text to continue, or to read.", **INPUT)] = None
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompt-file", "--data", help="Prompts, text or examples of the task: text, or .jsonl.", **INPUT
        ),
    ] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="Prompts, segments or examples.", show_default="the task's own", **INPUT)
    ] = None
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens in a segment or haystack; several for a grid: 1024,4096.",
            show_default="the task's own",
            **INPUT,
        ),
    ] = None
    chunk: Annotated[
        int | None,
        typer.Option(
            min=1, help="Prompt tokens fed in one call.", show_default="64 or the whole prompt, by task", **INPUT
        ),
    ] = None
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows run together.", show_default="the task's own", **INPUT)
    ] = None
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to write.", show_default="32, or the task's own", **INPUT)
    ] = None
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 takes the likeliest token.", show_default="0", **INPUT)
    ] = None
    mentions: Annotated[
        int | None,
        typer.Option(min=1, max=2, help="needle: how often the text says each number.", show_default="2", **INPUT),
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another option of the task: see `tasks`.", **INPUT),
    ] = None
    seed: Annotated[int, typer.Option(help="Seeds everything that is drawn.", **INPUT)] = 0

    def common(self) -> dict[str, Any]:
        """Return the options of tasks by name, None for those not given."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("set_", "seed")}


@dataclass(frozen=True, slots=True)
class Rivals:
    """Other people's methods, measured on the same prompts."""

    rival: Annotated[
        list[str] | None,
        typer.Option(
            "--rival",
            metavar="FAMILY:NAME,…",
            help="Measure kvpress:NAME, transformers:NAME or your own python:MODULE.CLASS, too, at the same size. "
            "Give it again for more.",
            **RIVALS,
        ),
    ] = None
    rival_python: Annotated[
        Path | None,
        typer.Option(help="An interpreter with kvpress.", show_default="LIQUIDFUSION_RIVAL_PYTHON", **RIVALS),
    ] = None

    @property
    def python(self) -> str | None:
        """The interpreter as a process is started with it."""
        return None if self.rival_python is None else str(self.rival_python.absolute())


@dataclass(frozen=True, slots=True)
class Shown:
    """What a command prints."""

    as_json: _Json = False
    quiet: _Quiet = False


@dataclass(frozen=True, slots=True)
class Output:
    """Where results go, and what is printed of them."""

    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where results go.", **OUTPUT)] = Path(
        "benchmark_results"
    )
    as_json: _Json = False
    quiet: _Quiet = False


def _option(name: str, kind: Any, text: str, default: str, *declarations: str, **rest: Any) -> inspect.Parameter:
    option = typer.Option(None, *declarations, help=text, show_default=default, **CACHE | rest)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind | None)


def _switch(name: str, text: str, default: str, panel: dict[str, Any]) -> inspect.Parameter:
    word = name.replace("_", "-")
    return _option(name, bool, text, default, f"--{word}/--no-{word}", **panel)


def _of_strategies() -> Iterable[inspect.Parameter]:
    """Yield an option for each parameter of the core's table; the default shown is that of `liquid_fusion`."""
    own = of_strategies.defaults("liquid_fusion")
    for parameter in of_strategies.table().values():
        value = own.get(parameter.name)
        shown = "on" if value is True else "off" if value is False else "the strategy's own" if value is None else value
        if parameter.type is bool:
            yield _switch(parameter.name, parameter.help, str(shown), HOW)
        else:
            choices = {"metavar": "|".join(parameter.choices)} if parameter.choices else {}
            yield _option(parameter.name, parameter.type, parameter.help, str(shown), **STRATEGY, **choices)


CACHE_OPTIONS = (
    inspect.Parameter(
        "strategy",
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Option(
            "liquid_fusion",
            *("--strategy", "-s"),
            help="What to keep: see `strategies`.",
            autocompletion=of_strategies.strategy_names,
            **CACHE,
        ),
        annotation=str,
    ),
    _option(
        *("cache_size", float, "Cache size in percent of the prompt.", "by --window-size", "--cache-size", "-c"),
        min=1,
        max=100,
    ),
    _option("budget", int, "Cache size in tokens for each layer, row and kv head.", "by --window-size"),
    _option("memory", str, "Cache size in bytes for each row, all layers and heads: 512MiB.", "by --window-size"),
    _option("bits", str, "Of each number of keys and values: 16, 8, 4, or of both: 4,2.", "the model's own"),
    *_of_strategies(),
    _option(
        *("positions", str, "What a token's position counts: absolute (the text), cache (the tokens kept) or auto."),
        "absolute",
        **HOW,
    ),
    _option("threads", int, "Threads of the Rust core.", "all cores", **HOW),
    _switch("graph", "On an NVIDIA GPU, replay each decode step as one CUDA graph.", "on", HOW),
    _switch("compile", "With the graph, let torch.compile fuse the rest.", "off", HOW),
    _switch("overlap", "On an NVIDIA GPU, choose victims while the next step runs.", "on", HOW),
)
"""The words of :meth:`liquidfusion.bench.caches.CacheOptions.of` as options."""

_SIZED = ("cache_size", "budget", "memory", "window_size")


def takes_options(*, without: Collection[str] = (), **defaults: int | float) -> Callable[[Command], Command]:
    """Give a command the options of the groups that it names, and of the cache, instead of one parameter for each.

    A parameter annotated with one of the dataclasses above gets an instance of it. One called `cache` gets the
    :class:`liquidfusion.bench.caches.CacheOptions`, checked; one called `grid` a dictionary of parameters of the cache,
    each with its values.

    Parameters
    ----------
    without
        Options of the cache that the command has no use for.
    defaults
        One size to use when none is given: ``budget=2048``.
    """
    cached = [option for option in CACHE_OPTIONS if option.name not in without]

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        groups: dict[str, Any] = {}
        shown: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            kind: Any = hints[parameter.name]
            if parameter.name == "cache":
                shown += [_with_default(option, defaults.get(option.name)) for option in cached]
            elif parameter.name == "grid":
                shown += [_as_list(option) for option in cached if option.name not in ("strategy", "bits", *_SIZED[:3])]
            elif is_dataclass(kind):
                groups[parameter.name] = kind
                shown += _fields(kind)
            else:
                shown.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind))

        @functools.wraps(command)
        def expanded(**given: Any) -> None:
            for name, kind in groups.items():
                given[name] = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
            if "cache" in hints:
                given["cache"] = _cache({option.name: given.pop(option.name) for option in cached}, defaults)
            if "grid" in hints:
                listed = [o.name for o in cached if o.name not in ("strategy", "bits", *_SIZED[:3])]
                given["grid"] = _grid({name: given.pop(name) for name in listed})
            command(**given)

        expanded.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
        return expanded

    return decorate


def _fields(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    empty = inspect.Parameter.empty
    return [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=empty if f.default is MISSING else f.default,
            annotation=hints[f.name],
        )
        for f in fields(group)
    ]


def _cache(chosen: dict[str, Any], defaults: dict[str, int | float]) -> Any:
    from liquidfusion.bench.caches import CacheOptions

    if all(chosen.get(name) is None for name in _SIZED):
        chosen |= defaults
    cache = CacheOptions.of(**chosen)
    cache.check()
    return cache


def _grid(given: dict[str, str | None]) -> dict[str, list[Any]]:
    from liquidfusion.bench import inputs

    return {name: inputs.values(name, text) for name, text in given.items() if text is not None}


def _with_default(option: inspect.Parameter, value: float | None) -> inspect.Parameter:
    """Return the option with another default in its help."""
    if value is None:
        return option
    told = copy.copy(option.default)
    told.show_default = f"{value:g}"
    return option.replace(default=told)


def _as_list(option: inspect.Parameter) -> inspect.Parameter:
    """Return the option for a sweep: several values with commas, each of which is measured."""
    told = option.default
    panel = {"rich_help_panel": told.rich_help_panel}
    word = f"--{option.name.replace('_', '-')}"
    return _option(option.name, str, told.help, told.show_default, word, metavar="VALUE,…", **panel)
