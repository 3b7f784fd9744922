"""The repository's own benchmarks: their figures on a tiny model, against one forward pass without any cache."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmodel import directory, loaded
from liquidfusion.bench import decoding, machine, texts

BENCHES = Path(__file__).parent.parent / "benches"


def script(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHES))
    return importlib.import_module(name)


def text(path: Path, tokens: int) -> tuple[list[str], Tensor]:
    """Options that name a text of one character a token and the model, and the text's tokens."""
    content = texts.reference_text()[:tokens]
    (path / "text.txt").write_text(content, encoding="utf8")
    options = ["--text", str(path / "text.txt"), "--model", str(directory()), "--device", "cpu"]
    return options, torch.tensor([decoding.encode(loaded().tokenizer, content)])


def losses(ids: Tensor) -> Tensor:
    """Of every token but the first, without a cache."""
    with torch.no_grad():
        logits = loaded().model(ids, use_cache=False).logits[0]
    return -logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def perplexity(nll: Tensor) -> float:
    return nll.mean().exp().item()


def nulls(told: Any) -> Any:
    """The same with None for what is not a number, as files say it."""
    if isinstance(told, dict):
        return {name: nulls(value) for name, value in told.items()}
    if isinstance(told, list):
        return [nulls(value) for value in told]
    return None if isinstance(told, float) and math.isnan(told) else told


