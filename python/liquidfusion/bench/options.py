"""Options that several commands share; those of the cache are declared once, as :class:`KVCache` names them."""

import copy
import functools
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

CACHE: dict[str, Any] = {"rich_help_panel": "Cache"}
HOW: dict[str, Any] = {"rich_help_panel": "How the cache counts and runs"}
INPUT: dict[str, Any] = {"rich_help_panel": "Task and input"}
OUTPUT: dict[str, Any] = {"rich_help_panel": "Output"}

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="smollm2 (embedded), a local directory or a hub id.", show_default=True)
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, … or mps.")]
DtypeOption = Annotated[str, typer.Option(help="auto (float32 on CPU), float32, bfloat16 or float16.")]
OutputOption = Annotated[Path, typer.Option("--output-dir", "-o", help="Where results go.", **OUTPUT)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.", **OUTPUT)]
ListJsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the path of the result.", **OUTPUT)]


def strategy_names() -> list[str]:
    """Return the name of every strategy, without importing torch: a shell completes with it."""
    from liquidfusion import _core

    return [entry["name"] for entry in _core.strategies()]


def _option(
    name: str, kind: Any, text: str, default: str, *declarations: str, panel: dict[str, Any] = CACHE, **rest: Any
) -> inspect.Parameter:
    option = typer.Option(None, *declarations, help=text, show_default=default, **panel, **rest)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind | None)


def _switch(name: str, text: str, default: str) -> inspect.Parameter:
    word = name.replace("_", "-")
    return _option(name, bool, text, default, f"--{word}/--no-{word}", panel=HOW)


CACHE_OPTIONS = (
    inspect.Parameter(
        "strategy",
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Option(
            "liquid_fusion",
            *("--strategy", "-s"),
            help="What to keep: see `strategies`.",
            autocompletion=strategy_names,
            **CACHE,
        ),
        annotation=str,
    ),
    _option(
        *("cache_size", float, "Cache size in percent of the prompt.", "by --window-size", "--cache-size", "-c"),
        min=1,
        max=100,
    ),
    _option("budget", int, "Cache size in tokens.", "by --window-size"),
    _option("window_size", int, "Recent tokens kept when no size is given.", "256"),
    _option("sink_size", int, "First tokens that always stay.", "4"),
    _option("sink_update_rate", float, "How fast gathered attention fades; 0: never.", "0.3"),
    _option("heavy_ratio", float, "Share of heavy hitters.", "0.75"),
    _option("recent_ratio", float, "Share of recent tokens.", "0.25"),
    _option("peak_ratio", float, "Share of the heavy hitters chosen by peak attention.", "0.6"),
    _option("eviction_interval", int, "Tokens between two decisions.", "budget / 32"),
    _option("sinks", str, "pinned or adaptive.", "pinned"),
    _option("look_gap", int, "Count looks from this many tokens away on.", "8"),
    _option("peak_reach", int, "In a chunk, count peaks up to this many tokens away.", "budget"),
    _switch("value_weighted", "Count a look by the length of the value over the key's.", "on"),
    _switch("averaged", "Judge gathered attention per query that could look.", "on"),
    _option("age_half_life", int, "Tokens of age that halve a look's worth; 0: none.", "4096"),
    _option("positions", str, "absolute, cache (rank among the kept tokens) or auto.", "absolute", panel=HOW),
    _option("threads", int, "Threads of the Rust core.", "all cores", panel=HOW),
    _switch("graph", "On an NVIDIA GPU, replay each decode step as one CUDA graph.", "on"),
    _switch("compile", "With the graph, let torch.compile fuse the rest.", "off"),
    _switch("overlap", "On an NVIDIA GPU, choose victims while the next step runs.", "on"),
)
"""The parameters of :class:`KVCache` as options: those of :class:`liquidfusion.bench.caches.CacheOptions`."""


def takes_cache(*, without: Collection[str] = (), **defaults: int | float) -> Callable[[Callable[..., None]], Any]:
    """Give a command the options of the cache; it gets them, checked, as its keyword argument `cache`.

    Parameters
    ----------
    without
        Options that the command has no use for.
    defaults
        One size to use when none is given: ``budget=2048``.
    """
    options = [option for option in CACHE_OPTIONS if option.name not in without]

    def decorate(command: Callable[..., None]) -> Any:
        @functools.wraps(command)
        def with_cache(**given: Any) -> None:
            from liquidfusion.bench.caches import CacheOptions

            chosen = {option.name: given.pop(option.name) for option in options}
            if all(chosen.get(name) is None for name in ("cache_size", "budget", "window_size")):
                chosen |= defaults
            cache = CacheOptions(**chosen)
            cache.spec()
            command(cache=cache, **given)

        signature = inspect.signature(command)
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != "cache"]
        shown = [p if p.name not in defaults else _with_default(p, defaults[p.name]) for p in options]
        with_cache.__signature__ = signature.replace(parameters=[*own[:1], *shown, *own[1:]])  # type: ignore[attr-defined]
        with_cache.__annotations__ = {p.name: p.annotation for p in own + shown}
        return with_cache

    return decorate


def _with_default(option: inspect.Parameter, value: float) -> inspect.Parameter:
    """Return the option with another default in its help."""
    told = copy.copy(option.default)
    told.show_default = f"{value:g}"
    return option.replace(default=told)
