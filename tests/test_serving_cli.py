"""The command `liquidfusion`: help, bad values, a server from start to stop, and a chat program that talks to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from liquidfusion.exceptions import ConfigError
from liquidfusion.serving import cli, launch
from test_serving_hostile import get, post

pytest.importorskip("prometheus_client")

HERE = Path(__file__).parent
START = """
import sys, fakeengine
from liquidfusion.serving import cli, launch
from liquidfusion.serving.conversations import Conversations

def build(settings):
    print(settings, file=sys.stderr)
    return fakeengine.service(conversations=Conversations(settings.conversations))

launch.build = build
sys.exit(cli.main(sys.argv[1:]))
"""


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["serve", "--help"]):
        assert cli.main(arguments) in (0, 2)
        assert "Usage" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert "version=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "four"], "bits 'four'"),
        (["--bits", "4,4,4"], "bits '4,4,4'"),
        (["--rows", "0"], "rows '0'"),
        (["--conversations", "8 stones"], "8 stones"),
        (["--max-body", "x"], "size 'x'"),
        (["--parameter", "sink_size"], "NAME=VALUE"),
        (["--port", "70000"], "65535"),
        (["--nonsense"], "nonsense"),
        (["nowhere/at/all/.."], "nowhere"),
    ],
)
def test_bad_values_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", *arguments]) in (1, 2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error


def test_packages_that_are_missing_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert cli.main(["serve"]) == 1
    assert capsys.readouterr().err == "error: serve needs uvicorn: pip install 'liquidfusion[serve]'\n"


def test_sizes() -> None:
    for text, value in {"0": 0, "12": 12, "1 kB": 1000, "8GiB": 2**33, "1.5 MiB": 3 * 2**19, "2g": 2 * 10**9}.items():
        assert launch.size(text) == value
    assert launch.precision("4") == 4
    assert launch.precision("8, 4") == (8, 4)
    assert launch.precision(None) is None


def test_rows_are_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.rows_that_fit(torch.device("cpu"), 10**9) == launch.CPU_ROWS
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 * 10**9, 80 * 10**9))
    assert launch.rows_that_fit(torch.device("cuda"), 10**9) == 50
    assert launch.rows_that_fit(torch.device("cuda"), 10**7) == launch.MOST_ROWS
    with pytest.raises(ConfigError, match=r"not one row of 51\.00 GB"):
        launch.rows_that_fit(torch.device("cuda"), 51 * 10**9)


def test_the_makers_parameters() -> None:
    class Model:
        generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[1, 2])

    assert launch.defaults(Model) == {"temperature": 0.6, "top_p": 0.9}
    Model.generation_config = GenerationConfig(eos_token_id=1)
    assert launch.defaults(Model) == {}


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            START,
            "serve",
            "--port",
            "0",
            "--rows",
            "3",
            "--bits",
            "8,4",
            "--parameter",
            "sink_size=8",
        ],
        env=environment | {cli.KEY: "one two"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"(http://127\.0\.0\.1:\d+)/v1", line):
                yield process, found[1], said
                break
        else:
            pytest.fail(said)
    finally:
        process.kill()
        process.communicate()


def test_a_server_and_its_settings(running: Any) -> None:
    _, url, said = running
    for part in ("rows=3", "bits=(8, 4)", "'sink_size': 8", "conversations=1073741824", "fake at http", "8 rows"):
        assert part in said
    assert get(url, "/health")[0] == 200
    chat = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
    assert post(url, chat)[0] == 401
    assert post(url, chat, Authorization="Bearer two")[0] == 200


def test_a_chat_program(running: Any, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    _, url, _ = running
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: local\n  model_name: fake\n  api_base: {url}/v1\n  api_key_name: here\n  can_stream: true\n"
    )
    (tmp_path / "keys.json").write_text('{"here": "one"}')
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "PYTHONWARNINGS": "ignore", "LLM_LOAD_PLUGINS": ""}
    for more in ([], ["--continue", "--no-stream"], ["-o", "temperature", "0.5", "-o", "seed", "3"]):
        done = subprocess.run(
            [sys.executable, "-m", "llm", "-m", "local", "Grüße", *more],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(r"[a-h]{12}" if more[:1] == ["-o"] else r"You said: Grüße", done.stdout.strip())
    page = get(url, "/metrics")[1]
    assert 'liquidfusion_conversations_total{outcome="continued"} 1.0' in page


def test_it_stops_in_good_order(running: Any) -> None:
    process, _, _ = running
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
