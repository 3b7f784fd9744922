"""The jobs of docs/guides/three-jobs.md, done as the page says."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from benchmodel import directory
from liquidfusion.bench.cli import main

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "guides" / "three-jobs.md").read_text(encoding="utf8")
JOBS = {part.splitlines()[0]: part for part in PAGE.split("\n## ")[1:]}


def commands(text: str) -> list[list[str]]:
    """The arguments of each command that a page shows."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert all(line.startswith("$ liquidfusion-bench ") for line in lines)
    return [shlex.split(line)[2:] for line in lines]


def test_there_are_three() -> None:
    assert list(JOBS) == ["Does it hold on my model?", "Which method for my budget?", "Add my method and compare"]
    assert all(0 < len(commands(text)) <= 6 for text in JOBS.values())


@pytest.mark.filterwarnings("ignore:bits=")  # random weights forgive little
@pytest.mark.parametrize("job", JOBS)
def test_a_job_from_the_page_alone(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command runs, on a tiny model, and the last one reports all that was asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in re.findall(r'--8<-- "(examples/.*?)"', JOBS[job]):
        shutil.copy(ROOT / name, tmp_path)
    for arguments in commands(JOBS[job]):
        given = [str(directory()) if word == "$MODEL" else word for word in arguments]
        shorter = ["--limit", "1"] if given[0] in ("run", "sweep") else []
        assert main([*given, *shorter]) == 0
    report = (tmp_path / "benchmark_results" / "report.md").read_text(encoding="utf8")
    asked = re.findall(r"--tasks? (\S+)", JOBS[job])
    methods = re.findall(r"--rival (\S+)|--strategies (\S+)", JOBS[job])
    for word in ",".join(asked + [method for pair in methods for method in pair if method]).split(","):
        assert word in report
    assert "failed" not in capsys.readouterr().err
