"""An endless chat: what is fed, that history is never fed again, commands, and how it ends."""

from __future__ import annotations

import copy
import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TextStreamer

from benchmodel import directory, loaded
from liquidfusion.bench.caches import CacheOptions
from liquidfusion.bench.cli import main
from liquidfusion.bench.jobs import chatting
from liquidfusion.bench.jobs.chatting import Chat
from liquidfusion.bench.models import Loaded
from liquidfusion.exceptions import ConfigError

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[say] {% endif %}"
)
ROOMY = CacheOptions(budget=4096)


def model(template: str | None) -> Loaded:
    tokenizer = copy.deepcopy(loaded().tokenizer)
    tokenizer.chat_template = template
    return Loaded("tiny", loaded().model, tokenizer)


@pytest.fixture
def fed() -> Iterator[list[int]]:
    """Every token that goes through the model."""
    seen: list[int] = []
    embedding = loaded().model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, inputs, __: seen.extend(inputs[0][0].tolist()))
    yield seen
    hook.remove()


@pytest.mark.parametrize("system", [None, "be brief"])
def test_what_is_fed_is_the_template_of_the_whole_conversation(fed: list[int], system: str | None) -> None:
    chosen = model(TEMPLATE)
    chat = Chat(chosen, ROOMY, system=system, max_tokens=5)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for text in ("hello", "who are you?", "and why?"):
        start = len(fed)
        answer = chat.say(text)
        assert answer.fed + answer.written == len(fed) - start
        # raw, since the answer that is told is stripped
        written = chosen.tokenizer.decode(fed[len(fed) - answer.written :])
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": written}]
    whole = chosen.tokenizer.apply_chat_template(messages, tokenize=False)
    assert chosen.tokenizer.decode(fed) == whole.removesuffix("\n").replace("[assistant]", "[say]")
    assert chat.cache.get_seq_length() == len(fed)


def test_answers_are_transformers_greedy() -> None:
    chosen = model(TEMPLATE)
    chat = Chat(chosen, ROOMY, max_tokens=12)
    shown = chosen.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    ids = torch.tensor([chosen.tokenizer(shown).input_ids])
    expected = chosen.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    text = chosen.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert chat.say("hello").text == text
    chat.say("again")
    chat.reset()
    assert chat.say("hello").text == text


def test_memory_does_not_grow() -> None:
    chat = Chat(model(None), CacheOptions(budget=32), max_tokens=20)
    chat.say("x" * 40)
    size = chat.cache.nbytes
    for turn in range(6):
        chat.say(f"question number {turn}?")
    assert chat.cache.nbytes == size
    assert chat.cache.evictions > 0
    assert int((chat.cache.positions(0)[0, 0] >= 0).sum()) == 32


def test_without_a_template_turns_are_lines(fed: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    chosen = model(None)
    chat = Chat(chosen, ROOMY, system="A talk.", max_tokens=3)
    answer = chat.say("hello", TextStreamer(chosen.tokenizer))
    assert capsys.readouterr().out.strip() == answer.text
    chat.say("again")
    text = chosen.tokenizer.decode(fed)
    assert text.startswith("A talk.\n\nUser: hello\nAssistant:")
    assert text.count("A talk.") == 1
    assert "\nUser: again\nAssistant:" in text


def test_saved_and_loaded_chat_goes_on_as_if_it_had_not_ended(tmp_path: Path) -> None:
    chosen, cache, path = model(TEMPLATE), CacheOptions(budget=64), tmp_path / "talk.safetensors"
    whole = Chat(chosen, cache, max_tokens=8)
    first = Chat(chosen, cache, max_tokens=8)
    assert whole.say("hello").text == first.say("hello").text
    first.save(path)
    second = Chat(chosen, CacheOptions.of(threads=1), session=path, max_tokens=8)
    assert second.cache.get_seq_length() == first.cache.get_seq_length()
    for text in ("who are you, and what is it that you keep?", "and why?"):
        one, other = whole.say(text), second.say(text)
        assert (one.text, one.fed) == (other.text, other.fed)
    assert second.cache.spec.budget == 64


def test_save_and_load_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talk.safetensors"
    chat = ["chat", "-m", str(directory()), "--device", "cpu", "--max-tokens", "4", "--json"]

    def talk(text: str, *arguments: str) -> list[Any]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert main([*chat, *arguments]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    (first,) = talk("hello\n", "--budget", "48", "--save", str(path))
    (second,) = talk("again\n", "--load", str(path), "--save", str(path))
    assert second["budget"] == 48
    assert second["seen"] > first["seen"]
    talk("", "--save", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--load", "missing"], "cannot read missing"),
        (["--load", "{path}", "--budget", "32"], "budget"),
        (["--load", "{path}", "-s", "h2o"], "strategy"),
        (["--load", "{path}", "--sink-size", "2"], "sink_size"),
        (["--load", "{path}", "--positions", "auto"], "positions"),
        (["--load", "{path}", "--system", "x"], "system"),
    ],
)
def test_what_a_session_decides_itself(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talk").write_bytes(b"")
    told = [word.format(path=tmp_path / "talk") for word in arguments]
    assert main(["chat", "-m", str(directory()), "--device", "cpu", *told]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", "refuses.*System role not supported"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "changes answers"),
    ],
)
def test_templates_that_do_not_serve(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Chat(model(template), ROOMY)


class Terminal(io.StringIO):
    """Where somebody types."""

    def isatty(self) -> bool:
        return True


def command(monkeypatch: pytest.MonkeyPatch, text: str | Terminal, *arguments: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text) if isinstance(text, str) else text)
    chat = ["chat", "--model", str(directory()), "--device", "cpu", "--budget", "32", "--max-tokens", "4"]
    return main([*chat, *arguments])


def test_piped_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "hello\n\n/stats\n/dance\n/reset\nhello\n/quit\nunread\n") == 0
    shown = capsys.readouterr()
    assert shown.out.count("> hello") == 2
    assert "unread" not in shown.out
    first, second = shown.out.split("> hello\n")[1:]
    assert first == second
    assert "at most 32 kept" in shown.err
    assert "/dance: /reset" in shown.err
    assert "anew" in shown.err


def test_json_and_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "hello\nagain", "--json") == 0  # the end of the input ends it politely
    turns = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [turn["user"] for turn in turns] == ["hello", "again"]
    assert turns[1]["seen"] == sum(turn["tokens"] for turn in turns)
    assert turns[0]["cache_bytes"] == turns[1]["cache_bytes"]
    assert command(monkeypatch, "hello\n", "--quiet") == 0
    shown = capsys.readouterr()
    assert "> " not in shown.out
    assert shown.out.strip() == turns[0]["assistant"]
    assert shown.err == ""


def test_typed_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(["hello"])

    def typed(prompt: str) -> str:
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    assert command(monkeypatch, Terminal()) == 0
    assert "Ctrl-D" in capsys.readouterr().out


def test_ctrl_c_ends_the_answer_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    put = TextStreamer.put

    def pressed(self: TextStreamer, value: torch.Tensor) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        put(self, value)

    monkeypatch.setattr(chatting.TextStreamer, "put", pressed)
    assert command(monkeypatch, "hello\n/stats\nagain\n", "--max-tokens", "1000") == 0
    assert "1 tokens in" in capsys.readouterr().err


def test_percentage_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "hello", "--cache-size", "20") == 2
    assert "--cache-size" in capsys.readouterr().err
