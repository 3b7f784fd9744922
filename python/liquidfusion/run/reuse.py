"""Which slots of a group the next decode steps overwrite, on their device, and the choice of more beside them.

The device consumes reuse queues through a ring of `2 * interval` slot numbers per (layer, row, kv head). Every
`interval` steps the scores are copied to pinned memory on a second stream, the Rust core chooses victims while the next
step runs, and they go into the half of the ring that is already consumed. A slot is only ever reused through the ring,
at a step fixed beforehand, so the overlapped run equals the stalling one bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liquidfusion.exceptions import CacheError
from liquidfusion.state.group import Group


class Reuse:
    """The reuse of one group's slots.

    Parameters
    ----------
    group : Group
        Allocated, all of its layers on one device.
    device : torch.device
        That device.
    overlap : bool
        False waits for each decision instead of running beside it; same results, slower.
    """

    def __init__(self, group: Group, device: torch.device, overlap: bool) -> None:
        self.group, self.ledger, self.spec = group, group.ledger, group.spec
        self.device, self._overlap = device, overlap
        self._gpu = device.type == "cuda"
        ring = (*self.ledger.shape[:3], 2 * self.spec.interval)
        with torch.inference_mode(False):
            self.ring = torch.zeros(ring, dtype=torch.int32, device=device)
            self._ring_host = torch.zeros(ring, dtype=torch.int32, device="cpu", pin_memory=self._gpu)
            self._peeked = torch.zeros(ring, dtype=torch.int32, device="cpu")
        self._staging: Tensor | None = None
        self._distinct: Tensor | None = None  # of the decision under way
        self._worth: Tensor | None = None  # the same where it is computed
        if self._gpu:
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._scores_copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ring_copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._steps = 0  # since `start`, all launched
        self._replayed = 0  # of them, known to the host's ledger
        self._due = 0  # step after which the ring must be refilled
        self._deciding = False

    @property
    def pending(self) -> int:
        """Steps that the host's ledger does not know of yet."""
        return self._steps - self._replayed

    def start(self) -> None:
        """Take over from the host's ledger, which is complete."""
        self.ledger.wait()
        self._steps = self._replayed = 0
        if self._gpu:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        self._refill()
        self.wait()

    def wait(self) -> None:
        """Let the next step see the ring as it was last written."""
        if self._gpu:
            torch.cuda.current_stream(self.device).wait_event(self._ring_copied)

    def stepped(self) -> None:
        """Note that a step was launched, and decide where it is time."""
        self._steps += 1
        self._join()
        if self._steps >= self._due:
            self._decide()

    def stop(self) -> None:
        """Bring the host's ledger up to date and hand over to it."""
        self._join()
        self._replay(last_open=False)
        if self._steps:
            self.ledger.attended([1] * self.ledger.batch)

    def abandon(self) -> None:
        """Forget the steps taken, once the device has."""
        self._steps = self._replayed = 0
        self._deciding = False

    def _decide(self) -> None:
        """At a watermark: let the host's ledger catch up and, where a queue runs low, start copying the scores."""
        self._replay(last_open=True)
        due = bool(self.ledger.due())
        self._distinct = self._distinctness() if due and self.spec.distinct else None
        if self.spec.scored and due:
            self._deciding = True
            self._copy_scores()
            if not self._overlap or not self._gpu:
                self._join()
            else:
                self._due = self._steps + 2 * self.spec.interval  # set for good when the decision is joined
        else:
            self.ledger.finish(self._distinct)
            if self._gpu:
                # The host may be ahead: the ring is written once the step launched last has read its entry.
                self._copies.wait_stream(torch.cuda.current_stream(self.device))
            self._refill()

    def _copy_scores(self) -> None:
        host = self.ledger.host.attention()
        assert host is not None
        layers = [self.ledger.at(index, self.device).attention() or () for index in range(self.ledger.layers)]
        here = [scores for kind in zip(*layers, strict=True) for scores in kind]
        if not self._gpu:
            torch._foreach_copy_([scores for kind in host for scores in kind], here)
            return
        if self._staging is None:
            with torch.inference_mode(False):
                self._staging = torch.empty((2, *self.ledger.shape), dtype=torch.float32, device=self.device)
        torch._foreach_copy_(list(self._staging.flatten(0, 1)), here)
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            for own, newest in zip(host, self._staging, strict=True):
                own.copy_(newest, non_blocking=True)
            if self._worth is not None and self._distinct is not None:
                self._distinct.copy_(self._worth, non_blocking=True)
            self._scores_copied.record(self._copies)

    def _distinctness(self) -> Tensor:
        """Distinctness of the tokens that no victim is chosen of yet, `[layers, batch, kv_heads, slots]` on the CPU.

        On a GPU where scores are copied, too, it is there when they are.
        """
        if not (self._gpu and self.spec.scored):
            return self.group.distinctness()
        if self._worth is None:
            with torch.inference_mode(False):
                self._worth = torch.empty(self.ledger.shape, dtype=torch.float32, device=self.device)
                self._worth_host = torch.empty(self.ledger.shape, dtype=torch.float32, device="cpu", pin_memory=True)
        size, slots = self.ring.shape[3], self.ledger.slots
        # What is left of the queues is in the ring, from the entry that the next step takes.
        lengths = torch.tensor(self.ledger.core.queue_lengths(), device=self.device)
        waiting = (torch.arange(size, device=self.device) - self._replayed) % size < lengths[:, None]
        for index, layer in enumerate(self.group.slots):
            assert layer is not None
            held = torch.nn.functional.pad(self.ledger.at(index, self.device).positions >= 0, (0, 1))
            taken = self.ring[index].long().where(waiting[:, None], slots)
            held.scatter_(2, taken, False)
            self._worth[index] = layer.distinctness(held[..., :slots].contiguous())
        return self._worth_host

    def _join(self) -> None:
        """Finish the decision under way, if any, and send its victims to the ring."""
        if not self._deciding:
            return
        self._deciding = False
        if self._gpu:
            self._scores_copied.synchronize()
        self.ledger.finish(self._distinct)
        self._refill()

    def _refill(self) -> None:
        """Write the queue's first entries into the ring; what is there already is written again unchanged."""
        core, size = self.ledger.core, self._peeked.shape[3]
        if self._gpu:
            self._ring_copied.synchronize()  # the pinned buffer is free again
        core.peek(self._peeked, [0] * self.ledger.batch)
        self._ring_host.copy_(self._peeked.roll(self._replayed % size, 3))
        self._due = self._replayed + min(size, *core.queue_lengths()) - self.spec.interval
        if not self._gpu:
            self.ring.copy_(self._ring_host)
            return
        with torch.cuda.stream(self._copies):
            self.ring.copy_(self._ring_host, non_blocking=True)
            self._ring_copied.record(self._copies)

    def _replay(self, last_open: bool) -> None:
        """Tell the host's ledger of the steps since; the last one stays open for the decision that follows it."""
        core, ones = self.ledger.core, [1] * self.ledger.batch
        for step in range(self._replayed, self._steps):
            core.begin(ones, self.ledger.written)
            if step + 1 < self._steps or not last_open:
                if self.ledger.due() and step + 1 < self._steps:
                    raise CacheError("a decision was missed: this is a defect of liquidfusion")
                self.ledger.finish()
        self._replayed = self._steps
