"""What the two endpoints accept.

Every field of OpenAI's interface is understood, known not to change the answer, or refused: none is silently dropped.
The fields below `vLLM's` are those that vLLM adds and its users send as ``extra_body``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from liquidfusion.serving.errors import ApiError

_IDLE = Field(default=None, description="Accepted and not used: it does not change the answer.")
_NEUTRAL = Field(default=None, description="Only the value that changes nothing is accepted.")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Model):
    """Extras of a streamed answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(default=None, description="vLLM's: usage so far with every chunk.")
    include_obfuscation: bool | None = _IDLE


class Message(_Model):
    """One message; the content is text, or a list of parts that are all text."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


def _words(value: object) -> object:
    return [value] if isinstance(value, str) else value


_Stop = Annotated[list[str] | None, BeforeValidator(_words)]


class Common(_Model):
    """Fields of both endpoints."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: _Stop = Field(default=None, max_length=16)

    # vLLM's
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    stop_token_ids: list[int] | None = Field(default=None, max_length=128)
    ignore_eos: bool | None = None

    user: Any = _IDLE

    def neutral(self) -> dict[str, tuple[Any, ...]]:
        """Fields that must have one of these values, because others cannot be served."""
        return {}


class ChatRequest(Common):
    """Body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    # vLLM's
    chat_template_kwargs: dict[str, Any] | None = None

    metadata: Any = _IDLE
    store: Any = _IDLE
    service_tier: Any = _IDLE
    safety_identifier: Any = _IDLE
    prompt_cache_key: Any = _IDLE
    prompt_cache_retention: Any = _IDLE
    prediction: Any = _IDLE

    response_format: Any = _NEUTRAL
    modalities: Any = _NEUTRAL
    audio: Any = _NEUTRAL
    functions: Any = _NEUTRAL
    function_call: Any = _NEUTRAL
    reasoning_effort: Any = _NEUTRAL
    verbosity: Any = _NEUTRAL
    web_search_options: Any = _NEUTRAL

    def neutral(self) -> dict[str, tuple[Any, ...]]:
        """Fields that must have one of these values, because others cannot be served."""
        return {
            "response_format": (None, {"type": "text"}),
            "modalities": (None, ["text"]),
            "audio": (None,),
            "functions": (None, []),
            "function_call": (None, "none"),
            "reasoning_effort": (None,),
            "verbosity": (None,),
            "web_search_options": (None,),
        }


class CompletionRequest(Common):
    """Body of ``/v1/completions``; the prompt is a text, token ids, or a list of either."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool | None = None
    best_of: Any = _NEUTRAL
    suffix: Any = _NEUTRAL

    def neutral(self) -> dict[str, tuple[Any, ...]]:
        """Fields that must have one of these values, because others cannot be served."""
        return {"best_of": (None, 1, self.n), "suffix": (None, "")}


_REASONS = {
    "response_format": "this server cannot hold an answer to a format",
    "tool_choice": "this server cannot force a call",
}


def check(body: Common) -> None:
    """Refuse what is well-formed but cannot be served.

    Raises
    ------
    ApiError
        400, naming the field, the value and what is accepted.
    """
    for name, accepted in body.neutral().items():
        value = getattr(body, name)
        if value not in accepted:
            said = " or ".join(dict.fromkeys(json.dumps(known) for known in accepted))
            reason = _REASONS.get(name, "this server does not offer it")
            raise refusal(name, f"{name}={shown(value)}: {reason}; {said} is accepted")
    if body.stream_options is not None and not body.stream:
        raise refusal("stream_options", "stream_options is accepted only with stream=true")
    if any(not word for word in body.stop or ()):
        raise refusal("stop", "stop holds an empty string; each must have a character")
    for token in body.logit_bias or ():
        if not re.fullmatch(r"\d{1,9}", token):
            raise refusal("logit_bias", f"logit_bias names {shown(token)}; token ids are accepted")
    if isinstance(body, ChatRequest):
        _check_chat(body)
    elif isinstance(body, CompletionRequest) and body.echo and body.logprobs is not None:
        raise refusal("echo", "echo with logprobs: log-probabilities of the prompt are not kept; send one of them")


def _check_chat(body: ChatRequest) -> None:
    if body.top_logprobs and not body.logprobs:
        raise refusal("top_logprobs", "top_logprobs is accepted only with logprobs=true")
    both = body.max_tokens, body.max_completion_tokens
    if None not in both and both[0] != both[1]:
        raise refusal("max_tokens", f"max_tokens={both[0]} and max_completion_tokens={both[1]} differ; send one")
    if body.tool_choice not in (None, "auto", "none"):
        raise refusal(
            "tool_choice",
            f"tool_choice={shown(body.tool_choice)}: {_REASONS['tool_choice']}; 'auto' and 'none' are accepted",
        )
    for index, tool in enumerate(body.tools or ()):
        function = tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            raise refusal(f"tools[{index}]", f'tools[{index}] is no {{"type": "function", "function": {{"name": …}}}}')


def refusal(param: str, message: str, code: str | None = None) -> ApiError:
    """A 400 that names a field."""
    return ApiError(400, message, param=param, code=code)


def shown(value: object) -> str:
    """A value as an error message quotes it: JSON, not too long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "…"


def invalid(errors: Sequence[Any]) -> ApiError:
    """The 400 for what pydantic found in a body.

    Parameters
    ----------
    errors : sequence of dict
        As `ValidationError.errors()` gives them; the first is told.
    """
    first = errors[0]
    where = [part for part in first["loc"] if part != "body"]
    # A union reports every member; those parts of the path are names of types.
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where if _is_field(part)).lstrip(
        "."
    )
    if first["type"] == "extra_forbidden":
        return refusal(path, f"Unrecognized request argument supplied: {path}", code="unknown_parameter")
    if first["type"] in ("json_invalid", "model_attributes_type", "dict_type") and not path.strip("[]0123456789"):
        return ApiError(400, "The body is not a JSON object.", code="invalid_json")
    if first["type"] == "missing":
        return refusal(path, f"Missing required parameter: '{path}'.", code="missing_required_parameter")
    value = shown(first.get("input"))
    return refusal(path, f"Invalid value for '{path}': {value}. {first['msg']}.", code="invalid_value")


def _is_field(part: object) -> bool:
    return isinstance(part, int) or (isinstance(part, str) and part.isidentifier() and part not in ("str", "int"))


def texts(message: Message, index: int) -> str | None:
    """The content of a message as one text.

    Raises
    ------
    ApiError
        400 for images, audio and files.
    """
    if message.content is None or isinstance(message.content, str):
        return message.content
    parts = []
    for place, part in enumerate(message.content):
        param = f"messages[{index}].content[{place}]"
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = shown(part.get("type"))
            raise refusal(param, f"{param} is of type {kind}; this server reads text only, no images, audio or files")
        parts.append(part["text"])
    return "\n".join(parts)
