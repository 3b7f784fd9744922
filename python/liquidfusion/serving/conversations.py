"""Rows of finished answers, kept so that a conversation's next turn reads only what is new.

A row is found by the messages it was made from: a chain of digests, one per message, that starts with the caller's
scope. It is used only if its tokens are the beginning of the new prompt's tokens, so it never changes what is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liquidfusion.exceptions import ConfigError, LiquidFusionError

if TYPE_CHECKING:
    from liquidfusion.state.row import RowState

log = logging.getLogger(__name__)

OUTCOMES = ("continued", "edited", "retokenized", "unreadable")
"""What can become of a request that has a conversation's beginning: only the first saves reading it."""


@dataclass
class _Kept:
    """A row; `state` is None until one that was found on disk is asked for."""

    chain: tuple[str, ...]
    nbytes: int
    state: RowState | None


class Conversations:
    """Kept rows, least recently used ones dropped first.

    Not for threads: a server calls it from one worker.

    Parameters
    ----------
    budget : int
        Bytes of host memory; 0 keeps nothing.
    directory : Path, optional
        Rows are also kept there as files (mode 0600, directory 0700), and found again by the next server.
    load : callable, optional
        From a file to a row; raises a LiquidFusionError for one that does not fit. Needed with a directory.

    Raises
    ------
    ConfigError
        The directory cannot be used, or another server uses it.
    """

    def __init__(
        self, budget: int, *, directory: Path | None = None, load: Callable[[str], RowState] | None = None
    ) -> None:
        self.budget = budget
        self.nbytes = 0
        self._rows: OrderedDict[str, _Kept] = OrderedDict()
        self._known: Counter[str] = Counter()
        self._directory, self._load = directory, load
        self._lock: int | None = None
        if directory is not None and budget:
            self._open(directory)

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, chain: Sequence[str], tokens: Sequence[int]) -> tuple[RowState | None, str | None]:
        """The row that has read most of a conversation, and what came of the search.

        Parameters
        ----------
        chain : sequence of str
            Digests of the conversation, one per message (`digests`).
        tokens : sequence of int
            The whole prompt.

        Returns
        -------
        RowState or None
            Its tokens are the beginning of `tokens`, and at least one more follows.
        str or None
            One of `OUTCOMES`; None for a conversation that nothing is known of.
        """
        for digest in reversed(chain[:-1]):
            kept = self._rows.get(digest)
            if kept is None:
                continue
            state = self._state(digest, kept)
            if state is None:
                return None, "unreadable"
            if len(state.tokens) < len(tokens) and list(tokens[: len(state.tokens)]) == list(state.tokens):
                self._rows.move_to_end(digest)
                self._touch(digest)
                return state, "continued"
            return None, "retokenized"
        return None, "edited" if any(self._known[digest] for digest in chain) else None

    def keep(self, chain: Sequence[str], state: RowState) -> None:
        """Keep a row under the last digest of `chain`; the row of an earlier turn makes room for it."""
        if state.nbytes > self.budget or not chain:
            return
        for digest in chain:
            if digest in self._rows:
                self._drop(digest)
        self._add(_Kept(tuple(chain), state.nbytes, state))
        if self._directory is not None:
            self._write(self._directory, chain, state)

    def close(self) -> None:
        """Let another server have the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _add(self, kept: _Kept) -> None:
        self._rows[kept.chain[-1]] = kept
        self._known.update(kept.chain)
        self.nbytes += kept.nbytes
        while self.nbytes > self.budget:
            self._drop(next(iter(self._rows)))

    def _drop(self, digest: str) -> None:
        kept = self._rows.pop(digest)
        self.nbytes -= kept.nbytes
        self._known -= Counter(kept.chain)
        for path in self._paths(digest):
            path.unlink(missing_ok=True)

    def _state(self, digest: str, kept: _Kept) -> RowState | None:
        """The row itself, read from its file if it must be."""
        if kept.state is None and self._load is not None:
            try:
                kept.state = self._load(str(self._paths(digest)[0]))
            except (OSError, LiquidFusionError) as error:
                log.warning("a kept conversation is dropped: %s", error)
                self._drop(digest)
        return kept.state

    # Files: the row, then a note beside it. A row without a note was never finished.

    def _paths(self, digest: str) -> tuple[Path, ...]:
        if self._directory is None:
            return ()
        return self._directory / f"{digest}.row", self._directory / f"{digest}.json"

    def _open(self, directory: Path) -> None:
        if self._load is None:
            raise ConfigError("a directory of conversations needs a way to load them")
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise ConfigError(f"conversations in {directory} are in use by another server") from error
        except OSError as error:
            raise ConfigError(f"conversations cannot be kept in {directory}: {error.strerror}") from error
        notes = sorted(directory.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for note in notes:
            row = note.with_suffix(".row")
            try:
                chain, nbytes = json.loads(note.read_text("utf8"))
                right = row.is_file() and chain[-1] == note.stem and isinstance(nbytes, int)
            except (ValueError, TypeError, LookupError):
                right = False
            if right:
                self._add(_Kept(tuple(chain), nbytes, None))
            else:
                note.unlink()
        for row in directory.glob("*.row"):
            if row.stem not in self._rows:
                row.unlink()

    def _write(self, directory: Path, chain: Sequence[str], state: RowState) -> None:
        row, note = self._paths(chain[-1])
        try:
            state.to_file(str(row))
            row.chmod(0o600)
            handle, temporary = tempfile.mkstemp(dir=directory)  # mode 0600
            with os.fdopen(handle, "w", encoding="utf8") as file:
                json.dump([list(chain), state.nbytes], file)
            os.replace(temporary, note)
        except OSError as error:  # a full disk must not take the server down
            log.warning("a conversation is kept in memory only: %s", error)

    def _touch(self, digest: str) -> None:
        with contextlib.suppress(OSError):
            for path in self._paths(digest):
                os.utime(path)


def digests(scope: str, frame: object, messages: Iterable[dict[str, Any]]) -> list[str]:
    """A digest for every beginning of a conversation.

    Parameters
    ----------
    scope : str
        Whose conversation it is: only the same scope finds it.
    frame : object
        What else the prompt is made from (tools, template arguments), as JSON can say it.
    messages : iterable of dict
        As the template gets them.
    """
    last = digest(scope, frame)
    chain = []
    for message in messages:
        last = digest(last, message)
        chain.append(last)
    return chain


def digest(before: str, value: object) -> str:
    """The digest of what `before` stands for, followed by `value`."""
    if isinstance(value, dict):
        value = {name: part for name, part in value.items() if part is not None}
    text = json.dumps([before, value], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]
