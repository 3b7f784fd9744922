"""Who runs in the next step: rows, the waiting queue and prompt chunks, without a tensor.

A prompt is cut into chunks of a fixed size from where its reading starts; what a row keeps depends on where they end,
so load decides only when a chunk runs, never where it ends.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from liquidfusion.exceptions import ConfigError, QueueFull

PAUSE = 2
"""Steps without a chunk after one with, while few prompts are read."""
LEAST = 256
"""Tokens that a chunk counts at least: a call of the model with fewer takes as long, for it reads all weights."""
FEW = 4
"""So many times as many rows decode as prompts are read: then these are few."""


@dataclass(frozen=True)
class Piece:
    """One chunk of a prompt: its tokens `start` to `stop` go into `row`; `last` says whether they end the prompt."""

    ticket: int
    row: int
    start: int
    stop: int
    last: bool


@dataclass(frozen=True)
class Plan:
    """One step: chunks to read (at most one per row) and rows that decode a token.

    `entering`: tickets of prompts that have but one token left; their rows are among `decoding` from here on, since a
    chunk of one token is a decode step.
    """

    pieces: tuple[Piece, ...]
    decoding: tuple[int, ...]
    entering: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.pieces or self.decoding)


@dataclass
class _Job:
    """A request: `at` of its `tokens` prompt tokens are read; `rows` holds those of its answers that still run."""

    ticket: int
    tokens: int
    answers: int
    at: int = 0
    rows: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        return self.tokens - self.at


class Scheduler:
    """Shares rows and steps among requests.

    Waiting requests come in by turn, each when as many rows are free as it has answers. Among prompts being read, turns
    alternate between the oldest and the one with least left: short prompts do not wait for a long one, nor it for ever.
    While few read and many decode, steps without a chunk lie between those with one, so that most tokens come at the
    pace that they have without.

    Parameters
    ----------
    rows : int
        Requests that run side by side.
    chunk : int
        Tokens of a prompt that are read at once.
    step_tokens : int
        Tokens of one step, a decoding row counting as one and a chunk as its own, or as 256 where it has fewer: as many
        whole chunks run as fit, and at least one.
    queue_limit : int, optional
        Requests that may wait; None for any number.

    Raises
    ------
    ConfigError
        A number below 1, or a negative queue limit.
    """

    def __init__(self, rows: int, *, chunk: int, step_tokens: int, queue_limit: int | None = None) -> None:
        for name, value in (("rows", rows), ("chunk", chunk), ("step_tokens", step_tokens)):
            if value < 1:
                raise ConfigError(f"{name}={value}; 1 or more is accepted")
        if queue_limit is not None and queue_limit < 0:
            raise ConfigError(f"queue_limit={queue_limit}; 0 or more is accepted")
        self.rows, self.chunk, self.step_tokens, self.queue_limit = rows, chunk, step_tokens, queue_limit
        self._free = list(range(rows))  # a heap: low rows first, so that few requests sit in few rows
        self._waiting: deque[_Job] = deque()
        self._reading: list[_Job] = []
        self._decoding: dict[int, _Job] = {}
        self._oldest_next = True
        self._since = PAUSE  # steps since a chunk

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting)

    @property
    def free(self) -> int:
        """Rows that nobody has."""
        return len(self._free)

    @property
    def active(self) -> int:
        """Rows that somebody has."""
        return self.rows - len(self._free)

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self._waiting and not self.active

    def submit(self, ticket: int, tokens: int, answers: int = 1) -> None:
        """Let a request wait for its rows.

        Parameters
        ----------
        ticket : int
            Names the request; never used before.
        tokens : int
            Length of its prompt.
        answers : int
            Rows that it needs, the first of them for its prompt.

        Raises
        ------
        ConfigError
            The prompt is empty, or the request can never have its rows.
        QueueFull
            As many requests wait as may.
        """
        if tokens < 1:
            raise ConfigError(f"a prompt of {tokens} tokens; 1 or more is accepted")
        if not 1 <= answers <= self.rows:
            raise ConfigError(f"n={answers} answers; 1 to {self.rows}, the engine's rows, are accepted")
        if self.queue_limit is not None:
            free, stuck = len(self._free), len(self._waiting)
            for job in self._waiting:
                if job.answers > free:
                    break
                free, stuck = free - job.answers, stuck - 1
            if stuck >= self.queue_limit and (stuck or answers > free):
                raise QueueFull(f"{stuck} requests wait for a row; queue_limit={self.queue_limit} of them may")
        self._waiting.append(_Job(ticket, tokens, answers))

    def join(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Give free rows to those who wait, by turn: tickets and their rows."""
        while self._waiting and self._waiting[0].answers <= len(self._free):
            job = self._waiting.popleft()
            job.rows = [heapq.heappop(self._free) for _ in range(job.answers)]
            self._reading.append(job)
            yield job.ticket, tuple(job.rows)

    def start_at(self, ticket: int, cached: int) -> None:
        """Say that the row of a request which has joined holds `cached` tokens of its prompt already.

        Raises
        ------
        ConfigError
            Nothing would be left to read.
        """
        job = next(job for job in self._reading if job.ticket == ticket)
        if not 0 <= cached < job.tokens:
            raise ConfigError(f"{cached} of {job.tokens} prompt tokens are read; one or more must be left")
        job.at = cached

    def plan(self) -> Plan:
        """The next step; it is taken to run."""
        entering = tuple(job.ticket for job in self._reading if job.left == 1)
        for job in [job for job in self._reading if job.left == 1]:
            job.at += 1
            self._decode(job)
        decoding = tuple(sorted(self._decoding))
        self._since += 1
        if self._since <= PAUSE and self._polite(len(decoding)):
            return Plan((), decoding, entering)
        pieces = tuple(self._pieces(self.step_tokens - len(decoding)))
        if pieces:
            self._since = 0
        return Plan(pieces, decoding, entering)

    def _polite(self, decoding: int) -> bool:
        """Whether so few read a prompt that those who decode need not wait for them at every step."""
        reading = len(self._reading)
        return bool(decoding) and (reading == 1 or reading * FEW <= decoding)

    def move(self, row: int, below: int) -> int | None:
        """Give an answer the lowest free row instead of its own, if that is one below a number.

        Returns
        -------
        int or None
            The row; None if there is none such, and nothing has changed.
        """
        if not self._free or self._free[0] >= below:
            return None
        job, target = self._decoding.pop(row), heapq.heappop(self._free)
        job.rows[job.rows.index(row)] = target
        self._decoding[target] = job
        heapq.heappush(self._free, row)
        return target

    def finish(self, row: int) -> None:
        """Free the row of an answer that has ended.

        Raises
        ------
        KeyError
            Nothing decodes in it.
        """
        job = self._decoding.pop(row)
        job.rows.remove(row)
        heapq.heappush(self._free, row)

    def clear(self, waiting: bool) -> None:
        """Forget all requests that have rows, and those that wait if `waiting`."""
        for job in (*self._reading, *self._decoding.values()):
            self._release(job)
        self._reading.clear()
        if waiting:
            self._waiting.clear()

    def cancel(self, ticket: int) -> tuple[int, ...]:
        """Forget a request, wherever it is; the rows that it had, which are free now."""
        for jobs in (self._waiting, self._reading):
            job = next((job for job in jobs if job.ticket == ticket), None)
            if job is not None:
                jobs.remove(job)
                return self._release(job)
        job = next((job for job in self._decoding.values() if job.ticket == ticket), None)
        return () if job is None else self._release(job)

    def _release(self, job: _Job) -> tuple[int, ...]:
        rows, job.rows = tuple(job.rows), []
        for row in rows:
            self._decoding.pop(row, None)
            heapq.heappush(self._free, row)
        return rows

    def _pieces(self, tokens: int) -> Iterator[Piece]:
        turn = list(self._reading)  # oldest first
        first = True
        while turn:
            job = turn[0] if self._oldest_next else min(turn, key=lambda job: job.left)
            length = min(self.chunk, job.left)
            counted = min(self.chunk, max(length, LEAST))
            if counted > tokens and not first:
                return
            self._oldest_next, first = not self._oldest_next, False
            tokens -= counted
            turn.remove(job)
            start, job.at = job.at, job.at + length
            yield Piece(job.ticket, job.rows[0], start, job.at, not job.left)
            if not job.left:
                self._decode(job)

    def _decode(self, job: _Job) -> None:
        """Let a prompt that is read have its answers."""
        self._reading.remove(job)
        self._decoding |= dict.fromkeys(job.rows, job)


def boundaries(tokens: int, chunk: int, cached: int = 0) -> list[int]:
    """Where the chunks of a prompt end, a function of the request alone."""
    return [*range(cached + chunk, tokens, chunk), tokens]
