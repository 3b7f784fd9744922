"""Between text and tokens: a model's tokenizer and its chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from liquidfusion.exceptions import ConfigError


class Text:
    """A model's tokenizer and chat template.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        With or without a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        template = tokenizer.chat_template
        self.template: str | None = json.dumps(template) if isinstance(template, dict) else template

    @property
    def shows_tools(self) -> bool:
        """Whether the chat template tells the model of tools."""
        return bool(self.template and re.search(r"\btools\b", self.template))

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, extra: dict[str, Any]) -> str:
        """Write a conversation as the model was trained to read it, up to where its answer begins.

        Raises
        ------
        ConfigError
            The model has no template, or its template refuses the conversation; the message is the template's.
        """
        if self.template is None:
            raise ConfigError("this model has no chat template; /v1/completions is accepted")
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, add_generation_prompt=True, **extra
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"the model's chat template refuses these messages: {error}") from error
        return str(text)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Tokens of a text; `special` adds those that the tokenizer puts around a bare text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special)
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of tokens, as it stands: nothing is tidied."""
        if self._backend is not None:
            return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)

    @cached_property
    def _bytewise(self) -> dict[str, int] | None:
        """From a character of the vocabulary to its byte, for tokenizers that spell bytes as characters."""
        if self._backend is None or b"ByteLevel" not in (self._backend.decoder or _Nothing).__getstate__():
            return None
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in plain]
        return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}

    def spelling(self, token: int) -> bytes:
        """The bytes that a token stands for; they may end within a character."""
        word = self._tokenizer.convert_ids_to_tokens(token)
        if word is None:
            return b""
        table = self._bytewise
        if table is not None and all(character in table for character in word):
            return bytes(table[character] for character in word)
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", word):
            return bytes([int(match[1], 16)])
        return str(word).replace("▁", " ").encode()


class _Nothing:
    @staticmethod
    def __getstate__() -> bytes:
        return b""
