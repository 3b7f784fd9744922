"""Text that grows token by token equals text at once; stop strings and calls are found wherever tokens end."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakeengine import TEMPLATE, tokenizer
from liquidfusion.exceptions import ConfigError
from liquidfusion.run.stopping import LONGEST_WAIT, Detokenizer, StopStrings
from liquidfusion.serving.text import Text
from liquidfusion.serving.tools import Caller, form_of

TEXT = Text(tokenizer())


@given(st.text(max_size=30), st.text(max_size=10))
def test_a_growing_text_never_changes(text: str, prompt: str) -> None:
    detokenizer = Detokenizer(TEXT, TEXT.encode(prompt))
    parts = [detokenizer.push(token) for token in TEXT.encode(text)]
    assert "".join(parts) + detokenizer.flush() == text
    assert not any("\ufffd" in part for part in parts if "\ufffd" not in text)


@given(st.binary(max_size=60))
def test_bytes_that_are_no_text_come_to_an_end(data: bytes) -> None:
    words = {TEXT.spelling(token): token for token in range(4, 260)}
    detokenizer = Detokenizer(TEXT)
    pieces = [detokenizer.push(words[bytes([byte])]) for byte in data]
    text = "".join(pieces) + detokenizer.flush()
    assert [c for c in text if c != "\ufffd"] == [c for c in data.decode("utf8", "replace") if c != "\ufffd"]
    for start in range(len(pieces) - LONGEST_WAIT):
        assert any(pieces[start : start + LONGEST_WAIT])


def test_spelling() -> None:
    assert b"".join(TEXT.spelling(token) for token in TEXT.encode("a é\n世")) == "a é\n世".encode()
    assert TEXT.spelling(END_OF_TURN) == b"<|im_end|>"
    assert TEXT.spelling(10**6) == b""


END_OF_TURN = 3


def cut(text: str, sizes: list[int]) -> list[str]:
    parts = []
    for size in sizes:
        parts.append(text[:size])
        text = text[size:]
    return [*parts, text]


@given(
    st.text("ab<", max_size=20),
    st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 3)),
)
def test_stops_end_the_text_at_the_first_one_complete(text: str, words: list[str], sizes: list[int]) -> None:
    stops = StopStrings(words)
    got = ""
    for part in cut(text, [1] * len(text)):
        got += stops.push(part)
    got += stops.flush()
    # The first end of a stop string, and among those that end there the longest.
    ends = [(text.find(word) + len(word), -len(word)) for word in words if word in text]
    end, length = min(ends, default=(len(text), 0))
    assert got == text[: end + length]
    assert (stops.found is not None) == bool(ends)
    whole = StopStrings(words)
    pieces = "".join(whole.push(part) for part in cut(text, sizes)) + whole.flush()
    assert text.startswith(pieces)
    assert not any(word in pieces for word in words)


def calls(template: str, text: str, sizes: list[int], **more: Any) -> tuple[list[tuple[str, Any]], str]:
    form = form_of(template)
    assert form is not None
    caller = Caller(form, **more)
    told = "".join(caller.push(part) for part in cut(text, sizes))
    found, rest = caller.rest()
    assert len({call.id for call in found}) == len(found)
    return [(call.name, json.loads(call.arguments)) for call in found], told + rest


HERMES, MISTRAL, LLAMA = TEMPLATE, "{{ '[TOOL_CALLS]' }}", "{{ '<|python_tag|>' }}"
ONE, TWO = {"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}
TAGGED = f"<tool_call>\n{json.dumps(ONE)}\n</tool_call>"


@given(st.lists(st.integers(0, 9), max_size=40))
def test_calls_are_found_wherever_tokens_end(sizes: list[int]) -> None:
    assert calls(HERMES, f"Well <b> {TAGGED}", sizes) == ([("f", {"x": 1})], "Well <b> ")
    both = f"{TAGGED}\n<tool_call>{json.dumps(TWO)}"
    assert calls(HERMES, both, sizes) == ([("f", {"x": 1}), ("g", {})], "")
    assert calls(HERMES, both, sizes, several=False) == ([("f", {"x": 1})], "")
    assert calls(MISTRAL, f"[TOOL_CALLS]{json.dumps([ONE, TWO])}", sizes) == ([("f", {"x": 1}), ("g", {})], "")
    llama = '{"name": "f", "parameters": {"x": 1}}'
    assert calls(LLAMA, llama, sizes) == ([("f", {"x": 1})], "")
    assert calls(LLAMA, f"<|python_tag|>{llama}; {llama}", sizes) == ([("f", {"x": 1})] * 2, "")


@given(st.lists(st.integers(0, 9), max_size=40))
def test_what_is_no_call_stays_text(sizes: list[int]) -> None:
    for template, text in (
        (HERMES, "a < b, <tool> and <tool_calm>"),
        (HERMES, "<tool_call>{broken</tool_call>"),
        (HERMES, "<tool_call>[1]</tool_call>"),
        (MISTRAL, "[TOOL_CALLS] none"),
        (LLAMA, 'In JSON: {"name": "f", "parameters": {}}'),
        (LLAMA, '{"answer": 1}'),
        (LLAMA, "{x}"),
    ):
        assert calls(template, text, sizes) == ([], text)


def test_forms_that_are_not_known() -> None:
    assert form_of(None) is None
    assert form_of("{{ messages }}") is None
    assert form_of("<tool_call><function=f>") is None


def test_templates_that_refuse() -> None:
    tokens = tokenizer()
    text = Text(tokens)
    assert text.shows_tools
    assert text.render([{"role": "user", "content": "x"}], None, {}).endswith("assistant\n")
    text._tokenizer = type("Bare", (), {"chat_template": "{{ raise_exception('no') }}"})()
    with pytest.raises(ConfigError, match="chat template refuses"):
        Text(_with(tokens, "{{ raise_exception('roles must alternate') }}")).render([], None, {})
    with pytest.raises(ConfigError, match="no chat template"):
        Text(_with(tokens, None)).render([], None, {})


def _with(tokens: Any, template: str | None) -> Any:
    import copy

    other = copy.deepcopy(tokens)
    other.chat_template = template
    return other
