"""Kept rows: found, refused, dropped, and there again after a restart."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakeengine import END, FakeEngine, State, service, tokenizer
from liquidfusion.exceptions import ConfigError
from liquidfusion.serving.conversations import Conversations, digest, digests
from liveserver import live
from test_serving_hostile import get, post

pytest.importorskip("prometheus_client")

A, B, C = ({"role": "user", "content": name} for name in "abc")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def outcomes(url: str) -> dict[str, int]:
    page = get(url, "/metrics")[1]
    found = re.findall(r'liquidfusion_conversations_total{outcome="(\w+)"} (\d+)', page)
    return {name: int(value) for name, value in found}


class Talk:
    """A conversation as a chat program holds it."""

    def __init__(self, url: str, **headers: str) -> None:
        self.url, self.headers, self.messages = url, headers, []  # type: ignore[var-annotated]

    def say(self, text: str, **more: Any) -> int:
        """One turn; how many tokens of its prompt were cached."""
        self.messages.append(user(text))
        status, answer = post(self.url, {"model": "fake", "messages": self.messages} | more, **self.headers)
        assert status == 200
        self.messages.append(answer["choices"][0]["message"])
        assert self.messages[-1]["content"] == f"You said: {text}"
        cached: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached < answer["usage"]["prompt_tokens"]
        return cached


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with live(service(engine, conversations=Conversations(10_000)), keys=("one", "two")) as url:
        yield url


def test_a_turn_reads_only_what_is_new(engine: FakeEngine, url: str) -> None:
    talk = Talk(url, Authorization="Bearer one")
    assert talk.say("hello") == 0
    read = engine.stats().prompt_tokens
    assert talk.say("and now") > 20
    added = "<|im_end|>\n<|im_start|>user\nand now<|im_end|>\n<|im_start|>assistant\n"
    assert engine.stats().prompt_tokens - read == len(tokenizer().encode(added))
    assert talk.say("more") > 60
    assert outcomes(url) == {"continued": 2}
    page = get(url, "/metrics")[1]
    assert "liquidfusion_conversations_kept 1.0" in page
    assert "liquidfusion_conversations_nbytes 1000.0" in page


def test_nobody_continues_what_another_key_said(url: str) -> None:
    talk = Talk(url, Authorization="Bearer one")
    talk.say("hello")
    talk.headers = {"Authorization": "Bearer two"}
    assert talk.say("again") == 0
    assert outcomes(url) == {}


def test_an_edited_message_is_read_again_and_counted(url: str) -> None:
    talk = Talk(url, Authorization="Bearer one")
    talk.say("hello")
    talk.say("there")
    talk.messages[2] = user("where")
    assert talk.say("now") == 0
    talk = Talk(url, Authorization="Bearer one")
    talk.say("hello")
    talk.messages[1] = {"role": "assistant", "content": "I never said that"}
    assert talk.say("again") == 0
    # The second talk began as the first did.
    assert outcomes(url) == {"continued": 1, "edited": 3}


def test_other_tools_are_another_conversation(url: str) -> None:
    talk = Talk(url, Authorization="Bearer one")
    talk.say("hello")
    tool = {"type": "function", "function": {"name": "f"}}
    assert talk.say("again", tools=[tool]) == 0
    assert talk.say("again", chat_template_kwargs={"mood": "good"}) == 0


def test_tokens_that_differ_are_read_again_and_counted() -> None:
    engine = FakeEngine()
    step = engine._finish

    def finish(request: Any, reason: str) -> str:
        step(request, reason)
        request.state = State((*request.state.tokens[:-1], END))
        return reason

    engine._finish = finish  # type: ignore[method-assign]
    with live(service(engine, conversations=Conversations(10_000))) as url:
        talk = Talk(url)
        talk.say("hello")
        assert talk.say("again") == 0
        assert outcomes(url) == {"retokenized": 1}


def test_nothing_is_kept_by_default(engine: FakeEngine) -> None:
    with live(service(engine)) as url:
        talk = Talk(url)
        talk.say("hello")
        assert talk.say("again") == 0
        assert outcomes(url) == {}


def test_a_conversation_survives_a_restart(tmp_path: Path) -> None:
    home = tmp_path / "talks"
    engine = FakeEngine()
    with live(service(engine, conversations=Conversations(10_000, directory=home, load=engine.load_state))) as url:
        talk = Talk(url)
        talk.say("hello")
        with pytest.raises(ConfigError, match="in use by another server"):
            Conversations(1000, directory=home, load=engine.load_state)
    assert oct(home.stat().st_mode & 0o777) == "0o700"
    assert {oct(path.stat().st_mode & 0o777) for path in home.iterdir()} == {"0o600"}
    assert "hello" not in "".join(path.name + path.read_text("latin1") for path in home.glob("*.json"))
    engine = FakeEngine()
    with live(service(engine, conversations=Conversations(10_000, directory=home, load=engine.load_state))) as url:
        talk.url = url
        assert talk.say("still there?") > 20
        assert outcomes(url) == {"continued": 1}


def kept(path: Path, *chains: list[str], budget: int = 10_000) -> Conversations:
    engine = FakeEngine()
    made = Conversations(budget, directory=path, load=engine.load_state)
    for chain in chains:
        made.keep(chain, State((1, 2, 3)))
    return made


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    first, second, third = (digests("", None, [one]) for one in (A, B, C))
    store = kept(tmp_path, first, second, budget=2000)
    assert store.find([*first, "x"], [1, 2, 3, 4])[1] == "continued"
    store.keep(third, State((1, 2, 3)))
    assert len(store) == 2
    assert store.nbytes == 2000
    assert store.find([*second, "x"], [1, 2, 3, 4]) == (None, None)
    assert store.find([*first, "x"], [1, 2, 3, 4])[1] == "continued"
    assert store.find([*first, "x"], [1, 2, 3]) == (None, "retokenized")
    assert store.find([*first, "x"], [1, 2, 4, 4]) == (None, "retokenized")
    store.close()
    assert len(list(tmp_path.glob("*.row"))) == 2
    again = kept(tmp_path, budget=2000)
    again.keep(second, State((1, 2, 3)))  # the third was used less recently than the first
    assert again.find([*first, "x"], [1, 2, 3, 4])[1] == "continued"
    assert again.find([*third, "x"], [1, 2, 3, 4]) == (None, None)
    again.keep(digests("", None, [A, B, C]), State(tuple(range(10)), nbytes=2001))
    assert len(again) == 2
    again.close()


def test_files_that_are_torn_or_foreign_are_dropped(tmp_path: Path) -> None:
    chains = [digests("", None, [one]) for one in (A, B, C)]
    kept(tmp_path, *chains).close()
    (tmp_path / f"{chains[0][-1]}.json").write_text("{")
    (tmp_path / f"{chains[1][-1]}.row").write_text("torn [")
    (tmp_path / "stray.row").write_text("x")
    store = kept(tmp_path)
    assert len(store) == 2
    assert not (tmp_path / "stray.row").exists()
    assert store.find([*chains[0], "x"], [1, 2, 3, 4]) == (None, None)
    assert store.find([*chains[1], "x"], [1, 2, 3, 4]) == (None, "unreadable")
    assert store.find([*chains[2], "x"], [1, 2, 3, 4])[1] == "continued"
    assert len(store) == 1
    assert len(list(tmp_path.glob("*.row"))) == 1
    store.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be kept"):
        kept(tmp_path / "talks")


def test_digests_tell_conversations_apart() -> None:
    chain = digests("me", None, [A, B])
    assert chain[1] == digest(chain[0], B)
    assert chain[0] == digests("me", None, [A])[0]
    assert chain[0] == digests("me", None, [A | {"name": None}])[0]
    assert len({*chain, *digests("you", None, [A, B]), *digests("me", [], [A, B]), *digests("me", None, [B, A])}) == 8
