"""The command line and Python offer the same things under the same names."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main

import liquidfusion as lf
from benchmodel import directory, loaded
from liquidfusion.bench import caches, cli, inputs, models, parameters, runner
from liquidfusion.bench.caches import CacheOptions, option_names
from liquidfusion.bench.cli import main
from liquidfusion.bench.commands.options import CACHE_OPTIONS
from liquidfusion.bench.jobs import speed
from liquidfusion.bench.notices import Notice
from liquidfusion.bench.sweep import experiments
from liquidfusion.bench.sweep.cells import Grid
from liquidfusion.bench.tasks import TASKS
from liquidfusion.exceptions import ConfigError

CACHE = set(option_names())


def options(command: str) -> set[str]:
    """The options of a command by their long names, with underscores."""
    found = typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    return {word[2:].replace("-", "_") for option in found for word in option.opts if word.startswith("--")}


def arguments(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_cache_options_are_those_of_the_cache() -> None:
    own = {f.name for f in fields(CacheOptions)} - {"parameters", "how"}
    assert own | set(parameters.table()) | set(caches.HOW) == CACHE
    assert {option.name for option in CACHE_OPTIONS} == CACHE
    assert set(caches.HOW) <= arguments(lf.KVCache)


def test_defaults_shown_are_those_of_liquid_fusion() -> None:
    (defaults,) = (entry["defaults"] for entry in lf.strategies() if entry["name"] == "liquid_fusion")
    told = {option.name: option.default.show_default for option in CACHE_OPTIONS}
    for name, value in defaults.items():
        if value is not None:
            assert told[name] == ("on" if value is True else "off" if value is False else str(value))
    for name in ("graph", "compile", "overlap"):
        assert told[name] == ("on" if inspect.signature(lf.KVCache).parameters[name].default else "off")


@pytest.mark.parametrize("name", parameters.table())
def test_every_parameter_is_checked_by_its_row_of_the_table(name: str) -> None:
    parameter = parameters.table()[name]
    assert parameter.kind in parameters.KINDS
    known = [parameters.defaults(s)[name] for s in parameters.strategy_names() if name in parameters.listens(s)]
    for value in known:
        if value is not None:
            parameter.check(value)
    for bad in (object(), "loose", -1):
        with pytest.raises(ConfigError, match=f"{name} .*accepted"):
            parameter.check(bad)


def test_run_offers_every_cache_and_task_option() -> None:
    assert options("run") >= CACHE
    # --set takes the rest
    common = {"limit", "context", "chunk", "batch_size", "max_tokens", "temperature", "mentions", "seed"}
    assert options("run") >= common | {"set", "prompt", "prompt_file", "baseline", "repeat"}
    known = set().union(*(task.options() for task in TASKS.values()))
    assert common <= known


def test_sweep_and_experiment_take_the_same() -> None:
    names = {f.name for f in fields(experiments.Experiment)}
    assert names - {"parameters"} <= options("sweep")
    assert {f.name for f in fields(Grid)} - {"parameters"} <= options("sweep")
    assert {*parameters.table(), *caches.HOW} <= options("sweep")


def test_parameters_of_a_sweep_are_lists() -> None:
    assert inputs.parameters(["sink_size=1,8", "graph=false", "peak_ratio=0,0.6"]) == {
        "sink_size": [1, 8],
        "graph": [False],
        "peak_ratio": [0.0, 0.6],
    }
    assert inputs.values("sinks", "pinned,adaptive") == ["pinned", "adaptive"]
    assert inputs.values("value_weighted", "on,off") == [True, False]
    for name, text in (("sink_size", "many"), ("peak_ratio", "")):
        with pytest.raises(ConfigError, match=name):
            inputs.values(name, text)


def test_models_plan_and_speed() -> None:
    assert arguments(models.load) - {"name"} <= options("run")
    assert {f.name for f in fields(speed.Plan)} <= options("speed")


@pytest.mark.parametrize("command", ["stream", "chat", "show"])
def test_other_commands_name_them_alike(command: str) -> None:
    assert options(command) >= CACHE - {"cache_size", "graph", "compile", "overlap"}


@pytest.mark.parametrize("command", [command.__name__ for command in cli.COMMANDS])
def test_every_command_speaks_json_and_explains_itself(command: str) -> None:
    assert "json" in options(command)
    found = typer.main.get_command(cli.app).commands[command]  # type: ignore[attr-defined]
    own = [option for option in found.params if option.name != "help" and option.name not in parameters.table()]
    assert all(option.help.endswith((".", "…")) or "=" in option.help or "," in option.help for option in own)


def test_options_reach_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Made:
        def __init__(self, *_: object, **given: Any) -> None:
            made.append(given)

    monkeypatch.setattr(caches.lf, "KVCache", Made)
    first = CacheOptions.of(positions="cache", graph=False, threads=1, budget=64)
    second = CacheOptions.of(positions="absolute", memory="1.5 MiB", bits="4,2")
    third = CacheOptions.of(bits=8)
    assert caches.ranked(first.make(None, 9))  # type: ignore[arg-type]
    assert not caches.ranked(second.make(None, 9))  # type: ignore[arg-type]
    third.make(None, 9)  # type: ignore[arg-type]
    common = {"prompt_tokens": 9, "strategy": lf.Strategy("liquid_fusion")}
    assert made == [
        common | {"positions": "cache", "graph": False, "threads": 1, "budget": 64},
        common | {"memory": 3 * 2**19, "bits": (4, 2)},
        common | {"bits": (8, 8)},
    ]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"positions": "relative"}, "positions 'relative'"),
        ({"threads": 0}, "threads 0"),
        ({"look_gap": -1}, "look_gap -1"),
        ({"strategy": "h2o", "look_gap": -1}, "look_gap -1"),
        ({"strategy": "best"}, "liquid_fusion"),
        ({"budget": 64, "memory": "1MiB"}, "budget 64 and memory 1048576"),
        ({"bits": "2"}, "bits='2'"),
        ({"bits": "4,3"}, "4,3"),
        ({"bits": "8,4,2"}, "bits="),
        ({"bits": "x"}, "bits='x'"),
        ({"memory": "12 apples"}, "512MiB"),
        ({"memory": "0"}, "memory='0'"),
        ({"look": 1}, "look_gap"),
    ],
)
def test_values_out_of_range(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CacheOptions.of(**bad).spec()


def test_parameter_that_a_strategy_does_not_listen_to() -> None:
    """One line and null: a loop over strategies keeps working."""
    cache = CacheOptions.of(strategy="streaming", budget=32, peak_ratio=0.5, sink_size=2)
    assert cache.heard() == {"sink_size": 2}
    with pytest.warns(Notice, match="streaming does not use peak_ratio: left out; it listens to .*sink_size"):
        cache.check()
    document = runner.run(loaded(), "generate", cache, prompts=["hello"], max_tokens=2)
    assert document["metadata"]["peak_ratio"] is None
    assert document["metadata"]["sink_size"] == 2


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_that_line_on_the_command_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Sequence[str] = ["-m", str(directory()), "--device", "cpu", "--output-dir", str(tmp_path)]
    words = ["--strategy", "full"] if command == "run" else ["--strategies", "full", "--tasks", "generate"]
    assert main([command, *model, *words, "--peak-ratio", "0.5", "--prompt", "x", "--max-tokens", "2", "--quiet"]) == 0
    assert capsys.readouterr().err == "warning: full does not use peak_ratio: left out; it listens to no parameter\n"
