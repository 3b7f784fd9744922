"""Rivals: names, sizes, transformers' caches in this process, and kvpress in its own, where an interpreter has it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import transformers

from benchmodel import directory, loaded
from liquidfusion.bench import decoding
from liquidfusion.bench.caches import FrameworkCache
from liquidfusion.bench.cli import main
from liquidfusion.bench.rivals import Framework, Press, RivalError, parse
from liquidfusion.bench.rivals.names import PYTHON
from liquidfusion.bench.rivals.process import Process
from liquidfusion.bench.sweep.cells import Grid
from liquidfusion.bench.tasks.answering import Prompt, answer, full_bytes
from liquidfusion.exceptions import ConfigError


def asked(count: int = 4) -> list[Prompt]:
    tokenizer = loaded().tokenizer
    return [
        Prompt(
            decoding.encode(tokenizer, "the quick brown fox jumps over " * (6 + n)),
            decoding.encode(tokenizer, "what is " * (1 + n % 2)),
            8,
        )
        for n in range(count)
    ]


def test_names() -> None:
    ada = "AdaKVPress(SnapKVPress(window_size=32),alpha_safeguard=0.1)"
    text = f"kvpress:KeyDiffPress,{ada}, full,transformers:QuantizedCache(backend='fp8')"
    assert parse(text, python="p", budget=64) == [
        Press("KeyDiffPress", "p", budget=64),
        Press(ada, "p", budget=64),
        Press("full", "p"),
        Framework("QuantizedCache(backend='fp8')"),
    ]
    assert parse("kvpress:KnormPress", cache_size=25)[0].strategy == "kvpress:KnormPress"


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        ("KeyDiffPress", {"budget": 4}, "rival 'KeyDiffPress': kvpress:NAME, transformers:NAME or python:"),
        ("other:KeyDiffPress", {"budget": 4}, "rival 'KeyDiffPress': kvpress:NAME"),
        ("", {}, "no rival is named"),
        ("kvpress:KeyDiffPress", {}, "rival kvpress:KeyDiffPress needs a size"),
        ("kvpress:KeyDiffPress", {"budget": 0}, "budget 0 is not at least 1"),
        ("kvpress:KeyDiffPress", {"cache_size": 0.0}, "cache_size 0 is not above 0"),
        (
            "kvpress:KeyDiffPress",
            {"budget": 4, "cache_size": 5.0},
            "cache_size 5.0 and budget 4 are given; one of cache_size, budget, memory is accepted",
        ),
        ("kvpress:KeyDiffPress(", {"budget": 4}, "is not a name, or a call such as"),
        ("kvpress:__import__('os').remove('x')", {"budget": 4}, "is not a name, or a call such as"),
        ("kvpress:SnapKVPress(window_size=print(1).x)", {"budget": 4}, "is not a name, or a call such as"),
        ("transformers:3", {}, "is not a name, or a call such as"),
        ("python:Newest", {}, "rival python:Newest: python:MODULE.CLASS is accepted"),
        ("python:no_such_module.Newest", {}, "rival python:no_such_module.Newest: No module named 'no_such_module'"),
        ("python:json.JSONDecoder", {}, "module 'json' has no cache 'JSONDecoder': a subclass of transformers.Cache"),
        ("python:json.Newest(1, 2", {}, "is not a name, or a call such as"),
    ],
)
def test_refused_names(text: str, size: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(text, **size)  # type: ignore[arg-type]


def test_a_size_refers_to_the_whole_prompt() -> None:
    assert Press("KnormPress", cache_size=12.5).kept(1000) == 125
    assert Press("KnormPress", budget=64).kept(1000) == 64
    assert Press("KnormPress", memory=6400).kept(1000, token_bytes=100) == 64
    assert Press("full").kept(1000) == 1000


def test_a_press_is_no_cache_of_this_process() -> None:
    with pytest.raises(ConfigError, match="answers in a process of its own: this task cannot use it"):
        Press("KnormPress", budget=4).make(loaded().model, 8)


def test_an_interpreter_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON, raising=False)
    with pytest.raises(ConfigError, match="pip install kvpress, then --rival-python"):
        answer(loaded().model, loaded().tokenizer, Press("KnormPress", budget=4), asked(1))
    with pytest.raises(RivalError, match="/no/such/python cannot be started: No such file"):
        answer(loaded().model, loaded().tokenizer, Press("KnormPress", "/no/such/python", budget=4), asked(1))


def test_an_interpreter_without_kvpress_says_so() -> None:
    model = str(loaded().model.config.name_or_path)
    with pytest.raises(RivalError, match=r"No module named 'kvpress'|died"):
        Process(sys.executable, model, "float32", "cpu", 1)


def test_transformers_caches_answer_here() -> None:
    model, tokenizer = loaded().model, loaded().tokenizer
    plain = answer(model, tokenizer, FrameworkCache(), asked())
    dynamic = answer(model, tokenizer, Framework("DynamicCache"), asked())
    assert [one.tokens for one in dynamic] == [one.tokens for one in plain]
    with pytest.raises(ConfigError, match="has no cache 'NoCache'"):
        answer(model, tokenizer, Framework("NoCache"), asked())
    with pytest.raises(ConfigError, match="nbits"):
        answer(model, tokenizer, Framework("QuantizedCache(backend='fp8', nbits=4)"), asked())


def has_fp8() -> bool:
    """Whether this transformers has the one backend of its quantised cache that needs no other package."""
    try:
        Framework("QuantizedCache(backend='fp8')").make(loaded().model, 1)
    except ConfigError:
        return False
    return True


@pytest.mark.skipif(not has_fp8(), reason=f"transformers {transformers.__version__} has no fp8 cache")
def test_a_quantised_cache_is_counted_as_it_is_held() -> None:
    model, tokenizer = loaded().model, loaded().tokenizer
    rival = Framework("QuantizedCache(backend='fp8')")
    (one,) = answer(model, tokenizer, rival, asked(1))
    elements = full_bytes(model, asked(1)[0].length + one.fed) // model.dtype.itemsize
    assert elements <= one.facts["cache_bytes"] <= elements + 64  # a byte each, and the scales


@cache
def interpreter() -> str | None:
    """An interpreter with kvpress: named by the environment variable."""
    python = os.environ.get(PYTHON)
    if python is None:
        return None
    found = subprocess.run([python, "-c", "import importlib.util as u; assert u.find_spec('kvpress')"], check=False)
    return python if found.returncode == 0 else None


kvpress = pytest.mark.skipif(interpreter() is None, reason=f"{PYTHON} names no interpreter with kvpress")


@kvpress
def test_the_other_process_reads_the_same_prompts() -> None:
    model, tokenizer = loaded().model, loaded().tokenizer
    plain = answer(model, tokenizer, FrameworkCache(), asked())
    there = answer(model, tokenizer, Press("full", interpreter()), asked())
    assert [one.tokens for one in there] == [one.tokens for one in plain]
    assert [one.text for one in there] == [one.text for one in plain]
    for prompt, one in zip(asked(), there, strict=True):
        assert one.facts["cache_bytes"] == full_bytes(model, prompt.length + one.fed)
        assert one.facts["passes"] == 1.0


@kvpress
@pytest.mark.parametrize(
    "press",
    ["KnormPress", "KeyDiffPress", "ExpectedAttentionPress", "SnapKVPress(window_size=16)", "CompactorPress"],
)
def test_presses_keep_what_they_are_given_alone_and_together(press: str) -> None:
    model, tokenizer = loaded().model, loaded().tokenizer
    rival = Press(press, interpreter(), budget=40)
    alone = answer(model, tokenizer, rival, asked(), batch_size=1)
    together = answer(model, tokenizer, rival, asked(), batch_size=4)
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    for prompt, one in zip(asked(), alone, strict=True):
        assert one.facts["cache_bytes"] == full_bytes(model, 40 + len(prompt.question) + one.fed)
        assert one.facts["allocated_bytes"] == one.facts["cache_bytes"]


@kvpress
def test_a_press_for_decoding_bounds_the_answer() -> None:
    rival = Press("DecodingPress(KnormPress, compression_interval=1)", interpreter(), budget=24)
    found = answer(loaded().model, loaded().tokenizer, rival, asked(2))
    assert {one.facts["cache_bytes"] for one in found} == {full_bytes(loaded().model, 24)}


@kvpress
def test_what_a_press_dies_of_is_said_and_the_next_one_runs() -> None:
    model, tokenizer = loaded().model, loaded().tokenizer
    with pytest.raises(RivalError, match=r"kvpress .* has no NoSuchPress; it has .*KeyDiffPress"):
        answer(model, tokenizer, Press("NoSuchPress", interpreter(), budget=4), asked(1))
    assert answer(model, tokenizer, Press("KnormPress", interpreter(), budget=4), asked(1))


def test_a_class_of_your_own_gets_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        "from transformers import DynamicCache",
        "class Told(DynamicCache):",
        "    def __init__(self, config, budget=None, extra=0):",
        "        super().__init__(config=config)",
        "        self.told = (budget, extra)",
    )
    (tmp_path / "told_cache.py").write_text("\n".join(lines), encoding="utf8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = loaded().model
    for size, told in (({"budget": 64}, 64), ({"cache_size": 25.0}, 10), ({}, None)):
        (rival,) = parse("python:told_cache.Told(extra=3)", **size)  # type: ignore[arg-type]
        assert rival.make(model, 40).told == (told, 3)  # type: ignore[attr-defined]
        assert rival.as_dict() == {"strategy": "python:told_cache.Told(extra=3)", **size}
    (rival,) = parse("python:told_cache.Told(budget=7)", budget=64)
    assert rival.make(model, 40).told == (7, 0)  # type: ignore[attr-defined]
    (rival,) = parse("python:told_cache.Told(other=7)", budget=64)
    with pytest.raises(ConfigError, match="unexpected keyword argument 'other'"):
        rival.make(model, 40)


def command(*arguments: str, out: Path) -> int:
    return main([*arguments, "--device", "cpu", "--output-dir", str(out), "--quiet"])


def test_run_measures_rivals_beside_a_strategy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--task", "reasoning", "--limit", "1", "--max-tokens", "4", "--set", "terms=3", "--budget", "32")
    caches = ["DynamicCache", *(["QuantizedCache(backend='fp8')"] if has_fp8() else [])]
    rivals = ("--rival", f"transformers:{','.join(caches)}")
    assert command("run", "--model", str(directory()), *arguments, *rivals, out=tmp_path) == 0
    found = [json.loads(path.read_text(encoding="utf8")) for path in tmp_path.glob("*.json")]
    by_strategy = {document["metadata"]["strategy"]: document for document in found}
    assert set(by_strategy) == {"full", "liquid_fusion", *(f"transformers:{name}" for name in caches)}
    texts = {name: document["results"][0]["result"]["choices"][0]["text"] for name, document in by_strategy.items()}
    assert texts["transformers:DynamicCache"] == texts["full"]
    for document in found:
        scores = document["results"][0]["result"]["scores"]
        assert {"cache_bytes", "share", "second_pass", "question_seen"} <= set(scores)
        assert document["metrics"]["cache_bytes"]["full"] == by_strategy["full"]["metrics"]["cache_bytes"]["value"]
    assert main(["report", str(tmp_path), "--quiet"]) == 0
    capsys.readouterr()


def test_sweeps_and_experiments_take_rivals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = Grid(
        models=[str(directory())],
        tasks={"reasoning": {"limit": 1}},
        strategies=["streaming"],
        budgets=[16, 32],
        rival=["kvpress:KeyDiffPress,full,transformers:DynamicCache"],
    )
    named = [(cell.strategy, cell.size) for cell in grid.cells()]
    assert named == [
        ("full", "unbounded"),
        ("streaming", "16t"),
        ("streaming", "32t"),
        ("kvpress:KeyDiffPress", "16t"),
        ("kvpress:full", "default"),
        ("transformers:DynamicCache", "default"),
        ("kvpress:KeyDiffPress", "32t"),
    ]
    words = [f"models=[{directory()}]", "strategies=[full]", "budgets=[16]", "rival=[transformers:DynamicCache]"]
    assert main(["experiment", "--dry-run", "tasks={reasoning: {limit: 1}}", *words]) == 0
    assert "# 2 cells" in capsys.readouterr().out
    words = ("sweep", "--models", str(directory()), "--tasks", "reasoning", "--strategies", "full", "--budgets", "16")
    assert command(*words, "--rival", "kvpress:KeyDiff Press", out=tmp_path) == 2
    assert "is not a name, or a call such as" in capsys.readouterr().err


def test_a_task_without_prompts_refuses_a_press(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "run",
        "--model",
        str(directory()),
        "--task",
        "recall",
        "--limit",
        "1",
        "--context",
        "128",
        "--budget",
        "32",
    )
    assert command(*words, "--rival", "kvpress:KeyDiffPress", "--rival-python", "python", out=tmp_path) == 1
    assert "answers in a process of its own: this task cannot use it" in capsys.readouterr().err
