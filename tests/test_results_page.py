"""The results page: measured with the tiny model into rows, and written from rows; what rivals win comes first."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from benchmodel import directory

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_page", ROOT / "benches" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


CONFIG: dict[str, Any] = {
    "models": ["tiny"],
    "dtype": "float32",
    "ours": "ours",
    "methods": [{"name": "ours", "strategy": "liquid_fusion"}, "transformers:DynamicCache"],
    "suites": {"ruler": {"lengths": [900], "shares": [25], "options": {"limit": 1, "subtasks": "niah_single_1"}}},
}


def row(method: str, value: float, size: str = "12.5 %", **more: Any) -> dict[str, Any]:
    return {
        "cell": f"{method} {size}", "model": "m", "task": "ruler", "length": 1024, "method": method, "size": size,
        "n": 8, "value": value, "low": value - 3, "high": value + 3, "subtasks": {"vt": value, "fwe": 40.0},
        "cache_bytes": 2**20, "share": 0.125, "seconds_per_question": 0.5, "passes": 1.0, "question": "unseen",
        "card": "a card", "dtype": "bfloat16", "versions": {"torch": "2"}, "created": "now", "command": "c",
        "jobs": 1, **more,
    }  # fmt: skip


def test_rivals_that_win_come_first(results: ModuleType) -> None:
    rows = [
        row("full", 90.0, "100 %"),
        row("ours", 60.0),
        row("kvpress:KVzipPress", 80.0, passes=2.0),
        row("kvpress:KeyDiffPress", 61.0),
        row("kvpress:SnapKVPress", 10.0),
    ]
    page = results.page(rows, CONFIG)
    lost = page.split("## Where rivals win")[1].split("##")[0]
    assert page.index("## Where rivals win") == page.index("## ")
    assert "3 comparisons at the same size; a rival is ahead in 2" in lost
    first, second = [line for line in lost.splitlines() if line.startswith("- ")]
    assert "`kvpress:KVzipPress` 80.0, `ours` 60.0" in first
    assert "it fed the context 2.0 times" in first
    assert "overlap" not in first
    assert "the intervals overlap" in second
    assert "SnapKV" not in lost
    # vt alone is a task that the full cache can do
    assert "| ruler, m, 1,024 tokens, 12.5 % | `kvpress:SnapKVPress` | 10.0 | 60.0 | 90.0 | 1 of 1 |" in page
    assert "| 12.5 % | `ours` | 60.0 [57, 63] | 0.67 | 1.00 MiB | 12.5 % | 0.50 | 1.0 | unseen | 8 |" in page


def test_without_rivals_the_page_says_so(results: ModuleType) -> None:
    assert "No rival has been measured yet." in results.page([row("full", 90.0, "100 %"), row("ours", 60.0)], CONFIG)
    assert "Nowhere in what was measured." in results.page([row("ours", 60.0), row("kvpress:X", 9.0)], CONFIG)
    assert "Not measured yet." in results.page([], CONFIG)


def test_measuring_fills_rows_once(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "results.yaml"
    config.write_text(yaml.safe_dump(CONFIG), encoding="utf8")
    words = ["results.py", "--config", str(config), "--work", str(tmp_path / "work"), "--model", f"tiny={directory()}"]
    monkeypatch.setattr(sys, "argv", [*words, "--device", "cpu"])
    results.main()
    rows = results.read(tmp_path / "results.jsonl")
    assert [(row["method"], row["size"]) for row in rows] == [
        ("full", "100 %"),
        ("ours", "25 %"),
        ("transformers:DynamicCache", "all tokens"),
    ]
    assert rows[0]["value"] == rows[2]["value"]
    assert rows[1]["share"] < 0.3
    assert "### tiny, 900 tokens" in (tmp_path / "results.md").read_text(encoding="utf8")
    capsys.readouterr()
    results.main()
    assert results.read(tmp_path / "results.jsonl") == rows
    assert "full" not in capsys.readouterr().out


def test_the_shipped_configuration_is_sound(results: ModuleType) -> None:
    config = yaml.safe_load((ROOT / "docs" / "results.yaml").read_text(encoding="utf8"))
    named = {method["name"] for method in config["methods"] if isinstance(method, dict)}
    assert config["ours"] in named
    found = results.jobs(config, dict.fromkeys(config["models"], str(directory())), [], None)
    assert len({job.cell.key for job in found}) > 50
    assert found[0].method == "full"
    alone = {job.length for job in found if job.cell.task == "ruler"} - set(config["suites"]["ruler"]["lengths"])
    assert alone == set(config["suites"]["ruler"]["full_lengths"])
    assert all(job.method == "full" for job in found if job.cell.task == "ruler" and job.length in alone)
    assert {job.cell.task for job in found} == {"ruler", "multiturn", "reasoning"}
