"""The engine's scheduler: nothing is lost, no row is used twice, chunks end where the request alone says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from liquidfusion.exceptions import ConfigError, QueueFull
from liquidfusion.run.scheduler import Scheduler, boundaries

ROWS, CHUNK, STEP, LIMIT = 4, 8, 20, 3


class Machine(RuleBasedStateMachine):
    """Drives a scheduler and keeps book of what it owes to whom, in the plainest way."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(ROWS, chunk=CHUNK, step_tokens=STEP, queue_limit=LIMIT)
        self.tickets = self.quiet = 0
        self.waiting: list[tuple[int, int, int]] = []
        self.reading: dict[int, dict[str, Any]] = {}
        self.decoding: dict[int, int] = {}

    @rule(tokens=st.integers(1, 40), answers=st.integers(1, 3))
    def submit(self, tokens: int, answers: int) -> None:
        free, stuck = self.scheduler.free, False
        for _, _, needed in self.waiting:
            stuck = stuck or needed > free
            free -= needed
        try:
            self.scheduler.submit(self.tickets, tokens, answers)
        except QueueFull:
            assert len(self.waiting) >= LIMIT
            return
        self.waiting.append((self.tickets, tokens, answers))
        self.tickets += 1

    @rule(cached=st.integers(0, 40))
    def step(self, cached: int) -> None:
        for ticket, rows in self.scheduler.join():
            first = self.waiting.pop(0)
            assert (ticket, len(rows)) == (first[0], first[2]), "first come, first served"
            assert not set(rows) & self.used()
            at = cached if cached < first[1] else 0
            self.scheduler.start_at(ticket, at)
            ends = boundaries(first[1], CHUNK, at)
            self.reading[ticket] = {"rows": rows, "ends": ends, "at": at, "since": 0}
        plan = self.scheduler.plan()
        # A prompt of which one token is left decodes it.
        assert sorted(plan.entering) == sorted(t for t, job in self.reading.items() if job["ends"] == [job["at"] + 1])
        for ticket in plan.entering:
            self.decoding |= dict.fromkeys(self.reading.pop(ticket)["rows"], ticket)
        assert list(plan.decoding) == sorted(self.decoding)
        assert len({piece.row for piece in plan.pieces}) == len(plan.pieces)
        length = sum(piece.stop - piece.start for piece in plan.pieces)
        assert len(plan.pieces) <= 1 or length + len(plan.decoding) <= STEP
        self.quiet = 0 if plan.pieces else self.quiet + 1
        assert plan.pieces or not self.reading or (self.decoding and self.quiet <= 2), "someone goes on"
        assert plan.pieces or len(self.reading) < 2 or 4 * len(self.reading) <= len(self.decoding)
        for piece in plan.pieces:
            job = self.reading[piece.ticket]
            assert piece.row == job["rows"][0]
            assert (piece.start, piece.stop) == (job["at"], job["ends"][0])
            job["at"], job["since"] = job["ends"].pop(0), 0
            assert piece.last == (not job["ends"])
            if piece.last:
                self.decoding |= dict.fromkeys(job["rows"], piece.ticket)
                del self.reading[piece.ticket]
        # The oldest prompt gets every second chunk at least.
        for number, job in enumerate(self.reading.values()):
            job["since"] += 1
            assert number or job["since"] <= 6

    @precondition(lambda self: self.decoding)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.decoding)))
        self.scheduler.finish(row)
        del self.decoding[row]

    @precondition(lambda self: self.decoding)
    @rule(data=st.data(), below=st.integers(0, ROWS))
    def move(self, data: st.DataObject, below: int) -> None:
        row = data.draw(st.sampled_from(sorted(self.decoding)))
        free = set(range(ROWS)) - self.used()
        target = self.scheduler.move(row, below)
        assert target == (min(free) if free and min(free) < below else None)
        if target is not None:
            self.decoding[target] = self.decoding.pop(row)

    @rule(waiting=st.booleans())
    def clear(self, waiting: bool) -> None:
        self.scheduler.clear(waiting)
        self.reading, self.decoding = {}, {}
        self.waiting = [] if waiting else self.waiting

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.integers(0, self.tickets - 1))
        rows = set(self.scheduler.cancel(ticket))
        expected = {row for row, owner in self.decoding.items() if owner == ticket}
        self.waiting = [job for job in self.waiting if job[0] != ticket]
        expected |= set(self.reading.pop(ticket, {"rows": ()})["rows"])
        self.decoding = {row: owner for row, owner in self.decoding.items() if owner != ticket}
        assert rows == expected

    def used(self) -> set[int]:
        return {row for job in self.reading.values() for row in job["rows"]} | set(self.decoding)

    @invariant()
    def counts(self) -> None:
        assert self.scheduler.waiting == len(self.waiting)
        assert self.scheduler.active == len(self.used())
        assert self.scheduler.free == ROWS - len(self.used())
        assert self.scheduler.idle == (not self.waiting and not self.used())

    def teardown(self) -> None:
        # Whatever happened, everybody is served in the end.
        steps = 0
        while self.waiting or self.reading or self.decoding:
            for row in list(self.decoding):
                self.scheduler.finish(row)
                del self.decoding[row]
            self.step(0)
            steps += 1
            assert steps < 500
        assert self.scheduler.idle


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestScheduler = Machine.TestCase


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_the_other_way_round() -> None:
    scheduler = Scheduler(8, chunk=10, step_tokens=10)
    scheduler.submit(0, 1000)
    list(scheduler.join())
    scheduler.plan()
    order = []
    for ticket in range(1, 8):
        scheduler.submit(ticket, 10)
        list(scheduler.join())
    for _ in range(20):
        order += [piece.ticket for piece in scheduler.plan().pieces]
    assert order.index(7) < 15
    assert order[:14].count(0) == 7


