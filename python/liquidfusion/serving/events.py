"""Answers in OpenAI's JSON: chunks of a stream, and one document folded from them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from liquidfusion.serving.choice import Choice, Piece, Said
from liquidfusion.serving.text import Text


class Writer:
    """Chunks of one answered request.

    Parameters
    ----------
    model : str
        As the request names it.
    text : Text
        Spells tokens.
    alternatives : int, optional
        Log-probabilities are told, with so many alternatives; None: they are not.
    """

    object = ""
    prefix = ""

    def __init__(self, model: str, text: Text, alternatives: int | None) -> None:
        self._model, self._text, self._alternatives = model, text, alternatives
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def first(self, index: int, echoed: str = "") -> dict[str, Any] | None:
        """What comes before an answer's text, if anything does."""
        raise NotImplementedError

    def piece(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """A chunk of one answer."""
        raise NotImplementedError

    def usage(self, choices: Sequence[Choice], prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Tokens read and written so far, as a chunk has them."""
        read, written = sum(map(len, prompts)), sum(choice.tokens for choice in choices)
        # Answers to one prompt share what was cached of it.
        cached = {id(choice.prompt): choice.request.cached_tokens for choice in choices}
        return {
            "usage": {
                "prompt_tokens": read,
                "completion_tokens": written,
                "total_tokens": read + written,
                "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
            }
        }

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk that grows answers by these parts."""
        return {
            "id": self._id,
            "object": self.object,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _spelled(self, token: int) -> str:
        return self._text.spelling(token).decode("utf8", "replace")


class ChatWriter(Writer):
    """Of ``/v1/chat/completions``."""

    object = "chat.completion.chunk"
    prefix = "chatcmpl"

    def first(self, index: int, echoed: str = "") -> dict[str, Any] | None:
        """The role."""
        del echoed
        return self._delta(index, {"role": "assistant", "content": ""})

    def piece(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """A chunk of one answer."""
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.calls:
            delta["tool_calls"] = [{"index": i} | call.as_dict() for i, call in enumerate(piece.calls)]
        told = None
        if self._alternatives is not None:
            told = {"content": [self._told(one) for one in piece.said], "refusal": None}
        return self._delta(choice.index, delta, told, piece.finish)

    def _delta(self, index: int, delta: dict[str, Any], told: Any = None, finish: str | None = None) -> dict[str, Any]:
        return self.chunk([{"index": index, "delta": delta, "logprobs": told, "finish_reason": finish}])

    def _told(self, said: Said) -> dict[str, Any]:
        token = said.token
        top = [self._one(other, logprob) for other, logprob in token.top_logprobs[: self._alternatives or 0]]
        return self._one(token.id, token.logprob) | {"top_logprobs": top}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self._spelled(token), "logprob": logprob, "bytes": list(self._text.spelling(token))}


class CompletionWriter(Writer):
    """Of ``/v1/completions``."""

    object = "text_completion"
    prefix = "cmpl"

    def first(self, index: int, echoed: str = "") -> dict[str, Any] | None:
        """The prompt, where it is echoed."""
        return self._text_chunk(index, echoed) if echoed else None

    def piece(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """A chunk of one answer."""
        told = None
        if self._alternatives is not None:
            said = piece.said
            told = {
                "tokens": [self._spelled(one.token.id) for one in said],
                "token_logprobs": [one.token.logprob for one in said],
                "top_logprobs": [self._top(one) for one in said],
                "text_offset": [one.offset for one in said],
            }
        return self._text_chunk(choice.index, piece.text, told, piece.finish)

    def _text_chunk(self, index: int, text: str, told: Any = None, finish: str | None = None) -> dict[str, Any]:
        return self.chunk([{"index": index, "text": text, "logprobs": told, "finish_reason": finish}])

    def _top(self, said: Said) -> dict[str, float | None]:
        # OpenAI's own server always tells of the token that was taken.
        top: dict[str, float | None] = {self._spelled(said.token.id): said.token.logprob}
        top |= {self._spelled(other): value for other, value in said.token.top_logprobs[: self._alternatives or 0]}
        return top


def fold(chunks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The one document that an answer's chunks amount to."""
    document: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        document = document or {name: value for name, value in chunk.items() if name != "usage"}
        for part in chunk["choices"]:
            _fold_choice(choices.setdefault(part["index"], {}), part)
        if chunk.get("usage"):
            document["usage"] = chunk["usage"]
    document["object"] = document["object"].removesuffix(".chunk")
    document["choices"] = [choices[index] for index in sorted(choices)]
    for choice in document["choices"]:
        message = choice.get("message")
        if message is not None and message.get("tool_calls"):
            message["content"] = message["content"] or None
    return document


def _fold_choice(choice: dict[str, Any], part: dict[str, Any]) -> None:
    choice["index"] = part["index"]
    if "delta" in part:
        message = choice.setdefault("message", {"role": "assistant", "content": "", "refusal": None})
        message["content"] += part["delta"].get("content") or ""
        calls = [{n: v for n, v in call.items() if n != "index"} for call in part["delta"].get("tool_calls", ())]
        if calls:
            message["tool_calls"] = message.get("tool_calls", []) + calls
    else:
        choice["text"] = choice.get("text", "") + part["text"]
    told = choice.setdefault("logprobs", None)
    if part["logprobs"] is not None:
        if told is None:
            choice["logprobs"] = part["logprobs"]
        else:
            for name, values in part["logprobs"].items():
                if values is not None:
                    told[name] = told[name] + values
    choice["finish_reason"] = part["finish_reason"] or choice.get("finish_reason")


def line(document: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
