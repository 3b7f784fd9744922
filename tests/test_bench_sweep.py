"""Sweeps: killed and continued, failing cells, several processes, identical inputs for every strategy."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Self

import pytest

from benchmodel import directory
from liquidfusion.bench import results
from liquidfusion.bench.caches import CacheOptions
from liquidfusion.bench.cli import main
from liquidfusion.bench.parameters import strategy_names
from liquidfusion.bench.sweep import work
from liquidfusion.bench.sweep.cells import Cell, Grid

BOUNDED = len(strategy_names()) - len(["full"])
PROMPT = "once upon a time there was a little cache " * 4
SWEEP = [
    *("sweep", "--models", str(directory()), "--device", "cpu", "--tasks", "generate,perplexity", "--prompt", PROMPT),
    *("--max-tokens", "4", "--context", "96", "--limit", "1", "--chunk", "32"),
]


def cells(out: Path) -> dict[str, Any]:
    """Everything in a directory that does not depend on the clock: file name → texts and quality."""
    found = {}
    for path in sorted(out.iterdir()):
        document = json.loads(path.read_text(encoding="utf8"))
        found[path.name] = [
            [item["result"]["choices"], item["result"]["scores"].get("nll"), item["request"]]
            for item in document["results"]
        ]
    return found


def test_every_cell_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SWEEP, "--output-dir", str(tmp_path), "--cache-sizes", "10,50"]) == 0
    documents = [results.load(path) for path in tmp_path.iterdir()]
    # bounded strategies x 2 sizes x 2 tasks, the full cache once a task, transformers' own for generate
    assert len(documents) == BOUNDED * 2 * 2 + 2 + 1
    assert len({json.dumps([item["request"] for item in d["results"]]) for d in documents}) == 2
    for document in documents:
        for name in ("perplexity", "latency_p50"):
            if name in document["metrics"] and document["metadata"]["strategy"] != "reference":
                assert document["metrics"][name]["full"] is not None
    shown = capsys.readouterr()
    assert "liquid_fusion" in shown.out
    assert f"{len(documents)}/{len(documents)}" in shown.err
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert main([*SWEEP, "--output-dir", str(tmp_path), "--cache-sizes", "10,50", "--quiet"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_killed_ten_times_is_the_same(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    sweep = [*SWEEP, "--cache-sizes", "10,20,30,50,100", "--quiet", "--output-dir"]
    assert main([*sweep, str(whole)]) == 0
    # one interpreter forks the runs that are killed, so that each need not import everything again
    rng = random.Random(0)
    for _ in range(10):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(main([*sweep, str(broken)]))
        time.sleep(rng.uniform(0.05, 0.6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert main([*sweep, str(broken)]) == 0
    for leftover in broken.glob(".*"):  # what a kill leaves is never under a result's name
        assert leftover.suffix == ".tmp"
        leftover.unlink()
    assert cells(broken) == cells(whole)


def test_failing_cell_is_recorded_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = CacheOptions.make

    def failing(self: CacheOptions, *arguments: Any) -> Any:
        if self.strategy == "h2o":
            raise MemoryError("too little of it")
        return make(self, *arguments)

    monkeypatch.setattr(CacheOptions, "make", failing)
    arguments = [*SWEEP, "--cache-sizes", "50", "--output-dir", str(tmp_path)]
    assert main(arguments) == 1
    shown = capsys.readouterr()
    whole = BOUNDED * 2 + 2 + 1
    assert f"2 of {whole} cells failed" in shown.err
    errors = [json.loads(path.read_text(encoding="utf8")) for path in tmp_path.glob("*.error.json")]
    assert [error["error"] for error in errors] == ["MemoryError: too little of it"] * 2
    monkeypatch.undo()
    assert main(arguments) == 0
    assert not list(tmp_path.glob("*.error.json"))
    assert len(list(tmp_path.iterdir())) == whole


def test_torn_file_is_measured_again(tmp_path: Path) -> None:
    (cell,) = Grid(
        models=[str(directory())], tasks={"perplexity": {"text": PROMPT, "context": 64}}, strategies=["full"]
    ).cells()
    cell.path(tmp_path).write_text('{"metadata": {', encoding="utf8")
    (outcome,) = work.sweep([cell], tmp_path, devices=["cpu"])
    assert not outcome.resumed
    assert outcome.document is not None
    (again,) = work.sweep([cell], tmp_path, devices=["cpu"])
    assert again.resumed


def test_key_tells_cells_apart() -> None:
    cell = Cell("m", "perplexity", CacheOptions(budget=64), {"limit": 1})
    assert cell.key == Cell("m", "perplexity", CacheOptions(budget=64), {"limit": 1}).key
    others = [
        Cell("n", "perplexity", CacheOptions(budget=64), {"limit": 1}),
        Cell("m", "needle", CacheOptions(budget=64), {"limit": 1}),
        Cell("m", "perplexity", CacheOptions(budget=65), {"limit": 1}),
        Cell("m", "perplexity", CacheOptions.of(budget=64, sink_size=2), {"limit": 1}),
        Cell("m", "perplexity", CacheOptions(budget=64), {"limit": 2}),
        Cell("m", "perplexity", CacheOptions(budget=64), {"limit": 1}, seed=1),
        Cell("m", "perplexity", None, {"limit": 1}),
    ]
    assert len({cell.key, *(other.key for other in others)}) == 8


def test_two_processes(tmp_path: Path) -> None:
    arguments = ["--cache-sizes", "50", "--strategies", "local", "--jobs", "2", "--quiet"]
    assert main([*SWEEP, *arguments, "--output-dir", str(tmp_path / "two")]) == 0
    assert main([*SWEEP, *arguments[:4], "--quiet", "--output-dir", str(tmp_path / "one")]) == 0
    assert len(cells(tmp_path / "two")) == 4
    assert cells(tmp_path / "two") == cells(tmp_path / "one")


def test_interrupt_ends_every_process(tmp_path: Path) -> None:
    words = [word for word in SWEEP if word not in ("--max-tokens", "4")]  # perplexity writes nothing
    command = [sys.executable, "-m", "liquidfusion.bench", *words, "--jobs", "2", "--set", "batch_size=1"]
    cells = ["--tasks", "perplexity", "--context", "96", "--limit", "40", "--prompt", PROMPT * 30]
    child = subprocess.Popen(
        [*command, *cells, "--output-dir", str(tmp_path)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not list(tmp_path.glob("*.json")):
        assert child.poll() is None
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    _, told = child.communicate(timeout=30)  # until the last process has closed it
    assert child.returncode == 130
    # beside each cell, and lines of progress where it takes long
    assert [line for line in told.splitlines() if "/" not in line[:4] and " so far" not in line] == [
        "error: interrupted; finished results are kept"
    ]
    assert all(results.load(path) for path in tmp_path.glob("*.json"))


def test_interrupt_waits_until_workers_have_started() -> None:
    """Also when another thread takes the signal."""
    done, steps = threading.Event(), []
    other = threading.Thread(target=done.wait)
    other.start()

    def start() -> None:
        with work._interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            steps.append("started")

    try:
        with pytest.raises(KeyboardInterrupt):
            start()
    finally:
        done.set()
        other.join()
    assert steps == ["started"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_worker_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Pool:
        """Of which every process is killed at once."""

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, *_: Any) -> Future[Any]:
            dead: Future[Any] = Future()
            dead.set_exception(BrokenProcessPool("terminated abruptly"))
            return dead

    monkeypatch.setattr(work, "ProcessPoolExecutor", Pool)
    assert main([*SWEEP, "--jobs", "2", "--quiet", "--output-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: a worker died, perhaps out of memory; start again to continue\n"


def test_model_that_is_not_there_is_told_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SWEEP, "--models", f"{directory()},./nowhere", "--output-dir", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "error: model './nowhere': there is no such directory\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--strategies", ""], "strategies is empty"),
        (["--tasks", ","], "tasks is empty"),
        (["--models", ""], "models is empty"),
        (["--strategies", "best"], "liquid_fusion"),
        (["--tasks", "guess"], "perplexity"),
        (["--cache-sizes", "4,x"], "cache-sizes"),
        (["--cache-sizes", "0"], "0"),
        (["--budgets", "2"], "budget"),
        (["--set", "nothing=1"], "nothing"),
        (["--parameter", "nothing=1"], "sink_size"),
        (["--jobs", "0"], "--jobs"),
    ],
)
def test_errors(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SWEEP, "--output-dir", str(tmp_path), *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert words in shown
