"""The server over a real engine and a tiny model: answers are the engine's, and turns that continue change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import benchmodel
from fakeengine import TEMPLATE
from liquidfusion.hf.engine import Engine, end_tokens
from liquidfusion.run.sampling import Sampling
from liquidfusion.serving.conversations import Conversations
from liveserver import live
from test_serving_conversations import outcomes, user
from test_serving_hostile import get, post

pytest.importorskip("prometheus_client")


@pytest.fixture
def make() -> Callable[..., Any]:
    """Makes a service."""
    from liquidfusion.serving.service import Service

    loaded = benchmodel.loaded()
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = TEMPLATE

    def made(engine: Engine, conversations: Conversations | None = None) -> Any:
        ends = frozenset(end_tokens(loaded.model, tokenizer))
        return Service(engine, tokenizer, name="tiny", ends=ends, conversations=conversations)

    return made


# Special tokens are no text: an answer with one is not what its sender gives back.
PLAIN = {"max_tokens": 20, "temperature": 0, "logit_bias": {"0": -100, "1": -100}}


def engine(budget: int = 2048) -> Engine:
    loaded = benchmodel.loaded()
    return Engine(loaded.model, rows=2, budget=budget, tokenizer=loaded.tokenizer, chunk=64, queue_limit=8)


def talk(url: str, *texts: str, **more: Any) -> tuple[list[str], list[int]]:
    """Answers, and how many tokens were cached for each."""
    messages, answers, cached = [], [], []
    for text in texts:
        messages.append(user(text))
        status, answer = post(url, {"model": "tiny", "messages": messages} | PLAIN | more)
        assert status == 200, answer
        messages.append(answer["choices"][0]["message"])
        answers.append(messages[-1]["content"])
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    return answers, cached


def test_answers_are_the_engines(make: Callable[..., Any]) -> None:
    own, loaded = engine(budget=32), benchmodel.loaded()
    ids = loaded.tokenizer.encode("Once upon a time " * 8)
    with live(make(own)) as url:
        for sampling in (Sampling(max_tokens=30), Sampling(max_tokens=30, temperature=0.9, top_p=0.8, seed=5)):
            made = own.submit(ids, sampling)
            (request,) = made if isinstance(made, list) else [made]
            expected = loaded.tokenizer.decode([token.id for token in request], skip_special_tokens=True)
            asked = {
                "max_tokens": 30,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": sampling.seed,
            }
            status, answer = post(url, {"model": "tiny", "prompt": ids} | asked, "/v1/completions")
            assert (status, answer["choices"][0]["text"]) == (200, expected)
        status, answer = post(url, {"model": "tiny", "prompt": ids, "n": 3}, "/v1/completions")
        assert status == 400
        assert "n=3" in answer["error"]["message"]
        assert "liquidfusion_evictions_total 0.0" not in get(url, "/metrics")[1]


def test_a_turn_that_continues_says_what_reading_again_says(make: Callable[..., Any], tmp_path: Path) -> None:
    texts = "hello", "and now", "more"
    with live(make(engine())) as url:
        expected, cached = talk(url, *texts)
    assert cached == [0, 0, 0]
    own = engine()
    with live(make(own, Conversations(2**26, directory=tmp_path, load=own.load_state))) as url:
        answers, cached = talk(url, *texts)
        assert outcomes(url) == {"continued": 2}
    assert answers == expected
    assert cached[0] == 0 < cached[1] < cached[2]
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o600"}
    own = engine()
    with live(make(own, Conversations(2**26, directory=tmp_path, load=own.load_state))) as url:
        messages = []
        for text, answer in zip(texts, answers, strict=True):
            messages += [user(text), {"role": "assistant", "content": answer}]
        body = {"model": "tiny", "messages": [*messages, user("last")]} | PLAIN
        after = post(url, body)[1]
        assert outcomes(url) == {"continued": 1}
    with live(make(engine())) as url:
        again = post(url, body)[1]
    assert after["choices"] == again["choices"]
    assert after["usage"]["prompt_tokens_details"]["cached_tokens"] > cached[2]


def test_a_row_of_another_budget_is_read_again(make: Callable[..., Any], tmp_path: Path) -> None:
    own = engine(budget=64)
    with live(make(own, Conversations(2**26, directory=tmp_path, load=own.load_state))) as url:
        answers, _ = talk(url, "hello")
    own = engine(budget=128)
    with live(make(own, Conversations(2**26, directory=tmp_path, load=own.load_state))) as url:
        body = [user("hello"), {"role": "assistant", "content": answers[0]}, user("again")]
        status, _ = post(url, {"model": "tiny", "messages": body, "max_tokens": 5})
        assert status == 200
        assert outcomes(url) == {"unreadable": 1}
