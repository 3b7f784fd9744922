"""The command line and Python offer the same things under the same names."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest
import typer.main

import liquidfusion as lf
from liquidfusion.bench import caches, cli, experiments, inputs, models, speed, sweeping
from liquidfusion.bench.caches import CacheOptions
from liquidfusion.bench.options import CACHE_OPTIONS
from liquidfusion.bench.tasks import TASKS
from liquidfusion.exceptions import ConfigError

CACHE = {f.name for f in fields(CacheOptions)}


def options(command: str) -> set[str]:
    """The options of a command by their long names, with underscores."""
    found = typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    return {word[2:].replace("-", "_") for option in found for word in option.opts if word.startswith("--")}


def arguments(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_cache_options_are_those_of_the_cache() -> None:
    # prompt_tokens: the benchmark knows it; positions: not in every version of the cache
    assert CACHE - {"positions"} == arguments(lf.KVCache) - {"self", "model", "prompt_tokens", "positions"}
    assert {option.name for option in CACHE_OPTIONS} == CACHE
    assert set(caches.PARAMETERS) | set(caches.HOW) | {"strategy", "cache_size", "budget"} == CACHE


def test_defaults_shown_are_those_of_liquid_fusion() -> None:
    (defaults,) = (entry["defaults"] for entry in lf.strategies() if entry["name"] == "liquid_fusion")
    told = {option.name: option.default.show_default for option in CACHE_OPTIONS}
    for name, value in defaults.items():
        if value is not None:
            assert told[name] == ("on" if value is True else str(value))
    for name in ("graph", "compile", "overlap"):
        assert told[name] == ("on" if inspect.signature(lf.KVCache).parameters[name].default else "off")


def test_run_offers_every_cache_and_task_option() -> None:
    assert options("run") >= CACHE
    # --set takes the rest
    common = {"limit", "context", "chunk", "batch_size", "max_tokens", "temperature", "seed"}
    assert options("run") >= common | {"set", "prompt", "prompt_file", "baseline"}
    known = set().union(*(task.options() for task in TASKS.values()))
    assert common <= known


def test_sweep_and_experiment_take_the_same() -> None:
    names = {f.name for f in fields(experiments.Experiment)}
    assert names - {"parameters"} <= options("sweep")
    assert arguments(sweeping.cells) - {"parameters", "options"} <= options("sweep")
    for name in caches.PARAMETERS + caches.HOW:
        assert inputs.parameters([f"{name}=1"]) == {name: 1}


def test_models_plan_and_speed() -> None:
    assert arguments(models.load) - {"name"} <= options("run")
    assert {f.name for f in fields(speed.Plan)} <= options("speed")


@pytest.mark.parametrize("command", ["stream", "chat", "show"])
def test_other_commands_name_them_alike(command: str) -> None:
    assert options(command) >= CACHE - {"cache_size", "graph", "compile", "overlap"}


@pytest.mark.parametrize("command", [c.name or c.callback.__name__ for c in cli.app.registered_commands])  # type: ignore[union-attr]
def test_every_command_speaks_json(command: str) -> None:
    assert "json" in options(command)


def test_options_reach_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(caches.lf, "KVCache", lambda *_, **given: made.append(given))
    CacheOptions(positions="cache", graph=False, threads=1, look_gap=2, budget=64).make(None, 9)  # type: ignore[arg-type]
    CacheOptions(positions="absolute", budget=64).make(None, 9)  # type: ignore[arg-type]
    first, second = made
    assert first == {
        "prompt_tokens": 9,
        "positions": "cache",
        "graph": False,
        "threads": 1,
        "look_gap": 2,
        "budget": 64,
    }
    assert second == {"prompt_tokens": 9, "budget": 64}
    for bad in ({"positions": "relative"}, {"threads": 0}, {"look_gap": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            CacheOptions(**bad).spec()  # type: ignore[arg-type]
