"""The thread of an engine: it steps while there is something to do, and callers come from any thread or event loop."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from liquidfusion.exceptions import CacheError, ConfigError
from liquidfusion.run.request import Request
from liquidfusion.run.sampling import Sampling
from liquidfusion.run.stepper import Rows, Stepper
from liquidfusion.state.row import RowState


@dataclass(frozen=True)
class Stats:
    """What an engine has done so far, and what it does now.

    `active`: rows in use. `waiting`: requests without a row. `tokens`: of answers. `prompt_tokens`: read, without the
    `cached_tokens` that rows held already. `steps`: of its loop. `evictions`: summed over layers, rows and heads.
    `nbytes`: of all rows.
    """

    rows: int
    active: int
    waiting: int
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    steps: int
    evictions: int
    nbytes: int


class Loop:
    """A thread that steps, and what callers may ask of it.

    Parameters
    ----------
    rows : Rows
        The model.
    stepper : Stepper
        Serves requests from its rows.
    """

    def __init__(self, rows: Rows, stepper: Stepper) -> None:
        self._own, self._stepper = rows, stepper
        self._wake = threading.Condition()
        self._refusing = self._closed = False
        self._died: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="liquidfusion-engine", daemon=True)
        self._thread.start()

    @property
    def rows(self) -> int:
        """Requests that run side by side."""
        return self._own.rows

    @property
    def vocabulary(self) -> int:
        """Token ids that the model knows."""
        return self._own.vocabulary

    @property
    def positions(self) -> int | None:
        """Tokens that a sequence may have; None for any number."""
        return self._own.most_positions

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return self._own.nbytes // self._own.rows

    @property
    def healthy(self) -> bool:
        """Whether it can answer."""
        return self._died is None and not self._closed

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        *,
        n: int = 1,
        keep: bool = False,
        resume: RowState | None = None,
    ) -> list[Request]:
        """Ask for answers to a prompt; returns at once, from any thread.

        Parameters
        ----------
        prompt : sequence of int
            All token ids of the prompt.
        sampling : Sampling
            How tokens are chosen. With a seed, the i-th answer is drawn by (seed, i).
        n : int
            Answers; the prompt is read once.
        keep : bool
            Whether `request.state` is the row's state when an answer has ended by itself.
        resume : RowState, optional
            What a row held that has read the beginning of the prompt: only the rest is read.

        Returns
        -------
        list of Request
            One for each answer.

        Raises
        ------
        ConfigError
            The request could never be answered.
        QueueFull
            As many requests wait as may.
        CacheError
            The engine is closed, drains or has died, or `resume` is another engine's.
        """
        if not isinstance(sampling, Sampling):
            raise ConfigError(f"sampling is a {type(sampling).__name__}; a liquidfusion.Sampling is accepted")
        seed = int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed
        with self._wake:
            if self._died is not None:
                raise CacheError(f"the engine has failed ({type(self._died).__name__}: {self._died}); build a new one")
            if self._refusing:
                raise CacheError("the engine is closed or about to: it takes no more requests")
            requests = self._stepper.submit(
                prompt, sampling, n=n, seed=seed, keep=keep, resume=resume, cancel=self._cancel
            )
            self._wake.notify_all()
        return requests

    def stats(self) -> Stats:
        """What it has done so far, and what it does now."""
        active, waiting = self._stepper.counts()
        stepper, own = self._stepper, self._own
        return Stats(
            rows=own.rows,
            active=active,
            waiting=waiting,
            tokens=stepper.tokens,
            prompt_tokens=stepper.prompt_tokens,
            cached_tokens=stepper.cached_tokens,
            steps=stepper.steps,
            evictions=own.evictions,
            nbytes=own.nbytes,
        )

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait until those it has are answered.

        Returns
        -------
        bool
            False if `timeout` seconds were not enough.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._wake:
            self._refusing = True
            while not (self._stepper.idle or self._closed or self._died):
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._wake.wait(left)
        return True

    def close(self) -> None:
        """Cancel what runs and end; the model is as it was before."""
        with self._wake:
            self._refusing = self._closed = True
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cancel(self, request: Request) -> None:
        with self._wake:
            self._stepper.cancel(request)
            self._wake.notify_all()

    def _run(self) -> None:
        failed = False
        try:
            with torch.inference_mode():
                while self._goes_on():
                    try:
                        self._stepper.step()
                        failed = False
                    except Exception as error:
                        # Requests that have rows are lost; once more at once, and it is not their fault.
                        self._stepper.fail(error, everyone=failed)
                        if failed:
                            raise
                        failed = True
        except BaseException as error:
            self._died = error
        finally:
            with self._wake:
                self._refusing = True
                self._wake.notify_all()
            self._stepper.end(self._died)

    def _goes_on(self) -> bool:
        with self._wake:
            if self._stepper.idle:
                self._wake.notify_all()  # those who drain
            self._wake.wait_for(lambda: self._closed or not self._stepper.idle)
            return not self._closed
