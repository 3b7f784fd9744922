"""The server as the unmodified `openai` package sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from fakeengine import FakeEngine, echo, service
from liveserver import live

openai = pytest.importorskip("openai")
pytest.importorskip("prometheus_client")

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def script(prompt: str, sampling: Any, index: int) -> str:
    if "Tools:" in prompt and "<|im_start|>tool" not in prompt:
        return 'Let me see. <tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    return echo(prompt, sampling, index)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live(service(FakeEngine(script=script))) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def ask(client: Any, text: str = "Grüße, 世界!", **more: Any) -> Any:
    return client.chat.completions.create(model="fake", messages=[{"role": "user", "content": text}], **more)


def test_chat(client: Any) -> None:
    answer = ask(client)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == "You said: Grüße, 世界!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert answer.usage.completion_tokens == len("You said: Grüße, 世界!".encode()) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_text_parts_are_text(client: Any) -> None:
    parts: Any = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answer = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == "You said: one\ntwo"


def test_a_stream_says_the_same(client: Any) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "You said: Grüße, 世界!"
    assert "\ufffd" not in text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == ask(client).usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.choices for chunk in ask(client, stream=True))
    told = list(ask(client, stream=True, extra_body={"stream_options": {"continuous_usage_stats": True}}))
    # A token a byte: a character of three is told once it is whole.
    assert [chunk.usage.completion_tokens for chunk in told if chunk.usage][:12] == [*range(1, 13)]
    assert told[-1].usage == chunks[-1].usage


def test_completions(client: Any) -> None:
    answer = client.completions.create(model="fake", prompt="0123456789", max_tokens=40)
    assert answer.choices[0].text == " and 23456789"
    texts = client.completions.create(model="fake", prompt=["0123456789", "abcdefghij"], echo=True, n=2).choices
    assert [choice.index for choice in texts] == [0, 1, 2, 3]
    assert [choice.text for choice in texts] == ["0123456789 and 23456789"] * 2 + ["abcdefghij and cdefghij"] * 2
    ids = client.completions.create(model="fake", prompt=[40, 41, 42], max_tokens=2).choices[0]
    assert (ids.finish_reason, len(ids.text)) == ("length", 2)
    stream = client.completions.create(model="fake", prompt="0123456789", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == " and 23456789"


def test_logprobs_of_chat(client: Any) -> None:
    choice = ask(client, "é", logprobs=True, top_logprobs=2).choices[0]
    told = choice.logprobs.content
    assert bytes(byte for one in told for byte in one.bytes).decode() == choice.message.content == "You said: é"
    assert [one.logprob for one in told] == [-0.5] * len(told)
    assert [top.logprob for top in told[0].top_logprobs] == [-0.5, -1.5]
    assert told[0].top_logprobs[0].token == told[0].token == "Y"
    streamed = [
        one
        for chunk in ask(client, "é", logprobs=True, stream=True)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert [one.token for one in streamed] == [one.token for one in told]
    assert streamed[0].top_logprobs == []


def test_logprobs_of_completions(client: Any) -> None:
    choice = client.completions.create(model="fake", prompt="0123456789", logprobs=1).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert told.text_offset == list(range(len(choice.text)))
    assert told.top_logprobs[0] == {" ": -0.5}


def test_several_answers(client: Any) -> None:
    answer = ask(client, n=4, seed=7, temperature=1)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert [choice.message.content for choice in ask(client, n=4, seed=7, temperature=1).choices] == texts
    streamed = dict.fromkeys(range(4), "")
    for chunk in ask(client, n=4, seed=7, temperature=1, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts


@pytest.mark.parametrize("stop", [" said", ["x", "said:", "id"]])
def test_stop_strings_are_not_in_the_text(client: Any, stop: Any) -> None:
    choice = ask(client, stop=stop, logprobs=True).choices[0]
    assert choice.finish_reason == "stop"
    expected = "You" if stop == " said" else "You sa"
    assert choice.message.content == expected
    assert "".join(one.token for one in choice.logprobs.content) == expected
    chunks = ask(client, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_most_tokens(client: Any) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(client, **{name: 3})
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("You", "length")


def test_tools(client: Any) -> None:
    answer = ask(client, tools=[WEATHER]).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content == "Let me see. "
    call = answer.message.tool_calls[0]
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "weather",
        {"city": "Köln"},
    )
    after: Any = [
        {"role": "user", "content": "Weather?"},
        answer.message,
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    answer = client.chat.completions.create(model="fake", messages=after, tools=[WEATHER])
    assert answer.choices[0].message.content == "You said: Weather?"
    assert answer.choices[0].message.tool_calls is None
    assert "You said" in ask(client, tools=[WEATHER], tool_choice="none").choices[0].message.content


def test_tools_in_a_stream(client: Any) -> None:
    chunks = [chunk.choices[0] for chunk in ask(client, tools=[WEATHER], stream=True)]
    assert "".join(choice.delta.content or "" for choice in chunks) == "Let me see. "
    calls = [call for choice in chunks for call in choice.delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in calls] == [(0, "weather")]
    assert chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"tool_choice": "required", "tools": [WEATHER]}, "tool_choice"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 0.00001}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n=9"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 5000}, "5000"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"cat": 1}}, "logit_bias"),
        ({"tools": [{"type": "web"}]}, "tools[0]"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "no content"),
        ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "mood"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "images"),
    ],
)
def test_what_is_not_understood_is_refused(client: Any, more: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "x"}]} | more
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**arguments)
    assert said in str(caught.value)
    assert caught.value.type == "invalid_request_error"


def test_what_changes_nothing_is_accepted(client: Any) -> None:
    answer = ask(
        client,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        response_format={"type": "text"},
        parallel_tool_calls=True,
        extra_body={"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "chat_template_kwargs": {"x": 1}},
    )
    assert answer.choices[0].message.content.startswith("You said")


def test_a_prompt_past_the_models_positions(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "x" * 5000)
    assert caught.value.code == "context_length_exceeded"
    assert "4096" in str(caught.value)


def test_another_model(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-5", prompt="x")
    assert caught.value.code == "model_not_found"
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_keys() -> None:
    with live(service(), keys=("right", "other")) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="right", max_retries=0) as client:
            assert ask(client).choices
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                ask(client)
            with pytest.raises(openai.AuthenticationError):
                client.models.list()


def test_a_full_queue_is_429_with_a_time_to_wait() -> None:
    engine = FakeEngine(rows=1, queue_limit=1, delay=0.02)
    with live(service(engine)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        streams = [ask(client, stream=True)]
        next(streams[0])
        while not engine.stats().active:
            pass
        streams.append(ask(client, stream=True))
        with pytest.raises(openai.RateLimitError) as caught:
            ask(client)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert caught.value.code == "queue_full"
        for stream in streams:
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream).startswith("You said")
        assert ask(client).choices


def test_an_engine_that_fails_is_a_500() -> None:
    engine = FakeEngine()
    engine.fail = RuntimeError("out of order")
    with live(service(engine)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match="out of order"):
            ask(client)
        with pytest.raises(openai.APIError, match="out of order"):
            list(ask(client, stream=True))
