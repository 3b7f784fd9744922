"""Beginnings that many prompts share, a system prompt above all: read once, then copied."""

from __future__ import annotations

from collections import OrderedDict

from liquidfusion.state.row import RowState

REMEMBERED = 4096
"""Beginnings of prompts that are counted at once."""


class Prefixes:
    """Row states of shared beginnings.

    They end where chunks end, so a prompt that goes on from one keeps the same tokens as one that was read whole.

    Parameters
    ----------
    most : int
        States that are kept, the least recently used one goes first; 0 shares nothing.
    chunk : int
        Tokens of a chunk.
    """

    def __init__(self, most: int, chunk: int) -> None:
        self._most, self._chunk = most, chunk
        self._states: OrderedDict[int, RowState] = OrderedDict()
        self._seen: OrderedDict[int, int] = OrderedDict()
        self._changed = False

    def digests(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """One for each beginning of whole chunks that leaves something to read."""
        digest, digests = 0, []
        for end in range(self._chunk, len(prompt), self._chunk) if self._most else ():
            digest = hash((digest, prompt[end - self._chunk : end]))
            digests.append(digest)
        return tuple(digests)

    def count(self, digests: tuple[int, ...]) -> None:
        """Note that a prompt begins so."""
        for digest in digests:
            self._seen[digest] = self._seen.pop(digest, 0) + 1
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        self._changed |= bool(self._states)

    def changed(self) -> bool:
        """Whether a look for a state may find what the last one did not."""
        changed, self._changed = self._changed, False
        return changed

    def find(self, digests: tuple[int, ...], prompt: tuple[int, ...]) -> RowState | None:
        """The longest one that a prompt begins with."""
        for digest in reversed(digests):
            state = self._states.get(digest)
            if state is not None and state.tokens == prompt[: len(state.tokens)]:
                self._states.move_to_end(digest)
                return state
        return None

    def wanted(self, digests: tuple[int, ...], end: int) -> bool:
        """Whether to `put` what a row holds after `end` tokens of a prompt: others begin so, and go on otherwise."""
        number, rest = divmod(end, self._chunk)
        if rest or not 0 < number <= len(digests):
            return False
        shared = [self._seen.get(digest, 0) > 1 for digest in digests]
        return shared[number - 1] and not any(shared[number:]) and digests[number - 1] not in self._states

    def put(self, digests: tuple[int, ...], state: RowState) -> None:
        """Keep one."""
        self._states[digests[len(state.tokens) // self._chunk - 1]] = state
        self._changed = True
        while len(self._states) > self._most:
            self._states.popitem(last=False)

    def clear(self) -> None:
        """Forget all states."""
        self._states.clear()
