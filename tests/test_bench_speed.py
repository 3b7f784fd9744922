"""`speed`: its parts, its figures' names, rivals that do not fit."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import DynamicCache

from benchmodel import loaded
from liquidfusion.bench.cli import main
from liquidfusion.bench.jobs import speed

SPEED = ["speed", "--shape", "custom", "--device", "cpu", "--budget", "16", "--contexts", "32", "--prefill", "32"]


@pytest.mark.parametrize(
    ("bits", "ours"), [(None, "KVCache"), ("4", "KVCache(bits=4)"), ("8,4", "KVCache(bits=(8, 4))")]
)
def test_every_part_of_speed(bits: str | None, ours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coded = [] if bits is None else ["--bits", bits]
    parts = ["--parts", ",".join(speed.PARTS), "--batch", "2", "--steps", "2"]
    assert main([*SPEED, *coded, *parts, "--output-dir", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    document = json.loads(path.read_text(encoding="utf8"))
    assert document["failures"] == {}
    figures = document["figures"]
    assert figures[f"one row of {ours}, bytes"] == figures[f"one row of {ours} by the formula, bytes"]
    assert figures[f"throughput of {ours} with 2 rows, tokens/s"] > 0
    assert figures[f"a step of {ours} with 2 rows, victims chosen every step, over one without eviction"] > 0
    # one more row is one more row to read
    row, floors = (
        figures[f"one row of {ours}, bytes"],
        [v for name, v in figures.items() if name.startswith("floor of")],
    )
    copied = 1e9 * figures["a copy's reads and writes, TB/s"]
    assert floors[1] - floors[0] == pytest.approx(row / copied)
    (roofline,) = (name for name in figures if name.startswith("roofline of any exact engine at 32 tokens"))
    assert figures[roofline] > 0
    # each part is announced before its figures
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.endswith(f" s a step of {ours} with one row"))
    assert f"a step of {ours} with one row, ms" in "".join(lines[at : at + 4])


def bench(**plan: Any) -> speed.Bench:
    plan = {"budget": 16, "contexts": (32,), "prefill": (32,), "batch": 2, "steps": 2, "chunk": 16} | plan
    return speed.Bench(loaded().model, speed.Plan(**plan), speed.Results(report=lambda _: None))


def test_speed_goes_on_where_a_rival_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Big(DynamicCache):
        living: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

        def update(self, *_: Any, **__: Any) -> Any:
            self.living.add(self)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB.\nMore.")

    monkeypatch.setattr(speed, "DynamicCache", Big)
    run = bench(parts=("decode", "generate", "prefill"))
    run.run()
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 64 GiB"
    assert run.results.failures == {
        "a step of DynamicCache with one row at 32 tokens": reason,
        "a prompt of 32 tokens in one call, DynamicCache with sdpa": reason,
        "a prompt of 32 tokens in one call, DynamicCache with eager attention": reason,
    }
    assert "a prompt of 32 tokens in one call, KVCache, ms" in run.results.figures
    assert "a token of model.generate with one row of KVCache, ms" in run.results.figures
    assert not Big.living  # its memory is free for what comes next


@pytest.mark.parametrize(
    ("message", "tried"),
    [("CUDA out of memory", [12, 11, 10, 9]), ("CUBLAS_STATUS_ALLOC_FAILED", [12, 11, 10, 9]), ("x", [12])],
)
def test_the_largest_throughput(message: str, tried: list[int]) -> None:
    run, seen = bench(), []

    def work(count: int) -> None:
        seen.append(count)
        if count > 9:
            raise RuntimeError(message)

    run._largest(12, "StaticCache", " at 32 tokens", work)
    assert seen == tried
    assert len(run.results.failures) == sum(count > 9 for count in tried)
    assert list(speed.fewer(20)) == [20, 18, 17, 16, 15, 14, 13, 12, 11, *range(10, 0, -1)]
    assert list(speed.fewer(0)) == [1]


def test_speed_says_how_steps_ran() -> None:
    run = bench()
    plain = run.cache(1, 32)
    assert run.how(plain) == ""
    with pytest.raises(RuntimeError, match="no CUDA graph"):
        run.how(plain, compiled=True)
    replayed: Any = SimpleNamespace(_graph=SimpleNamespace(captured=True))
    assert run.how(replayed) == ", replayed from a CUDA graph"
    assert run.how(replayed, compiled=True) == ", compiled and replayed from a CUDA graph"
