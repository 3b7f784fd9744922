"""Between text and tokens: chat templates, text that grows token by token, stop strings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from liquidfusion.exceptions import ConfigError

_CONTEXT = 5
"""Tokens before the answer that are decoded with it, so that its first token's space is seen."""
_PATIENCE = 16
"""Tokens after which a character that is still incomplete is let go: its bytes are not UTF-8."""


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

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of tokens, as it stands: nothing is tidied."""
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=skip_special))
        text = self._tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
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


class Detokenizer:
    """Text of an answer as its tokens arrive: what is given out never changes any more.

    Parameters
    ----------
    text : Text
        The tokenizer.
    prompt : sequence of int
        Tokens before the answer.
    skip_special : bool
        Whether special tokens are left out.
    """

    def __init__(self, text: Text, prompt: Sequence[int] = (), *, skip_special: bool = True) -> None:
        self._text, self._skip = text, skip_special
        self._ids = list(prompt[-_CONTEXT:])
        self._read = len(self._ids)

    def push(self, token: int) -> str:
        """Take a token; what the text has grown by, often nothing within a character."""
        self._ids.append(token)
        grown = self._grown()
        if grown.endswith("\ufffd") and len(self._ids) - self._read < _PATIENCE:
            return ""
        # One more round of context than is needed: what a token looks like can depend on the one before.
        self._ids = self._ids[-(len(self._ids) - self._read + _CONTEXT) :]
        self._read = len(self._ids)
        return grown

    def rest(self) -> str:
        """What is left at the end: an incomplete character as U+FFFD."""
        grown = self._grown() if len(self._ids) > self._read else ""
        self._read = len(self._ids)
        return grown

    def _grown(self) -> str:
        before = self._text.decode(self._ids[: self._read], skip_special=self._skip)
        after = self._text.decode(self._ids, skip_special=self._skip)
        return after[len(before) :]


class Stops:
    """Finds the first of some strings in a text that grows, and holds back what may be its beginning.

    Parameters
    ----------
    words : iterable of str
        Not empty each.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._words = tuple(words)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take more text; what is certain not to be part of a stop string. Nothing more once one is found."""
        if self.found is not None:
            return ""
        text = self._held + text
        hits = [(text.find(word), -len(word), word) for word in self._words if word in text]
        if hits:
            at, _, self.found = min(hits)
            self._held = ""
            return text[:at]
        keep = max((overlap(text, word) for word in self._words), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that `word` begins with."""
    for length in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
