"""Experiments in YAML: shipped ones, overrides, user directories, and errors that name key and accepted values."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmodel import directory
from liquidfusion.bench.cli import main
from liquidfusion.bench.sweep import experiments
from liquidfusion.exceptions import ConfigError


@pytest.mark.parametrize("name", experiments.available())
def test_shipped_experiments_are_right(name: str) -> None:
    assert experiments.load([f"experiment={name}"]).cells()


@pytest.mark.filterwarnings("ignore::liquidfusion.bench.notices.Notice")
def test_defaults_and_overrides() -> None:
    plain = experiments.load([])
    assert plain.cache_sizes == [4, 20, 40, 80, 100]
    fast = experiments.load(
        [
            "tasks.perplexity.context=64",
            "experiment=custom/fast_test",
            "budgets=128",
            "seed=3",
            "parameters.sink_size=2",
        ]
    )
    assert fast.tasks["perplexity"] == {"context": 64, "limit": 1}
    assert fast.budgets == [128]
    assert fast.seed == 3
    cells = fast.cells()
    assert {cell.seed for cell in cells} == {3}
    assert {
        cell.cache.parameters.get("sink_size")
        for cell in cells
        if cell.cache and cell.cache.strategy == "liquid_fusion"
    } == {2}


def test_user_directory_comes_first(tmp_path: Path) -> None:
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "fast_test.yaml").write_text("seed: 7\n", encoding="utf8")
    (tmp_path / "mine.yaml").write_text("seed: 8\n", encoding="utf8")
    assert experiments.load(["experiment=custom/fast_test"], [tmp_path]).seed == 7
    assert experiments.load(["experiment=mine"], [tmp_path]).seed == 8
    assert experiments.available([tmp_path]) == ["custom/fast_test", "mine"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("experiment=missing", "custom/fast_test"),
        ("fast", "key=value"),
        ("speed=1", "accepted: models"),
        ("strategies=[best]", "liquid_fusion"),
        ("tasks.guess.limit=1", "perplexity"),
        ("tasks.needle.deep=1", "accepted: text, limit"),
        ("tasks.needle=4", "options"),
        ("seed=one", "'seed'.*whole number"),
        ("budgets=[1.5]", "'budgets'.*whole number"),
        ("parameters.heavy=1", "heavy_ratio"),
        ("dtype=float8", "bfloat16"),
        ("models=[1]", "'models'.*text"),
        ("seed=[", "not YAML"),
        ("tasks={}", "tasks is empty"),
    ],
)
def test_errors_name_the_key(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiments.load([word]).cells()


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n", encoding="utf8")
    (tmp_path / "torn.yaml").write_text("a: [\n", encoding="utf8")
    for name, message in (("list", "keys and values"), ("torn", r"torn\.yaml, line 2: not YAML: expected")):
        with pytest.raises(ConfigError, match=message):
            experiments.load([f"experiment={name}"], [tmp_path])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *("experiment=custom/fast_test", f"models=[{directory()}]", "device=cpu", f"output_dir={tmp_path}"),
        *("tasks={perplexity: {context: 64, limit: 1, prompt: aaaaaaaa}}", "strategies=[h2o]", "cache_sizes=[50]"),
    ]
    assert main(["experiment", *words, "--dry-run"]) == 0
    assert "# 2 cells" in capsys.readouterr().out
    text = "tasks.perplexity.prompt=" + "once upon a time " * 10
    assert main(["experiment", *words, text, "--quiet"]) == 0
    assert len(list(tmp_path.iterdir())) == 2
    assert main(["experiment", "sed=1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
