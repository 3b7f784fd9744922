"""When an answer ends in the middle of its text: text from tokens as they come, and stop strings in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers give for bytes that are no whole character yet."""
CONTEXT = 5
"""Tokens before the answer that are decoded with it, so that its first token's space is seen."""
LONGEST_WAIT = 16
"""Tokens without a new character after which text that ends in unfinished bytes is given out as it is."""


class Decodes(Protocol):
    """The part of a tokenizer that turns ids into text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of tokens."""
        ...


class Detokenizer:
    """Text of a growing list of tokens: each call gives what is new, and whole characters only.

    A token's text may depend on those before it (a leading space, bytes of one character), so a few are decoded again
    each time: a constant number while characters get finished.

    Parameters
    ----------
    tokenizer
        Something with transformers' `decode`.
    prompt : sequence of int
        Tokens before, whose text is not given out.
    skip_special : bool
        Leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int] = (), *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._window = list(prompt[-CONTEXT:])  # tokens given out last, then those after them
        self._before = len(self._window)  # of the window: given out before
        self._given = len(self._decode(self._window))  # characters of the window's text that were given out
        self._waiting = 0  # tokens since the last new character

    def push(self, *tokens: int) -> str:
        """Take tokens; the text that is certain now and was not given out before."""
        self._window += tokens
        text = self._decode(self._window)
        certain = text.rstrip(UNFINISHED)
        if len(certain) < len(text):
            new = self._give(certain)
            self._waiting = 0 if new else self._waiting + len(tokens)
            if new and len(self._window) > 2 * LONGEST_WAIT:
                # Every piece may end within a character; what is decoded again must not grow with the answer.
                self._window, self._before = self._window[-LONGEST_WAIT:], 0
                self._given = len(self._decode(self._window).rstrip(UNFINISHED))
            if self._waiting < LONGEST_WAIT:
                return new
        self._waiting = 0
        new = self._give(text)
        if self._before < len(self._window):
            self._window = self._window[self._before :]
            self._before = len(self._window)
            self._given = len(self._decode(self._window))
        return new

    def flush(self) -> str:
        """The rest of the text, unfinished characters included."""
        return self._give(self._decode(self._window))

    def _give(self, text: str) -> str:
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)


class StopStrings:
    """Looks for stop strings in text that comes in pieces.

    Parameters
    ----------
    stop : sequence of str
        None of them empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found: str | None = None
        """The stop string that came, if one did."""

    def push(self, text: str) -> str:
        """Take a piece of text; what cannot be part of a stop string any more, up to the first one.

        The stop string itself and what follows it are not given out.
        """
        if self.found is not None:
            return ""
        text = self._held + text
        places = [(text.find(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if places:
            place, _, self.found = min(places)
            self._held = ""
            return text[:place]
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Text held back because a stop string could have begun in it."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
