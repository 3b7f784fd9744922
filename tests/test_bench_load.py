"""`load` against the fake engine: what it counts is what happened."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakeengine import FakeEngine, service
from liquidfusion.bench.cli import main
from liquidfusion.bench.jobs.loading import Due, Lengths, Target, arrivals, metrics, run, text, trace
from liquidfusion.bench.report.curves import loads
from liquidfusion.bench.terminal.output import number
from liquidfusion.exceptions import ConfigError
from liveserver import live

pytest.importorskip("prometheus_client")


def test_lengths() -> None:
    source = random.Random(0)
    assert {Lengths("7").draw(source) for _ in range(5)} == {7}
    assert {Lengths("3-5").draw(source) for _ in range(50)} == {3, 4, 5}
    drawn = [Lengths("lognormal:200,0.5").draw(source) for _ in range(2000)]
    assert 180 < np.median(drawn) < 220
    assert 0.45 < np.std(np.log(drawn)) < 0.55
    for wrong in ("", "0", "5-3", "x", "lognormal:5", "1,2"):
        with pytest.raises(ConfigError, match="accepted"):
            Lengths(wrong)


def test_arrivals() -> None:
    one = Lengths("1")
    due = [due.at for due in arrivals(4000, one, one, rate=20)]
    gaps = np.diff(due)
    assert due[0] == 0
    assert 0.045 < gaps.mean() < 0.055
    assert 0.9 < gaps.std() / gaps.mean() < 1.1  # as of a Poisson process
    assert np.allclose(np.diff([due.at for due in arrivals(9, one, one, rate=4, even=True)]), 0.25)
    assert {due.at for due in arrivals(3, one, one, rate=None)} == {0.0}
    assert arrivals(9, one, Lengths("1-99"), rate=1, seed=3) == arrivals(9, one, Lengths("1-99"), rate=1, seed=3)


def test_traces(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 2500, "input_length": 7, "output_length": 3, "hash_ids": [1]}, {"timestamp": 500}]
    path.write_text(json.dumps(lines[0]) + "\n\n" + json.dumps(lines[0] | {"timestamp": 500}) + "\n")
    assert trace(path) == [Due(0.0, 7, 3), Due(2.0, 7, 3)]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ConfigError, match=":2 is no request"):
        trace(path)
    path.write_text("")
    with pytest.raises(ConfigError, match="no requests"):
        trace(path)


def test_prompts_have_no_beginning_in_common() -> None:
    texts = [text(20, 0, number) for number in range(20)]
    assert len({words.split()[0] + words.split()[1] for words in texts}) > 15
    assert text(20, 0, 1) == texts[1]
    assert {len(words.split()) for words in texts} == {20}


@pytest.mark.parametrize("chat", [True, False])
def test_what_is_told_is_what_was(chat: bool) -> None:
    engine = FakeEngine(rows=4, delay=0.01)
    with live(service(engine)) as url:
        target = Target(url=f"{url}/v1", model="fake", chat=chat)
        plan = arrivals(20, Lengths("5-9"), Lengths("10-20"), rate=20)
        records, seconds = asyncio.run(run(target, plan))
    found = {name: metric.value for name, metric in metrics(records, seconds).items()}
    assert found["answered"] == found["requests"] == 20
    assert [record.tokens for record in records] == [due.answer for due in plan]
    assert engine.stats().tokens == sum(due.answer for due in plan)
    assert engine.stats().prompt_tokens == sum(record.prompt_tokens for record in records)
    for record, due in zip(records, plan, strict=True):
        assert record.at == pytest.approx(due.at)
        assert record.sent < record.first < record.last < 5  # type: ignore[operator]
        assert len(record.gaps) <= due.answer - 1
    assert found["tokens_per_second"] == pytest.approx(engine.stats().tokens / seconds)
    assert 10 <= found["between_tokens_p50"] < 60
    assert found["time_to_first_token_p50"] <= found["time_to_first_token_p90"] <= found["time_to_first_token_p99"]


def test_a_stall_is_not_hidden_by_waiting_to_ask() -> None:
    engine = FakeEngine(rows=1, delay=0.02)
    with live(service(engine)) as url:
        plan = arrivals(10, Lengths("3"), Lengths("10"), rate=1000)
        records, _ = asyncio.run(run(Target(url=f"{url}/v1", model="fake"), plan))
        closed, _ = asyncio.run(run(Target(url=f"{url}/v1", model="fake"), plan, concurrency=1))
    assert max(record.first or 0 for record in records) > 1.5
    assert max(record.first or 0 for record in closed) < 1.0


def test_refusals_and_failures_are_counted() -> None:
    engine = FakeEngine(rows=1, queue_limit=2, delay=0.02)
    with live(service(engine)) as url:
        plan = arrivals(10, Lengths("3"), Lengths("10"), rate=None)
        records, seconds = asyncio.run(run(Target(url=f"{url}/v1", model="fake"), plan))
        found = {name: metric.value for name, metric in metrics(records, seconds).items()}
        assert found["refused"] > 0
        assert found["answered"] + found["refused"] == 10
        assert all("busy" in (record.error or "") for record in records if record.status == 429)
        engine.fail = RuntimeError("out of order")
        records, seconds = asyncio.run(run(Target(url=f"{url}/v1", model="fake"), plan[:2]))
        assert metrics(records, seconds)["failed"].value == 2
    records, seconds = asyncio.run(run(Target(url=f"{url}/v1", model="fake"), plan[:2]))
    assert metrics(records, seconds)["failed"].value == 2
    assert all("Connect" in (record.error or "") for record in records)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with live(service(), keys=("secret",)) as url:
        common = ["load", f"{url}/v1", "-m", "fake", "--requests", "6", "-o", str(tmp_path)]
        assert main([*common, "--api-key", "secret", "--max-tokens", "4"]) == 0
        out = capsys.readouterr().out
        assert "time to first token, p50 / p90 / p99" in out
        (path,) = tmp_path.glob("load_fake_*.json")
        document: Any = json.loads(path.read_text())
        assert document["metadata"]["task"] == "load"
        assert document["metrics"]["answered"]["value"] == 6
        assert [record["tokens"] for record in document["results"]] == [4] * 6
        (section,) = loads([document])
        assert (section.title, section.subject) == ("load", "servers")
        # Every figure of a line is the run's own.
        figures = [name.replace(" ", "_") for name in section.header[1:]]
        (line,) = section.body
        assert figures[-2:] == ["refused", "failed"]
        told = [document["metrics"][name] for name in figures]
        assert line == ["fake", *(number(metric["value"], metric["unit"]) for metric in told)]
        assert line[-2:] == ["0", "0"]
        assert main(["report", str(tmp_path), "--output-dir", str(tmp_path / "report")]) == 0
        report = (tmp_path / "report" / "report.md").read_text("utf8")
        assert all(f" {cell} |" in report for cell in (*section.header, *line))
        capsys.readouterr()
        assert main([*common, "--json", "--api-key", "secret", "--rate", "100", "--max-tokens", "4"]) == 0
        other = json.loads(capsys.readouterr().out)
        assert other["metadata"]["task_options"]["rate"] == 100
        # Two runs are told apart by what differs between them, and by nothing else.
        (section,) = loads([document, other])
        assert [line[0] for line in section.body] == ["fake, concurrency 8", "fake, rate 100.0"]
        assert main([*common, "--api-key", "wrong"]) == 1
        assert "Incorrect API key" in capsys.readouterr().err
        assert main([*common, "--rate", "1", "--concurrency", "1"]) == 2
        assert main(["load", "ftp://x", "-o", str(tmp_path)]) == 2
