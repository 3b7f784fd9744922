"""What the command line once did wrong without a word, and others of each kind."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmodel import directory, loaded
from liquidfusion.bench import models, runner
from liquidfusion.bench.caches import CacheOptions
from liquidfusion.bench.cli import main
from liquidfusion.bench.decoding import Stream
from liquidfusion.bench.models import Loaded
from liquidfusion.bench.notices import Notice
from liquidfusion.bench.report import rows
from liquidfusion.bench.stats import bootstrap, mean_metric
from liquidfusion.bench.tasks import TASKS
from liquidfusion.bench.terminal import progress
from liquidfusion.bench.terminal.output import NOT_A_NUMBER, number
from liquidfusion.bench.terminal.progress import Lines
from liquidfusion.exceptions import LiquidFusionError

TEXT = "once upon a time there was a little cache that kept what mattered. " * 8
SHORT = ["--prompt", TEXT, "--context", "128", "--limit", "1", "--chunk", "32"]


def run(*arguments: str, out: Path) -> int:
    return main(["run", "-m", str(directory()), "--device", "cpu", "--output-dir", str(out), *arguments])


def perplexity(*arguments: str, out: Path) -> None:
    assert run("--task", "perplexity", *SHORT, "--quiet", *arguments, out=out) == 0


def report(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["report", str(folder), *arguments]) == 0
    shown = capsys.readouterr()
    return shown.out, shown.err


# Runs that differ in anything are rows of their own, repeats are one row.


def test_runs_that_differ_are_rows_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = ([], ["--dtype", "bfloat16"], ["--prompt", TEXT[5:]], ["--peak-ratio", "0.1"], ["--seed", "3"])
    for way in ways:
        perplexity("--budget", "32", *way, out=tmp_path)
    found = rows.read(tmp_path).rows
    assert len(found) == 5
    assert {row.repeats for row in found} == {1}
    text, _ = report(tmp_path, capsys)
    assert text.count("| liquid_fusion") == 5
    for told in ("dtype bfloat16", "dtype float32", "seed 3", "seed 0", "peak_ratio 0.1", "text given ("):
        assert told in text
    table = list(csv.DictReader((tmp_path / "report.csv").read_text(encoding="utf8").splitlines()))
    assert sum(line["metric"] == "perplexity" for line in table) == 5


def document(**changes: Any) -> dict[str, Any]:
    """A result as `run` writes it, with other facts."""
    metadata: dict[str, Any] = {
        "model_name": "m",
        "task": "perplexity",
        "strategy": "h2o",
        "cache_size": None,
        "budget": 64,
        "bits": None,
        "heavy_ratio": 0.5,
        "eviction_interval": 2,
        "given": {},
        "positions": None,
        "seed": 0,
        "task_options": {"chunk": 64},
        "device": "cpu",
        "dtype": "float32",
        "budgets_used": [64],
        "input": {"source": "a.txt", "sha256": "0" * 12},
        "versions": {"torch": "2.9"},
        "machine": {"processor": "p", "cores": 2, "torch_threads": 2},
    }
    metric = {"value": 5.0, "unit": "", "low": 4.0, "high": 6.0, "full": 4.0, "n": 9}
    item = {
        "request": {"prompt": "x", "tokens": 128},
        "result": {"scores": {"cache_bytes": 100}, "request_time": {"batch_time": 1.0, "batch_size": 1}},
    }
    return {"metadata": metadata | changes, "results": [item], "metrics": {"perplexity": metric}}


@pytest.mark.parametrize(
    "change",
    [
        {"model_name": "n"},
        {"budget": 32},
        {"memory": 2**20, "budget": None},
        {"cache_size": 20.0, "budget": None},
        {"bits": [4, 2]},
        {"heavy_ratio": 0.6},
        {"given": {"eviction_interval": 4}},
        {"positions": "cache"},
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"task_options": {"chunk": 1}},
        {"device": "cuda:0"},
        {"machine": {"gpu": "g", "cores": 2, "torch_threads": 2}},
        {"machine": {"processor": "p", "cores": 2, "torch_threads": 1}},
        {"versions": {"torch": "2.10"}},
        {"input": {"source": "a.txt", "sha256": "1" * 12}},
    ],
)
def test_every_difference_counts(change: dict[str, Any]) -> None:
    same = rows.together([rows.row(document()), rows.row(document(created="later", seconds=2.0))])
    assert [row.repeats for row in same] == [2]
    assert len(rows.together([rows.row(document()), rows.row(document(**change))])) == 2


def test_what_follows_from_the_budget_is_no_setting() -> None:
    one = rows.row(document(budget=64, eviction_interval=2))
    other = rows.row(document(budget=512, eviction_interval=16))
    assert one.settings == other.settings


def test_results_of_older_versions_are_read() -> None:
    old = document()
    for name in ("bits", "given", "input", "seed"):
        del old["metadata"][name]
    del old["metrics"]["perplexity"]["n"]
    assert rows.row(old).value() == 5.0


def test_one_figure_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, budget in enumerate((None, None, 64)):
        made = document(strategy="full" if budget is None else "streaming", budgets_used=[budget] if budget else [])
        made["metrics"]["perplexity"] |= {"value": (4.0, 5.0, 7.0)[index], "full": (None, None, 4.25)[index]}
        (tmp_path / f"{index}.json").write_text(json.dumps(made), encoding="utf8")
    text, _ = report(tmp_path, capsys)
    assert "| full cache | 4.50 ± 0.707 (n = 2) |" in text
    page = (tmp_path / "report.html").read_text(encoding="utf8")
    assert "full cache: 4.5</title>" in page  # the line across the chart
    assert "4.25" not in page


def test_figures_that_others_tell_of_the_full_cache_are_shown() -> None:
    (block,) = rows.blocks([rows.row(document())])
    assert [(row.strategy, row.value()) for row in block.rows] == [("full", 4.0), ("h2o", 5.0)]


def test_repeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    perplexity("--budget", "32", "--repeat", "3", out=tmp_path)
    (row,) = rows.read(tmp_path).rows
    metric = row.main()
    assert row.repeats == 3
    assert metric is not None
    assert metric["sd"] == 0.0
    assert "± 0 (n = 3)" in report(tmp_path, capsys)[0]
    assert run("--prompt", "hello", "--max-tokens", "3", "--repeat", "2", out=tmp_path / "other") == 0
    assert "mean of 2" in capsys.readouterr().out
    assert run("--prompt", "hello", "--max-tokens", "3", "--repeat", "2", "--json", out=tmp_path / "other") == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


# Models that compute what is no number.


def broken(kind: str) -> Loaded:
    """The small model, computing NaN or logits so large that a loss is not a perplexity."""
    from transformers import AutoModelForCausalLM

    with models.silence():
        model = AutoModelForCausalLM.from_pretrained(directory()).eval()
    with torch.no_grad():
        if kind == "nan":
            model.lm_head.weight[3, 3] = math.nan
        else:
            model.lm_head.weight.mul_(1e6)
    return Loaded("tiny", model, loaded().tokenizer)


@pytest.mark.parametrize("kind", ["nan", "overflow"])
@pytest.mark.parametrize("task", ["perplexity", "generate"])
def test_not_a_number(
    kind: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "load", lambda *_, **__: broken(kind))
    words = SHORT if task == "perplexity" else ["--prompt", "hello", "--max-tokens", "3"]
    assert run("--task", task, *words, "--budget", "32", out=tmp_path) == 0
    shown = capsys.readouterr()
    (path,) = tmp_path.glob("*.json")
    saved = json.loads(path.read_text(encoding="utf8"))
    if task == "perplexity":
        assert NOT_A_NUMBER in shown.out
        assert saved["metrics"]["perplexity"]["value"] is None
        text, _ = report(tmp_path, capsys)
        assert "| liquid_fusion | - |" in text
    assert shown.err == ""


def test_nothing_is_drawn_from_what_is_no_number() -> None:
    with pytest.raises(LiquidFusionError, match="not numbers"):
        runner.run(broken("nan"), "generate", prompts=["hello"], temperature=1.0)


def test_stream_of_a_broken_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", lambda *_, **__: broken("nan"))
    stream = ["stream", "--device", "cpu", "--budget", "24", "--tokens", "64", "--window", "32", "--chunk", "16"]
    (tmp_path / "text").write_text(TEXT, encoding="utf8")
    assert main([*stream, "--prompt-file", str(tmp_path / "text"), "--output-dir", str(tmp_path / "out")]) == 0
    assert main(["report", str(tmp_path / "out"), "--quiet"]) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_as_people_read_them(value: float) -> None:
    assert number(value) == NOT_A_NUMBER
    assert number(value, "bytes") == NOT_A_NUMBER
    assert number(None) == "-"


# Files that are no results.


def test_skipped_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.json").write_text(json.dumps(document()), encoding="utf8")
    good = json.dumps(document())
    bad: dict[str, str | bytes] = {
        "torn.json": good[: len(good) // 2],
        "empty.json": "",
        "list.json": "[1, 2]",
        "number.json": "5",
        "null.json": "null",
        "object.json": '{"metadata": {}, "results": [], "metrics": {}}',
        "bytes.json": b"\xff\xfe",
        "figures.json": '{"figures": {"a": 1}, "metadata": {"model_name": "m"}}',
        "windows.json": '{"windows": [], "metadata": {"model_name": "m", "machine": {}, "dtype": "x"}}',
        "text.json": json.dumps(document() | {"metrics": {"perplexity": "low"}}),
        "a.error.json": "{}",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    text, told = report(tmp_path, capsys)
    assert told.startswith(f"skipped {len(bad)} files: ")
    assert told.count("\n") == 1
    for name in bad:
        assert f"{name}: " in told
        assert f"{name}: " in text
    assert "empty.json: empty" in told
    assert "| h2o | 5 (4 to 6) |" in text
    assert "torn.json" in (tmp_path / "report.html").read_text(encoding="utf8")
    (tmp_path / "good.json").unlink()
    assert main(["report", str(tmp_path)]) == 2
    assert "torn.json" in capsys.readouterr().err


# What goes into a pipe or a log.


def test_show_in_a_pipe_marks_what_was_kept(capsys: pytest.CaptureFixture[str]) -> None:
    show = ["show", "-m", str(directory()), "--device", "cpu", "--prompt", TEXT[:60], "-s", "streaming"]
    assert main([*show, "--budget", "12", "--max-tokens", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{TEXT[:4]}[-")
    marked = shown[: shown.index("\n\n")]
    gone = marked[marked.index("[-") + 2 : marked.index("-]")]
    assert gone in TEXT
    assert len(gone) == 60 + 3 - 12
    assert marked.endswith("+}")
    assert "--html" in shown


def test_progress_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.05)
    log = io.StringIO()
    with Lines("h2o · needle", Console(file=log)) as lines:
        time.sleep(0.2)
        lines.report(1, 4)
        time.sleep(0.2)
    told = log.getvalue().splitlines()
    assert told[0].startswith("h2o · needle: 0 s so far")
    assert told[-1].startswith("h2o · needle: 25 %, 0 s so far, about ")
    assert told[-1].endswith(" left")
    with Lines("quiet", Console(file=log, quiet=True)) as lines:
        time.sleep(0.1)
    assert "quiet" not in log.getvalue()


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_slow_task_tells_of_itself(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.01)
    words = ["-m", str(directory()), "--device", "cpu", "--output-dir", str(tmp_path), *SHORT]
    own = ["--task", "perplexity"] if command == "run" else ["--tasks", "perplexity", "-s", "h2o", "--budgets", "32"]
    assert main([command, *words, *own]) == 0
    told = capsys.readouterr().err
    assert "%" in told
    assert "left" in told


def test_progress_of_a_baseline_does_not_start_again() -> None:
    steps: list[tuple[int, int]] = []
    options: dict[str, Any] = {"text": TEXT, "context": 128, "limit": 1, "chunk": 32}
    runner.run(loaded(), "perplexity", CacheOptions(budget=32), progress=lambda *at: steps.append(at), **options)
    shares = [done / total for done, total in steps]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


# Texts longer than what the model was made for.


def small(positions: int) -> Loaded:
    from transformers import AutoModelForCausalLM

    with models.silence():
        model = AutoModelForCausalLM.from_pretrained(directory(), max_position_embeddings=positions).eval()
    return Loaded("tiny", model, loaded().tokenizer)


@pytest.mark.parametrize("strategy", ["full", "liquid_fusion"])
def test_text_longer_than_the_positions(strategy: str) -> None:
    options: dict[str, Any] = {"text": TEXT, "context": 128, "limit": 1, "chunk": 32, "baseline": False}
    cache = CacheOptions(strategy=strategy, budget=32)
    with pytest.warns(Notice, match="128 tokens or more, the model was made for 100 positions"):
        runner.run(small(100), "perplexity", cache, **options)
    runner.run(small(128), "perplexity", cache, **options)  # a warning would be an error
    ranked = CacheOptions(strategy=strategy, budget=32, how={"positions": "auto"})
    runner.run(small(100), "perplexity", ranked, **options)


def test_padding_is_no_position() -> None:
    model = small(8).model
    stream = Stream(model, CacheOptions(strategy="full").make(model, 8))
    ids = torch.full((2, 10), 5)
    mask = torch.tensor([[0, 0] + [1] * 8, [0, 0, 0] + [1] * 7])
    stream.feed(ids, mask)
    with pytest.warns(Notice, match="9 tokens or more"):
        stream.feed(ids[:, :1])


def test_plan_beyond_the_positions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-m", str(directory()), "--context", "131072"]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("warning: a context of 131,072 tokens")
    assert "4,096" in shown.err
    assert main(["plan", "-m", str(directory()), "--context", "4096", "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert json.loads(shown.out)["model_positions"] == 4096


# Options that would be ignored, intervals of nothing.

UNUSED = {
    "generate": ["--mentions", "1"],
    "perplexity": ["--max-tokens", "3"],
    "needle": ["--max-tokens", "3"],
    "recall": ["--prompt", "x"],
    "summarize": ["--context", "64"],
    "choice": ["--temperature", "1"],
}


@pytest.mark.parametrize("task", UNUSED)
def test_an_option_that_a_task_has_no_use_for(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--task", task, *UNUSED[task], out=tmp_path / "out") == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {UNUSED[task][0]}: task '{task}'")
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    sweep = ["sweep", "--models", str(directory()), "--tasks", task, *UNUSED[task], "-o", str(tmp_path / "out")]
    assert main(sweep) == 2
    assert not (tmp_path / "out").exists()


def test_every_task_refuses_what_it_does_not_know() -> None:
    from liquidfusion.bench.commands.options import Input
    from liquidfusion.bench.inputs import takes

    common = Input().common()
    for task in TASKS.values():
        known = {name for name in common if takes(task, name)}
        assert known <= {*task.options(), "prompt", "prompt_file"}


def test_one_sample_has_no_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value, low, high = bootstrap([325.0])
    assert (value, math.isnan(low), math.isnan(high)) == (325.0, True, True)
    metric = mean_metric([325.0])
    assert (metric.low, metric.high, metric.n) == (None, None, 1)
    assert run("--prompt", "hello", "--max-tokens", "2", out=tmp_path) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if "time to first token" in line)
    assert "n = 1" in line
    assert "…" not in line


def test_bare_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr()
    assert "sweep" in shown.out
    assert shown.err == ""


def test_sweep_over_a_grid_of_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words: Sequence[str] = ["--models", str(directory()), "--device", "cpu", "--tasks", "perplexity", *SHORT]
    grid = ["-s", "h2o,liquid_fusion", "--budgets", "24,32", "--peak-ratio", "0.1,0.6", "--repeat", "2"]
    assert main(["sweep", *words, *grid, "-o", str(tmp_path)]) == 0
    found = rows.read(tmp_path).rows
    # the full cache, h2o at two sizes, liquid_fusion at two sizes with two ratios; each twice
    assert len(found) == 1 + 2 + 4
    assert {row.repeats for row in found} == {2}
    shown = capsys.readouterr()
    assert "liquid_fusion, peak_ratio 0.1" in shown.out
    assert shown.err.count("warning: h2o does not use peak_ratio") == 1