def test_most_steps_of_many_have_no_chunk_of_a_lone_prompt() -> None:
    scheduler = Scheduler(8, chunk=10, step_tokens=10)
    for ticket in range(3):
        scheduler.submit(ticket, 1)
        list(scheduler.join())
        assert scheduler.plan().entering == (ticket,)
    scheduler.submit(3, 100)
    list(scheduler.join())
    chunks = [bool(scheduler.plan().pieces) for _ in range(30)]
    assert sum(chunks) == 10
    assert not any(chunks[i] and chunks[i + 1] for i in range(29))


def test_short_chunks_share_a_step_as_far_as_it_has_tokens() -> None:
    scheduler = Scheduler(9, chunk=512, step_tokens=1024)
    for ticket in range(6):
        scheduler.submit(ticket, 40)
        list(scheduler.join())
    # A chunk counts 256 tokens at least.
    assert [len(scheduler.plan().pieces) for _ in range(2)] == [4, 2]
    scheduler.submit(6, 2000)
    scheduler.submit(7, 300)
    list(scheduler.join())
    sizes = [sorted(piece.stop - piece.start for piece in scheduler.plan().pieces) for _ in range(12)]
    assert [size for size in sizes if size] == [[300, 512], [512], [512], [464]]


def test_as_many_wait_as_may_and_those_who_find_a_row_do_not_count() -> None:
    scheduler = Scheduler(2, chunk=4, step_tokens=8, queue_limit=0)
    scheduler.submit(0, 3)
    scheduler.submit(1, 3)
    with pytest.raises(QueueFull, match="queue_limit=0"):
        scheduler.submit(2, 3)
    assert [ticket for ticket, _ in scheduler.join()] == [0, 1]
    scheduler.plan()
    scheduler.finish(0)
    scheduler.submit(3, 3)


def test_one_who_needs_many_rows_is_not_overtaken() -> None:
    scheduler = Scheduler(3, chunk=4, step_tokens=8)
    scheduler.submit(0, 2)
    assert [ticket for ticket, _ in scheduler.join()] == [0]
    scheduler.submit(1, 2, answers=3)
    scheduler.submit(2, 2)
    assert not list(scheduler.join())
    scheduler.plan()
    scheduler.finish(0)
    assert [rows for _, rows in scheduler.join()] == [(0, 1, 2)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheduler(0, chunk=1, step_tokens=1), "rows=0"),
        (lambda: Scheduler(1, chunk=0, step_tokens=1), "chunk=0"),
        (lambda: Scheduler(1, chunk=1, step_tokens=0), "step_tokens=0"),
        (lambda: Scheduler(1, chunk=1, step_tokens=1, queue_limit=-1), "queue_limit=-1"),
        (lambda: Scheduler(2, chunk=1, step_tokens=1).submit(0, 0), "0 tokens"),
        (lambda: Scheduler(2, chunk=1, step_tokens=1).submit(0, 5, answers=3), "n=3 answers; 1 to 2"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