def test_endless_quality(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given, ids = text(tmp_path, 520)
    given += ["--starts", "448", "128", "--length", "64", "--lead", "96", "--chunk", "32", "--out"]
    caches = ["--caches", "liquid_fusion:cache", "transformers", "local:absolute"]
    bounded = ["--budget", "24", *caches, "--rivals-until", "200"]
    result = script(monkeypatch, "endless_quality").main([*given, str(tmp_path / "out.json"), *bounded])
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["caches"] == nulls(result["caches"])
    assert [row["start"] for row in result["caches"]["liquid_fusion:cache"]["texts"]] == [128, 448]
    (full,) = result["caches"]["transformers"]["texts"]
    assert full["deep"] == pytest.approx(perplexity(losses(ids)[127:191]), rel=1e-4)
    assert full["near"] == pytest.approx(perplexity(losses(ids[:, 32:])[95:159]), rel=1e-4)
    judged = result["caches"]["liquid_fusion:cache"]["all"]
    assert result["holds"] == (abs(judged["ratio"] - 1) <= 0.05)
    assert judged["ratio"] == pytest.approx(judged["deep"] / judged["near"])
    assert judged["low"] <= judged["ratio"] <= judged["high"]
    (local,) = result["caches"]["local:absolute"]["texts"]
    assert local["deep"] != pytest.approx(full["deep"], rel=1e-3)
    # With room for all of it the bounded cache is the full one.
    roomy = script(monkeypatch, "endless_quality").main(
        [*given, str(tmp_path / "roomy.json"), "--budget", "520", *caches[:2]]
    )
    for row in roomy["caches"]["liquid_fusion:cache"]["texts"]:
        at = row["start"] - 1
        assert row["deep"] == pytest.approx(perplexity(losses(ids)[at : at + 64]), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--starts", "128", "160"], "--starts 160"),
        (["--starts", "64"], "--starts 64"),
        (["--starts", "100"], "--chunk 32"),
        (["--starts", "4096"], "520 tokens, 4160"),
        (["--length", "8"], "--length 8"),
        (["--chunk", "0"], "--chunk 0"),
        (["--caches", "lru"], "lru"),
        (["--budget", "2"], "2"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_endless_quality_refuses(
    change: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, _ = text(tmp_path, 520)
    given += ["--starts", "128", "--length", "64", "--lead", "96", "--chunk", "32", "--budget", "24", *change]
    with pytest.raises(SystemExit) as stopped:
        script(monkeypatch, "endless_quality").main(given)
    assert words in f"{stopped.value} {capsys.readouterr().err}"


def test_prefill_quality(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given, ids = text(tmp_path, 520)
    given += ["--prompt", "130", "--follow", "128", "--chunk", "32", "--limit", "2", "--sizes", "0", "16", "64"]
    bench = script(monkeypatch, "prefill_quality")
    result = bench.main([*given, "--budgets", "24", "512", "--strategies", "h2o", "--out", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == result["rows"]
    parts = [losses(ids[:, at : at + 258])[129:] for at in (0, 258)]
    exact = perplexity(torch.cat(parts))
    rows = result["rows"]
    assert rows["full cache 0"]["perplexity"] == pytest.approx(exact, rel=1e-4)
    for size in (0, 16, 64):
        roomy, tight = rows[f"h2o, budget 512 {size}"], rows[f"h2o, budget 24 {size}"]
        assert roomy["segments"] == tight["segments"] == 2
        assert roomy["perplexity"] == pytest.approx(exact, rel=1e-4)
        assert roomy["ratio"] == pytest.approx(1, rel=1e-4)
        assert tight["perplexity"] != pytest.approx(exact, rel=1e-3)
        one = rows["h2o, budget 24 0"]["perplexity"]
        assert tight["ratio"] == pytest.approx(tight["perplexity"] / one)
        assert math.isfinite(tight["high"])
    assert rows["h2o, budget 24 16"]["ratio"] != 1
    shown = bench.table(rows, (0, 16, 64)).splitlines()
    assert shown[0] == "| | one call | calls of 16 | calls of 64 |"
    assert len(shown) == 2 + 3
    assert shown[-1].startswith("| full cache | ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--follow", "100"], "--follow 100"),
        (["--sizes", "-1"], "--sizes -1"),
        (["--limit", "0"], "--limit 0"),
        (["--budgets", "3"], "3"),
        (["--strategies", "lru"], "lru"),
        (["--prompt", "4096"], "too few"),
    ],
)
def test_prefill_quality_refuses(
    change: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, _ = text(tmp_path, 520)
    with pytest.raises(SystemExit) as stopped:
        script(monkeypatch, "prefill_quality").main([*given, *change])
    assert words in f"{stopped.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("processes", "options", "told"),
    [
        (None, [], "it needs torchrun"),
        ("3", [], "3 processes cannot share the 4 key/value heads of custom"),
        ("2", ["--budget", "2"], "budget 2 is out of range"),
        ("2", ["--strategy", "h20"], 'got "h20"'),
    ],
)
def test_tensor_parallel_refuses(
    processes: str | None,
    options: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(sys, "argv", ["tensor_parallel.py", "--device", "cpu", *options])
    with pytest.raises(SystemExit):
        script(monkeypatch, "tensor_parallel").main()
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_tensor_parallel(tmp_path: Path) -> None:
    """Two processes on a CPU: every row is there, and the cache talks to nobody."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    sizes = ["--context", "80", "--budget", "24", "--batch", "2", "--steps", "2", "--warmup", "1"]
    parts = ["--profile", "--compile"]
    done = subprocess.run(
        [*command, str(BENCHES / "tensor_parallel.py"), "--device", "cpu", *sizes, *parts, "--out", "out.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result["tokens_equal"].values()) == {True}
    rows = {(row["cache"], row["batch"]): row for row in result["rows"]}
    alone = [(name, 1) for name in ("liquidfusion", "liquidfusion, no graph", "DynamicCache", "StaticCache")]
    compiled = {("liquidfusion, compile", batch) for batch in (1, 2, 4)}
    assert set(rows) == {*alone, ("liquidfusion", 2), ("DynamicCache", 2), *compiled}
    for row in rows.values():
        assert row["problem"] is None
        assert row["tokens_per_s"] == pytest.approx(1000 * row["batch"] / row["ms_per_step"])
        # as many as the same step of a full cache takes: one for each product that sums over heads or neurons
        if (row["cache"], row["batch"]) not in compiled:
            assert row["collectives_per_step"] == rows["DynamicCache", 1]["collectives_per_step"]
        assert row["profile_ms"]["collective kernels"] == rows["DynamicCache", 1]["profile_ms"]["collective kernels"]
        assert 0 < row["profile_ms"]["collectives"] < row["profile_ms"]["span"]
    assert "collectives added by the cache: False" in done.stdout


def test_engine_measures_what_it_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = script(monkeypatch, "engine")
    path = tmp_path / "results.json"
    engine.main(["--tiny", "--only", "static", "sampling", "turns", "--json", str(path)])
    results = json.loads(path.read_text())
    assert results["static batch of 4"] == pytest.approx(4e3 / results["static batch of 4, step"])
    assert results["that share at 1024"] > 0
    # The table comes last and has every figure.
    assert list(results) == [line.split("  ")[0] for line in capsys.readouterr().out.split("\n\n")[1].splitlines()]


def test_the_roofline_of_an_exact_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = script(monkeypatch, "engine")
    monkeypatch.setattr(machine, "copy_rate", lambda _: 3e12)
    bench = engine.Bench(engine.arguments(["--tiny"]))
    config, embedding = bench.model.config, bench.model.get_input_embeddings().weight.nbytes
    read = sum(p.nbytes for p in bench.model.parameters()) - embedding
    context = sum(bench.contexts) / 8 + 8
    each = context * 2 * bench.model.dtype.itemsize * config.num_hidden_layers * config.num_key_value_heads * 32
    assert bench.roofline() == pytest.approx(4 / ((read + 4 * each) / 3e12))


def test_engine_check_counts_what_agrees(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    check = script(monkeypatch, "engine_check")
    options = ["--device", "cpu", "--requests", "6", "--rows", "3", "--budget", "24", "--chunk", "8", "--new", "6"]
    assert check.main([*options, "--strategies", "h2o"]) == 0
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[:4] == ["h2o", "6", "of", "6"]
    assert line[5] == "6"
