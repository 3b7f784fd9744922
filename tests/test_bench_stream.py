"""A stream through one cache: what it measures, where text comes from, and that nothing finished is lost."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmodel import directory, loaded
from liquidfusion.bench import decoding, texts
from liquidfusion.bench.caches import CacheOptions
from liquidfusion.bench.cli import main
from liquidfusion.bench.jobs import streaming
from liquidfusion.exceptions import ConfigError

TEXT = "once upon a time there was a little cache that forgot almost everything.\n" * 4


def command(out: Path, *arguments: str) -> int:
    stream = ["stream", "--model", str(directory()), "--device", "cpu", "--budget", "24", "--output-dir", str(out)]
    return main([*stream, *arguments])


def only(out: Path) -> dict[str, Any]:
    (path,) = out.iterdir()
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
    return document


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_windows_with_room_have_the_models_own_perplexity(chunk: int) -> None:
    ids = decoding.encode(loaded().tokenizer, texts.DEFAULT_PROMPT)[:150]
    rows = list(
        streaming.stream(loaded(), iter(ids), CacheOptions(budget=512), tokens=9999, chunk=chunk, window=chunk * 2)
    )
    with torch.no_grad():
        logits = loaded().model(torch.tensor([ids])).logits[0]
    nll = -logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert rows[-1].tokens == len(ids)
    ends = [0, *(row.tokens for row in rows)]
    for row, start, end in zip(rows, ends[:-1], ends[1:], strict=True):
        expected = nll[max(start - 1, 0) : end - 1].mean().exp().item()
        assert row.perplexity == pytest.approx(expected, rel=1e-4)


def test_memory_and_time_are_told() -> None:
    ids = streaming.read_tokens(loaded().tokenizer, streaming.read())
    rows = list(streaming.stream(loaded(), ids, CacheOptions(budget=24), tokens=400, chunk=8, window=100))
    assert [row.tokens for row in rows] == [104, 208, 312, 400]
    assert len({row.cache_bytes for row in rows}) == 1
    assert rows[0].evictions < rows[-1].evictions
    for row in rows:
        assert row.step_ms > 0
        assert row.tokens_per_second == pytest.approx(8000 / row.step_ms)
        assert math.isfinite(row.perplexity)
        if row.resident_bytes is not None:
            assert 0 < row.resident_bytes <= (row.peak_bytes or 0)


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = loaded().tokenizer
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf8")
    monkeypatch.setattr(streaming, "_PIECE", 100)
    ids = list(islice(streaming.read_tokens(tokenizer, streaming.read(path)), 2 * len(TEXT)))
    assert tokenizer.decode(ids) == TEXT * 2
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT))
    assert tokenizer.decode(list(streaming.read_tokens(tokenizer, streaming.read(Path("-"))))) == TEXT
    assert next(streaming.read()) == texts.reference_text()
    for content, message in ((b"", "empty"), (b"\xff\xfe\xfd", "UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            streaming.read(path)
    with pytest.raises(ConfigError, match="No such file"):
        streaming.read(tmp_path / "nowhere")


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tokens", "96", "--window", "32", "--chunk", "16"]
    assert command(tmp_path / "plain", *arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "perplexity" in shown[0]
    assert len(shown) == 1 + 3 + 1
    document = only(tmp_path / "plain")
    assert [row["tokens"] for row in document["windows"]] == [32, 64, 96]
    assert document["metadata"]["budgets_used"] == [24]
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT[:50]))
    assert command(tmp_path / "json", *arguments, "--prompt-file", "-", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["tokens"] for row in printed["windows"]] == [32, 50]
    assert printed == only(tmp_path / "json")
    assert command(tmp_path / "quiet", *arguments, "--quiet") == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_interrupt_keeps_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def press() -> None:
        while not list(tmp_path.glob("*.json")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    assert command(tmp_path, "--tokens", "10000000", "--window", "64") == 130
    thread.join()
    shown = capsys.readouterr()
    assert only(tmp_path)["windows"]
    assert str(tmp_path) in shown.out
    assert shown.err == "error: interrupted; finished results are kept\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--prompt-file", "missing.txt"], 2, "missing.txt"),
        (["--tokens", "1"], 2, "--tokens"),
        (["--window", "0"], 2, "--window"),
        (["--positions", "relative"], 2, "absolute, cache, auto"),
        (["--cache-size", "20"], 2, "budget"),
    ],
)
def test_errors(
    arguments: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path / "out", *arguments) == code
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert words in shown.err
    assert not (tmp_path / "out").exists()


def test_text_of_one_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a"))
    assert command(tmp_path, "--prompt-file", "-") == 2
    assert "1 tokens" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
