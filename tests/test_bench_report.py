"""The report: what it reads, the page, the tables, the charts."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmodel import directory
from liquidfusion.bench.cli import main
from liquidfusion.bench.report import charts, compare, curves, export, page, rows, sections
from liquidfusion.bench.report.charts import Chart, Point, Series
from liquidfusion.bench.terminal.output import number

CHARTS = 14


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
        self.labels += [str(value) for name, value in attrs if tag == "svg" and name == "aria-label"]
        if tag not in ("meta", "link", "rect", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "path", "circle"):
            assert self.open.pop() == tag


def test_page_is_whole_and_needs_no_network(swept: Path, tmp_path: Path) -> None:
    assert main(["report", str(swept), "--output-dir", str(tmp_path), "--quiet"]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf8")
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.loads == []
    assert "OutOfMemoryError: &lt;b&gt;" in text
    # quality against budget, bytes and speed at two contexts; speed and memory against context; latencies; decode and
    # throughput of `speed`; perplexity, time and memory of streams
    assert len(checker.labels) == CHARTS == 2 * 3 + 2 + 1 + 2 + 3
    assert any("perplexity" in label and "at 48" in label for label in checker.labels)


def test_markdown_has_every_figure(swept: Path) -> None:
    found = rows.read(swept)
    text = page.markdown(page.sections(found), found.errors)
    for part in text.split("## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1
    for row in found.rows:
        if row.task == "perplexity":
            assert number(row.metrics["perplexity"]["value"]) in text
    assert "failed: needle" in text


def test_charts_for_papers(swept: Path, tmp_path: Path) -> None:
    assert main(["report", str(swept), "-o", str(tmp_path), "--images", str(tmp_path / "images"), "--quiet"]) == 0
    paths = list((tmp_path / "images").glob("*.svg"))
    assert len(paths) == CHARTS
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


OLDER = {
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
NEWER = {
    "floor of a step with one row, weights and slots read once at a copy's rate, ms": 5.2,
    "a step of KVCache with one row, replayed from a CUDA graph, ms": 7.9,
    "a step of KVCache with one row, compiled and replayed from a CUDA graph, ms": 6.5,
    "a copy's reads and writes, TB/s": 3.0,
    "a step of DynamicCache with one row at 2048 tokens, ms": 60.0,
    "a step of DynamicCache with one row at 131072 tokens, ms": 70.0,
    "a step of StaticCache with one row at 131072 tokens, compiled, ms": 75.0,
    "throughput of KVCache with 64 rows, replayed from a CUDA graph, tokens/s": 4000.0,
    "throughput of KVCache with 128 rows, replayed from a CUDA graph, tokens/s": 6000.0,
    "throughput of KVCache with 64 rows, compiled and replayed from a CUDA graph, tokens/s": 4100.0,
    "throughput of StaticCache with 3 rows at 131072 tokens, tokens/s": 15.0,
}


@pytest.mark.parametrize("figures", [OLDER, NEWER])
def test_speed_against_context_and_rows(figures: dict[str, float]) -> None:
    metadata = {"model_name": "m", "budget": 2048, "contexts": [131072, 2048], "dtype": "bfloat16"}
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
    assert [line[0] for line in section.body[:2]] == list(NEWER)[:2]
    assert len(section.body) == len(figures) + 1
    assert section.body[-1] == ["memory", "failed: too little"]


def test_speed_with_codes_and_without_a_graph() -> None:
    figures = {
        "a step of KVCache(bits=(8, 4)) with one row, ms": 50.0,
        "throughput of KVCache(bits=(8, 4)) with one row, tokens/s": 20.0,
        "throughput of KVCache(bits=(8, 4)) with 64 rows, tokens/s": 200.0,
        "roofline of any exact engine at 2048 tokens, 16 rows in memory, tokens/s": 90.0,
        "roofline of any exact engine at 131072 tokens, 0 rows in memory, tokens/s": 0.0,
        "one row of KVCache(bits=(8, 4)), bytes": 12345,
    }
    metadata = {"model_name": "m", "budget": 16, "bits": [8, 4], "contexts": [2048], "dtype": "float32"}
    section = curves.speed({"metadata": metadata, "figures": figures, "failures": {}})
    assert "budget 16 at 8 and 4 bits" in section.subject
    assert section.body[-1][1] == "12,345"
    decode, throughput = (
        {line.name: [(point.x, point.y) for point in line.points] for line in chart.series}
        for chart in section.charts.values()
    )
    assert decode == {"KVCache": [(2048, 50)]}
    assert throughput == {"KVCache": [(1, 20), (64, 200)], "roofline of any exact engine at 2048": [(16, 90)]}


def made(strategy: str = "h2o", value: float = 5.0, *, held: int = 100, seconds: float = 1.0, **facts: Any) -> rows.Row:
    """A row of perplexity, of four samples."""
    losses = [math.log(value) + change for change in (-0.1, 0.0, 0.05, 0.05)]
    budgets = [] if strategy == "full" else [facts.get("budget", 64)]
    metadata = {
        "model_name": "m",
        "task": "perplexity",
        "strategy": strategy,
        "cache_size": None,
        "budget": 64,
        "seed": 0,
        "dtype": "float32",
        "device": "cpu",
        "budgets_used": budgets,
        "machine": {"processor": "p"},
        "versions": {},
    } | facts
    item = {
        "request": {"prompt": facts.get("prompt", "x"), "tokens": 128},
        "result": {
            "scores": {"cache_bytes": held, "nll": losses, "counts": [64] * 4},
            "request_time": {"batch_time": seconds, "batch_size": 1},
        },
    }
    metrics = {"perplexity": {"value": value}, "tokens_per_second": {"value": 128 / seconds}}
    return rows.row({"metadata": metadata, "results": [item], "metrics": metrics})


def test_sizes_asked_for_in_bytes_are_the_columns() -> None:
    """Methods that hold unlike numbers of tokens in the same bytes stand under each other, the smallest size first."""
    asked = [("h2o", 8192, 40), ("streaming", 8192, 60), ("h2o", 1024, 5), ("streaming", 1024, 7)]
    found = [made(name, 5.0, memory=memory, budget=tokens) for name, memory, tokens in asked]
    (block,) = rows.blocks([*found, made("full", 4.0)])
    section = sections.section(block)
    assert section.header == ["cache", "1KiB", "8KiB"]
    assert all(len(line) == 3 and all(line) for line in section.body)


def test_servers_are_reported(tmp_path: Path) -> None:
    for rate in (2, 4):
        metadata = {"task": "load", "model_name": "m", "url": "u", "task_options": {"rate": rate}, "versions": {}}
        metrics = {"tokens_per_second": {"value": 100.0 * rate, "unit": "tokens/s"}}
        document = {"metadata": metadata, "results": [{"status": 200}], "metrics": metrics}
        (tmp_path / f"load_{rate}.json").write_text(json.dumps(document), encoding="utf8")
    assert main(["report", str(tmp_path), "--quiet"]) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf8")
    assert "| m, rate 2 |  | 200 tokens/s |" in text
    assert "| m, rate 4 |  | 400 tokens/s |" in text


def test_front_is_what_nothing_beats() -> None:
    full, small = made("full", 4.0, held=1000), made(value=5.0, held=100)
    worse, slow = made("local", 6.0, held=100), made("tova", 4.5, held=100, seconds=2.0)
    found = rows.front([full, small, worse, slow], lower=True)
    assert [row.strategy for row in found] == ["full", "h2o", "tova"]
    # by brute force: every row that is not on the front is beaten by one that is
    assert rows.front([worse, small], lower=True) == [small]
    assert rows.front([worse, small], lower=False) == [worse]
    assert rows.front([full, full], lower=True) == [full, full]


def test_quality_against_bytes() -> None:
    sizes = ((16, 8.0, 50), (32, 6.0, 100), (64, 5.0, 200), (128, 5.5, 400))
    group = [made("full", 4.0, held=1600)]
    group += [made("h2o", value, held=held, budget=budget) for budget, value, held in sizes]
    group += [made("streaming", 5.6, held=50, budget=16)]
    (block,) = rows.blocks(rows.together(group))
    charted = page.section(block).charts
    chart = charted["perplexity-m-bytes-128"]
    assert chart.x_label == "bytes held (% of the full cache)"
    lines = {line.name: [(p.x, p.y) for p in line.points] for line in chart.series}
    assert lines["h2o"] == [(3.125, 2.0), (6.25, 1.5), (12.5, 1.25), (25.0, 1.375)]
    assert lines["best up to this size"] == [(3.125, 1.4), (12.5, 1.25)]
    assert chart.reference is not None
    assert chart.reference[1].y == 1.0
    trade = charted["perplexity-m-trade-128"]
    ringed = {(line.name, p.y) for line in trade.series for p in line.points if p.ring}
    assert ringed == {("full cache", 4.0), ("streaming", 5.6), ("h2o", 5.0)}
    assert page.section(block).more is not None


def test_variants_of_a_strategy_are_lines_of_their_own() -> None:
    group = [made(bits=bits, budget=budget) for bits in (None, [4, 4], [4, 2]) for budget in (32, 64)]
    (block,) = rows.blocks(rows.together([*group, made("full", 4.0)]))
    assert list(block.methods()) == ["full cache", "h2o", "h2o, 4 bits", "h2o, 4,2 bits"]
    series = page.section(block).charts["perplexity-m-perplexity-128"].series
    assert len({(line.look, line.dash) for line in series}) == 3


def test_exports_have_every_fact(tmp_path: Path) -> None:
    found = [made(bits=[4, 2]), made("full", 4.0)]
    export.write_csv(found, tmp_path / "a.csv")
    read = list(csv.DictReader((tmp_path / "a.csv").read_text(encoding="utf8").splitlines()))
    assert len(read) == 2 * 2
    assert [line["set_bits"] for line in read if line["metric"] == "perplexity"] == ["4,2", ""]
    assert {line["with_dtype"] for line in read} == {"float32"}
    assert [float(line["value"]) for line in read if line["metric"] == "perplexity"] == [5.0, 4.0]


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    export.write_parquet([made(bits=[4, 2]), made("full", 4.0)], tmp_path / "a.parquet")
    read = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert [line["value"] for line in read if line["metric"] == "perplexity"] == [5.0, 4.0]


def test_png(swept: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    assert main(["report", str(swept), "-o", str(tmp_path), "--png", "--quiet"]) == 0
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) == CHARTS
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_comparison_tells_what_differs() -> None:
    first = [made("full", 4.0, dtype="float32"), made("h2o", 5.0, dtype="float32")]
    second = [made("full", 4.0, dtype="bfloat16"), made("h2o", 5.5, dtype="bfloat16")]
    found = compare.compare(first, second)
    assert found.between == {"dtype": ("float32", "bfloat16")}
    assert found.alone == ([], [])
    full, h2o = found.pairs
    assert (full.change, full.low, full.high, full.verdict) == (1.0, 1.0, 1.0, "")
    # the same samples, all worse by one factor: what they have in common cancels
    assert h2o.paired
    assert h2o.change == pytest.approx(1.1)
    assert h2o.low == h2o.high == pytest.approx(1.1)
    assert h2o.verdict == "worse"
    other = compare.compare(first, [made("h2o", 5.5, dtype="bfloat16", prompt="y")])
    (pair,) = other.pairs
    assert not pair.paired
    assert pair.low is not None
    assert pair.high is not None
    assert pair.low < 1.1 < pair.high
    assert [row.strategy for row in other.alone[0]] == ["full"]


def test_comparison_of_bits_and_of_repeats() -> None:
    found = compare.compare([made("full", 4.0), made(bits=None)], [made("full", 4.0), made(bits=[4, 4])])
    assert found.between == {"bits": ("not set", "4")}
    assert len(found.pairs) == 2
    speeds = [rows.together([made(value=v) for v in values]) for values in ((5.0, 5.2), (6.0, 6.2))]
    (pair,) = compare.compare(*speeds).pairs
    assert pair.one.repeats == 2
    assert pair.change == pytest.approx(6.1 / 5.1)


def test_comparison_on_the_command_line(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for path in swept.glob("*_h2o_*.json"):
        text = path.read_text(encoding="utf8").replace('"dtype": "float32"', '"dtype": "float16"')
        (half / path.name).write_text(text, encoding="utf8")
    assert main(["report", str(swept), str(half), "-o", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert f"dtype: float32 in {swept}, float16 in {half}" in shown.out
    assert f"only in {swept}" in shown.out
    assert "else.json: not a result" in shown.err
    checker = Checker()
    checker.feed((tmp_path / "comparison.html").read_text(encoding="utf8"))
    assert checker.open == []
    assert main(["report", str(swept), str(half), "-o", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {pair["strategy"] for pair in printed["pairs"]} == {"h2o"}
    assert all(pair["change"] == 1.0 for pair in printed["pairs"] if pair["kind"] == "ratio")


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
    assert shown.stdout.count("<svg ") == CHARTS
    assert shown.stdout.count('role="button"') > CHARTS
    assert "CONSOLE" not in shown.stderr
