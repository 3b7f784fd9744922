"""Many requests, one step after another: prompts in chunks, a token for every row that answers, rows that come and go.

Nothing here knows threads but the lock around what callers may touch; `Engine` has the thread that calls `step`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from liquidfusion.exceptions import ConfigError
from liquidfusion.run.prefixes import Prefixes
from liquidfusion.run.request import Request, Token, Waiters
from liquidfusion.run.sampling import Drawn, Sampler, Sampling, upload
from liquidfusion.run.scheduler import Piece, Scheduler
from liquidfusion.run.stopping import Decodes, Detokenizer, StopStrings
from liquidfusion.state.row import RowState

SEED_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of the answers to one prompt."""


class Rows(Protocol):
    """A model with the rows of slots that requests take, driven by one thread.

    `sizes`: numbers of rows that a step may reach over, ascending, the last one all.
    """

    rows: int
    vocabulary: int
    sizes: tuple[int, ...]
    most_positions: int | None
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        ...

    @property
    def evictions(self) -> int:
        """Tokens evicted so far."""
        ...

    def read(self, chunks: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """Let rows read tokens, each as one chunk; logits after the last one of each `[chunks, vocabulary]`."""
        ...

    def decode(self, rows: tuple[int, ...], last: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Let rows read one token each, `last[row]` (int64 `[rows]` on the device).

        Returns logits `[lanes, vocabulary]`, and which row each lane is, -1 for none.
        """
        ...

    def release(self, row: int) -> None:
        """Empty a row."""
        ...

    def copy_row(self, source: int, target: int) -> None:
        """Make a row hold what another does."""
        ...

    def save_row(self, row: int, tokens: tuple[int, ...]) -> RowState:
        """What a row holds, which has read `tokens`, in host memory."""
        ...

    def load_row(self, row: int, state: RowState) -> None:
        """Make an empty row hold what was saved."""
        ...

    def check_state(self, state: RowState) -> None:
        """Refuse a state of another model or strategy."""
        ...

    def reset(self) -> None:
        """Empty all rows, whatever has happened."""
        ...


@dataclass
class _Answer:
    """A request in its row. `launched`: tokens drawn for it or being drawn; `ids`: those that the host has seen."""

    request: Request
    row: int
    ends: frozenset[int]
    launched: int = 0
    ids: list[int] = field(default_factory=list)
    text: Detokenizer | None = None
    strings: StopStrings | None = None


@dataclass
class _Work:
    """The requests of one prompt, until it is read; once it has `joined`, its `answers` have their rows."""

    requests: tuple[Request, ...]
    seed: int
    state: RowState | None
    digests: tuple[int, ...]
    joined: bool = False
    started: bool = False
    answers: list[_Answer] = field(default_factory=list)

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.requests[0].prompt


@dataclass
class _Flight:
    """What a step drew, on its way to the host."""

    step: int
    answers: list[tuple[int, _Answer]]  # lane, whose
    drawn: Drawn
    arrived: Callable[[], None]


class Stepper:
    """Serves requests from the rows of a model.

    Parameters
    ----------
    rows : Rows
        The model.
    scheduler : Scheduler
        Who runs when.
    eos : sequence of int
        Tokens that end an answer.
    tokenizer : optional
        For stop strings.
    prefixes : int
        Beginnings that prompts share which are kept at most, each as large as a row, in host memory.
    lag : int
        Steps that are launched before the tokens of one are read.
    """

    def __init__(
        self,
        rows: Rows,
        scheduler: Scheduler,
        *,
        eos: Sequence[int] = (),
        tokenizer: Decodes | None = None,
        prefixes: int = 4,
        lag: int = 0,
    ) -> None:
        self._rows, self._scheduler = rows, scheduler
        self._eos, self._tokenizer, self._positions = frozenset(eos), tokenizer, rows.most_positions
        self._prefixes, self._lag = Prefixes(prefixes, scheduler.chunk), lag
        self._lock = threading.Lock()
        self._tickets = 0
        self._works: dict[int, _Work] = {}
        self._answering: dict[int, _Answer] = {}  # by row
        self._cancelled: deque[Request] = deque()
        self._flights: deque[_Flight] = deque()
        self._sampler = Sampler(rows.rows, rows.vocabulary, rows.device)
        with torch.inference_mode(False):
            self._last = torch.zeros(rows.rows, dtype=torch.int64, device=rows.device)
        self.tokens = self.prompt_tokens = self.cached_tokens = self.steps = 0

    # From any thread

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        n: int = 1,
        seed: int = 0,
        keep: bool = False,
        resume: RowState | None = None,
        cancel: Callable[[Request], None] | None = None,
    ) -> list[Request]:
        """Let `n` answers to a prompt wait for their rows.

        Raises
        ------
        ConfigError
            They could never be answered.
        QueueFull
            As many requests wait as may.
        """
        ids = tuple(map(int, prompt))
        self._check(ids, sampling, resume)
        requests = [Request(ids, sampling, cancel or self.cancel, keep) for _ in range(n)]
        digests = self._prefixes.digests(ids) if resume is None else ()
        with self._lock:
            self._scheduler.submit(self._tickets, len(ids), n)
            self._works[self._tickets] = _Work(tuple(requests), seed, resume, digests)
            self._tickets += 1
        return requests

    def _check(self, ids: tuple[int, ...], sampling: Sampling, resume: RowState | None) -> None:
        known = self._rows.vocabulary
        for tokens in (ids, sampling.logit_bias):
            if tokens and (min(tokens) < 0 or max(tokens) >= known):
                wrong = next(token for token in tokens if not 0 <= token < known)
                raise ConfigError(f"token id {wrong}; 0 to {known - 1}, the model's vocabulary, are accepted")
        if self._positions is not None and len(ids) > self._positions:
            raise ConfigError(f"a prompt of {len(ids)} tokens; the model has {self._positions} positions")
        if sampling.stop and self._tokenizer is None:
            raise ConfigError("stop strings need the engine's tokenizer, and it has none")
        if resume is not None:
            self._rows.check_state(resume)
        if resume is not None and (len(resume.tokens) >= len(ids) or resume.tokens != ids[: len(resume.tokens)]):
            raise ConfigError(
                f"the state has read {len(resume.tokens)} tokens that the prompt of {len(ids)} does not go on from"
            )

    def cancel(self, request: Request) -> None:
        """Note that nobody waits for an answer any more; the next step frees its row."""
        self._cancelled.append(request)

    @property
    def idle(self) -> bool:
        """Whether nothing waits, runs or is on its way."""
        with self._lock:
            return self._scheduler.idle and not self._flights and not self._cancelled

    def counts(self) -> tuple[int, int]:
        """Rows in use and requests that wait."""
        with self._lock:
            return self._scheduler.active, self._scheduler.waiting

    # From the thread that steps

    def step(self) -> bool:
        """Run one step: False if there was nothing to do."""
        waiters = Waiters()
        self._drop_cancelled()
        with self._lock:
            joined = [(rows, ticket, self._works[ticket]) for ticket, rows in self._scheduler.join()]
            for *_, work in joined:
                work.joined = True
        for rows, ticket, work in joined:
            self._join(rows, ticket, work)
        self._share()
        self._gather()
        with self._lock:
            plan = self._scheduler.plan()
        self._enter(plan.entering)
        # First: a decode step may overwrite the last tokens of rows that it does not serve.
        self._decode([self._answering[row] for row in plan.decoding if row in self._answering])
        self._read(plan.pieces)
        while self._flights and (not plan or self._flights[0].step <= self.steps - self._lag):
            self._land(self._flights.popleft(), waiters)
        self.steps += bool(plan)
        waiters.wake()
        return bool(plan) or not self.idle

    def fail(self, error: BaseException, everyone: bool = False) -> None:
        """End the requests that have rows, or everyone, with an error, and empty the rows."""
        waiters = Waiters()
        with self._lock:
            lost = [ticket for ticket, work in self._works.items() if work.joined or everyone]
            requests = [request for ticket in lost for request in self._works.pop(ticket).requests]
            requests += [answer.request for answer in self._answering.values()]
            self._scheduler.clear(everyone)
            self._answering.clear()
            self._flights.clear()
        for request in requests:
            request.end("error", waiters, error)
        waiters.wake()
        self._rows.reset()

    def end(self, error: BaseException | None) -> None:
        """End every request, with an error if there was one, else as cancelled."""
        waiters = Waiters()
        with self._lock:
            requests = [request for work in self._works.values() for request in work.requests]
            requests += [answer.request for answer in self._answering.values()]
        for request in requests:
            request.end("cancelled" if error is None else "error", waiters, error)
        waiters.wake()

    def _drop_cancelled(self) -> None:
        while self._cancelled:
            request = self._cancelled.popleft()
            answer = next((a for a in self._answering.values() if a.request is request), None)
            if answer is not None:
                self._free(answer)
                continue
            # Still waiting or being read: gone when nobody waits for any of its answers.
            with self._lock:
                found = next((item for item in self._works.items() if request in item[1].requests), None)
            if found is not None and all(other.finish_reason is not None for other in found[1].requests):
                ticket, work = found
                if work.answers:
                    self._rows.release(work.answers[0].row)
                with self._lock:
                    self._scheduler.cancel(ticket)
                    del self._works[ticket]

    def _join(self, rows: tuple[int, ...], ticket: int, work: _Work) -> None:
        """Make a request's rows its own."""
        prompt = work.prompt
        self._prefixes.count(work.digests)
        if work.state is not None:
            self._start_from(rows[0], ticket, work, work.state)
        for number, (row, request) in enumerate(zip(rows, work.requests, strict=True)):
            sampling = request.sampling
            self._sampler.set(row, sampling, prompt, work.seed + number * SEED_STRIDE)
            ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._eos)
            answer = _Answer(request, row, ends)
            if sampling.stop and self._tokenizer is not None:
                answer.text, answer.strings = Detokenizer(self._tokenizer, prompt), StopStrings(sampling.stop)
            work.answers.append(answer)

    def _share(self) -> None:
        """Let prompts of which nothing is read yet begin with what others have read."""
        if not self._prefixes.changed():
            return
        with self._lock:
            works = list(self._works.items())
        for ticket, work in works:
            state = None if work.started or not work.answers else self._prefixes.find(work.digests, work.prompt)
            if state is not None:
                self._start_from(work.answers[0].row, ticket, work, state)

    def _start_from(self, row: int, ticket: int, work: _Work, state: RowState) -> None:
        self._rows.load_row(row, state)
        work.started = True
        with self._lock:
            self._scheduler.start_at(ticket, len(state.tokens))
        self.cached_tokens += len(state.tokens)
        for request in work.requests:
            request.cached_tokens = len(state.tokens)

    def _enter(self, tickets: Sequence[int]) -> None:
        """Let prompts of which one token is left decode it: it is the last one of each of their rows."""
        begun = [(self._works[ticket].prompt[-1], self._begin(ticket)) for ticket in tickets]
        last = [(answer.row, token) for token, answers in begun for answer in answers]
        self.prompt_tokens += len(tickets)
        if last:
            row, token = upload(last, torch.int64, self._last.device).unbind(1)
            self._last.index_copy_(0, row, token)

    def _read(self, pieces: Sequence[Piece]) -> None:
        """Read chunks of prompts; the last one of each gives every answer its row and its first token."""
        if not pieces:
            return
        works = [self._works[piece.ticket] for piece in pieces]
        chunks = [(piece.row, work.prompt[piece.start : piece.stop]) for piece, work in zip(pieces, works, strict=True)]
        logits = self._rows.read(chunks)
        source, wanted = [], []
        for number, (piece, work) in enumerate(zip(pieces, works, strict=True)):
            work.started = True
            self.prompt_tokens += piece.stop - piece.start
            if self._prefixes.wanted(work.digests, piece.stop):
                self._prefixes.put(work.digests, self._rows.save_row(piece.row, work.prompt[: piece.stop]))
            if piece.last:
                answers = self._begin(piece.ticket)
                source += [number] * len(answers)
                wanted += answers
        if wanted:
            if source != list(range(len(logits))):
                logits = logits.index_select(0, upload(source, torch.int64, logits.device))
            self._draw(logits, tuple(answer.row for answer in wanted), wanted)

    def _begin(self, ticket: int) -> list[_Answer]:
        """Give every answer to a prompt its row, which holds what the first one has read; those that are wanted."""
        with self._lock:
            work = self._works.pop(ticket)
        first = work.answers[0].row
        wanted = [answer for answer in work.answers if answer.request.finish_reason is None]
        self._answering |= {answer.row: answer for answer in work.answers}
        for answer in wanted:
            if answer.row != first:
                self._rows.copy_row(first, answer.row)
        for answer in work.answers:
            if answer not in wanted:
                self._free(answer)
        return wanted

    def _gather(self) -> None:
        """Move answers to low rows where a smaller batch would then do: a step reaches up to the highest row."""
        while self._answering:
            highest = max(self._answering)
            size = next(size for size in self._rows.sizes if size >= len(self._answering))
            if highest < size:
                return
            with self._lock:
                target = self._scheduler.move(highest, size)
            if target is None:
                return
            self._rows.copy_row(highest, target)
            self._rows.release(highest)
            self._sampler.move(highest, target)
            self._last[target].copy_(self._last[highest])
            answer = self._answering[target] = self._answering.pop(highest)
            answer.row = target

    def _decode(self, answers: list[_Answer]) -> None:
        going = [answer for answer in answers if answer.launched < self._most(answer)]
        if not going:
            return
        logits, lanes = self._rows.decode(tuple(answer.row for answer in going), self._last)
        by_row = {answer.row: answer for answer in going}
        self._draw(logits, lanes, [by_row.get(row) for row in lanes])

    def _most(self, answer: _Answer) -> int:
        """Tokens that an answer may have."""
        most = answer.request.sampling.max_tokens
        # The last token is never read, so it needs no position.
        return most if self._positions is None else min(most, self._positions + 1 - len(answer.request.prompt))

    def _draw(self, logits: Tensor, lanes: tuple[int, ...], answers: Sequence[_Answer | None]) -> None:
        """Draw a token per lane, and send them on their way to the host."""
        drawn = self._sampler(logits, lanes)
        whose = [(lane, answer) for lane, answer in enumerate(answers) if answer is not None]
        if all(row in (lane, -1) for lane, row in enumerate(lanes)):
            self._last[: len(lanes)].copy_(drawn.ids)  # what rows get that nobody uses does not matter
        else:
            lane, row = upload([(lane, answer.row) for lane, answer in whose], torch.int64, self._last.device).unbind(1)
            self._last.index_copy_(0, row, drawn.ids.index_select(0, lane))
        for _, answer in whose:
            answer.launched += 1
        self.tokens += len(whose)
        self._flights.append(_Flight(self.steps, whose, *_to_host(drawn)))

    def _land(self, flight: _Flight, waiters: Waiters) -> None:
        """Hand the tokens of a step to their requests; end those that are done."""
        flight.arrived()
        ids = flight.drawn.ids.tolist()
        told = dict(_told(flight.drawn))
        for lane, answer in flight.answers:
            if answer.request.finish_reason is not None:
                continue  # drawn before it was known to have ended
            answer.ids.append(ids[lane])
            logprob, top = told.get(lane, (None, ()))
            stopped = self._stops(answer, ids[lane])
            full = len(answer.ids) >= self._most(answer)
            token = Token(ids[lane], logprob, top[: answer.request.sampling.logprobs or 0])
            answer.request.put(token, waiters)
            if stopped or full:
                if answer.request.keep:
                    read = answer.request.prompt + tuple(answer.ids[: answer.launched - 1])
                    answer.request.state = self._rows.save_row(answer.row, read)
                answer.request.end("stop" if stopped else "length", waiters)
                self._free(answer)

    def _stops(self, answer: _Answer, token: int) -> bool:
        if answer.text is not None and answer.strings is not None:
            answer.strings.push(answer.text.push(token))
            if answer.strings.found is not None:
                return True
        return token in answer.ends

    def _free(self, answer: _Answer) -> None:
        """Give a row back."""
        del self._answering[answer.row]
        self._rows.release(answer.row)
        with self._lock:
            self._scheduler.finish(answer.row)


def _to_host(drawn: Drawn) -> tuple[Drawn, Callable[[], None]]:
    """Start copying to the host, and what waits for the end of it."""
    if drawn.ids.device.type != "cuda":
        tensors = (drawn.logprobs, drawn.top_ids, drawn.top_logprobs)
        return Drawn(drawn.ids.cpu(), drawn.told, *(None if t is None else t.cpu() for t in tensors)), lambda: None

    def copy(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    ids = copy(drawn.ids)
    assert ids is not None
    host = Drawn(ids, drawn.told, copy(drawn.logprobs), copy(drawn.top_ids), copy(drawn.top_logprobs))
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(drawn.ids.device))
    return host, arrived.synchronize


def _told(drawn: Drawn) -> Iterator[tuple[int, tuple[float, tuple[tuple[int, float], ...]]]]:
    """For each lane that asked: log-probability of its token, and the most likely ids with theirs."""
    if drawn.logprobs is None or drawn.top_ids is None or drawn.top_logprobs is None:
        return
    each = zip(drawn.told, drawn.logprobs.tolist(), drawn.top_ids.tolist(), drawn.top_logprobs.tolist(), strict=True)
    for lane, own, ids, values in each:
        yield lane, (own, tuple(zip(ids, values, strict=True)))
