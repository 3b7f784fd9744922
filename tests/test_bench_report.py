"""The report: what it reads, the page, the tables, the charts."""

from __future__ import annotations

import json
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmodel import directory
from liquidfusion.bench.cli import main
from liquidfusion.bench.report import charts, curves
from liquidfusion.bench.report import page as reporting
from liquidfusion.bench.report.charts import Chart, Point, Series
from liquidfusion.bench.terminal.output import number


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    arguments = ["--models", str(directory()), "--device", "cpu", "--tasks", "generate,perplexity", "--max-tokens", "3"]
    prompt = ["--prompt", "once upon a time there was a little cache " * 4, "--limit", "1", "--chunk", "32"]
    for context in ("96", "128"):
        sweep = [
            "sweep",
            *arguments,
            *prompt,
            "--context",
            context,
            "--budgets",
            "16,48",
            "-s",
            "h2o,liquid_fusion,full",
        ]
        assert main([*sweep, "--output-dir", str(out), "--quiet"]) == 0
    stream = ["stream", "-m", str(directory()), "--device", "cpu", "--tokens", "96", "--window", "32", "--chunk", "16"]
    for budget in ("16", "48"):
        assert main([*stream, "--budget", budget, "--output-dir", str(out), "--quiet"]) == 0
    speed = [
        "speed",
        "--shape",
        "custom",
        "--device",
        "cpu",
        "--budget",
        "16",
        "--contexts",
        "32,64",
        "--prefill",
        "32",
    ]
    speed += ["--batch", "2", "--chunk", "16", "--steps", "2", "--no-static", "--parts", "decode,batch,prefill"]
    assert main([*speed, "--output-dir", str(out), "--quiet"]) == 0
    (out / "else.json").write_text("[1, 2]", encoding="utf8")
    (out / "a.error.json").write_text('{"task": "needle", "error": "OutOfMemoryError: <b>"}', encoding="utf8")
    return out


class Checker(HTMLParser):
    """Collects what the page would load, and whether its tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.labels: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(value) for name, value in attrs if name in ("src", "href") and value != "data:,"]
        self.labels += [str(value) for name, value in attrs if name == "aria-label"]
        if tag not in ("meta", "link", "rect", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "path", "circle"):
            assert self.open.pop() == tag


def test_page_is_whole_and_needs_no_network(swept: Path, tmp_path: Path) -> None:
    assert main(["report", str(swept), "--output-dir", str(tmp_path), "--quiet"]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.loads == []
    assert "<script" not in page
    assert "OutOfMemoryError: &lt;b&gt;" in page
    # quality against budget at two contexts; speed and memory against context; latencies; decode and throughput of
    # `speed`; perplexity, time and memory of streams
    assert len(checker.labels) == 2 + 2 + 1 + 2 + 3
    assert any("perplexity" in label and "at 48" in label for label in checker.labels)


def test_markdown_has_every_figure(swept: Path) -> None:
    text = reporting.markdown(reporting.read(swept))
    for part in text.split("## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1
    for row in reporting.read(swept).rows:
        if row.task == "perplexity":
            assert number(row.metrics["perplexity"]["value"]) in text
    assert "failed: needle" in text


def test_charts_for_papers(swept: Path, tmp_path: Path) -> None:
    assert main(["report", str(swept), "-o", str(tmp_path), "--images", str(tmp_path / "images"), "--quiet"]) == 0
    paths = list((tmp_path / "images").glob("*.svg"))
    assert len(paths) == 10
    for path in paths:
        text = path.read_text(encoding="utf8")
        assert "var(" not in text
        assert ElementTree.fromstring(text).attrib["role"] == "img"


def test_json_of_a_report(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(swept), "-o", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {row["strategy"] for row in printed["rows"]} == {"h2o", "liquid_fusion", "full", "reference"}


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_to_report(exists: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "results"
    if exists:
        folder.mkdir()
    assert main(["report", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_ticks_enclose_the_values() -> None:
    for low, high in ((0, 1), (3.2, 3.3), (0, 1e6), (5, 5), (0, 0), (-2, 7)):
        found = charts.ticks(low, high)
        assert found[0] <= low
        assert found[-1] >= high
        assert 2 <= len(found) <= 8


def test_every_series_differs_by_more_than_colour() -> None:
    series = [Series(f"s{i}", [Point(1, i), Point(10, i + 1, i, i + 2)], i) for i in range(9)]
    chart = Chart("t", "x", "y", series, reference=("full", Point(0, 3, 2, 4)))
    root = ElementTree.fromstring(chart.standalone())
    assert len(root.findall(".//{*}title")) == 9 * 2 + 1
    assert len(set(charts._DASHES)) == len(set(charts._MARKERS)) == 9


def test_speed_against_context_and_rows() -> None:
    figures = {
        "floor B=1, ms": 5.2,
        "ours, graph, ms": 7.9,
        "ours, compile, ms": 6.5,
        "copy rate, TB/s": 3.0,
        "DynamicCache 2048, ms": 60.0,
        "DynamicCache 131072, ms": 70.0,
        "StaticCache+compile 131072, ms": 75.0,
        "B=64, graph, tokens/s": 4000.0,
        "B=128, graph, tokens/s": 6000.0,
        "B=64, compile, tokens/s": 4100.0,
        "StaticCache B=3 at 131072, tokens/s": 15.0,
    }
    metadata = {"model_name": "m", "budget": 2048, "contexts": [131072, 2048]}
    section = curves.speed({"metadata": metadata, "figures": figures, "failures": {"memory": "too little"}})
    decode, throughput = section.charts.values()
    shown = {line.name: [(point.x, point.y) for point in line.points] for line in decode.series}
    assert shown == {
        "KVCache, compiled graph": [(2048, 6.5), (131072, 6.5)],
        "KVCache, graph": [(2048, 7.9), (131072, 7.9)],
        "DynamicCache": [(2048, 60), (131072, 70)],
        "StaticCache, compiled": [(131072, 75)],
    }
    assert decode.reference is not None
    assert decode.reference[1].y == 5.2
    shown = {line.name: [(point.x, point.y) for point in line.points] for line in throughput.series}
    assert shown == {
        "KVCache, compiled graph": [(64, 4100)],
        "KVCache, graph": [(64, 4000), (128, 6000)],
        "StaticCache at 128Ki": [(3, 15)],
    }
    assert len(section.body) == len(figures) + 1
    assert section.body[-1] == ["memory", "failed: too little"]


def test_report_of_speed_alone(swept: Path, tmp_path: Path) -> None:
    (path,) = swept.glob("speed_*.json")
    shutil.copy(path, tmp_path)
    assert main(["report", str(tmp_path), "--quiet"]) == 0
    assert "decode step of one sequence" in (tmp_path / "report.html").read_text(encoding="utf8")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_browser_shows_every_chart(swept: Path, tmp_path: Path) -> None:
    assert main(["report", str(swept), "-o", str(tmp_path), "--quiet"]) == 0
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    shown = subprocess.run(
        [*command, "--enable-logging=stderr", "--dump-dom", f"file://{tmp_path}/report.html"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert shown.stdout.count("<svg ") == 10
    assert "CONSOLE" not in shown.stderr
