"""``sweep``: many measurements in one go, each saved as it finishes, continued where it stopped."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from liquidfusion import files
from liquidfusion.bench import models, notices, results, runner
from liquidfusion.bench.caches import FrameworkCache
from liquidfusion.bench.sweep.cells import Cell, reference
from liquidfusion.exceptions import ConfigError, LiquidFusionError


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a cell ended: with a document, or with an error."""

    cell: Cell
    document: dict[str, Any] | None
    error: str | None = None
    resumed: bool = False


def sweep(
    work: Sequence[Cell],
    directory: Path,
    *,
    devices: Sequence[str] = ("auto",),
    progress: Callable[[Cell, int, int], None] | None = None,
) -> Iterator[Outcome]:
    """Measure every cell that `directory` does not hold yet, and yield each outcome as it is there.

    A cell that fails is recorded beside the results with its error (``….error.json``), and tried again next time.

    Parameters
    ----------
    devices
        One process works on each; a single device is worked on in this process.
    progress
        Called with the cell at work and its steps; in this process only.

    Raises
    ------
    OSError
        The directory cannot be written.
    LiquidFusionError
        One of several processes died.
    """
    files.check_writable(directory)
    todo: list[Cell] = []
    for cell in work:
        document = finished(cell, directory)
        if document is None:
            todo.append(cell)
        else:
            yield Outcome(cell, document, resumed=True)
    # references first: the others are compared with them
    first = [cell for cell in todo if _is_reference(cell)]
    others = [cell for cell in todo if not _is_reference(cell)]
    if len(devices) == 1:
        for cell in first + others:
            yield measure(cell, directory, devices[0], progress)
        return
    context = get_context("spawn")
    queue = context.Queue()
    for device in devices:
        queue.put(device)
    threads = max(1, (torch.get_num_threads() // len(devices)))
    before, waiting = set(active_children()), set[Future[Outcome]]()
    with ProcessPoolExecutor(len(devices), context, initializer=_start, initargs=(queue, threads)) as pool:
        try:
            for batch in (first, others):
                with _interrupts_held():  # workers start here: ending them is for this process
                    waiting = {pool.submit(_measure_there, cell, directory) for cell in batch}
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise LiquidFusionError("a worker died, perhaps out of memory; start again to continue") from error
        finally:
            for worker in set(active_children()) - before if waiting else ():
                worker.terminate()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back; a process that starts meanwhile never sees it, and this one does afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    noted: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    # Another thread may take the signal, and Python then runs the handler in the main one all the same.
    replaced = handler is not None and threading.current_thread() is threading.main_thread()
    if replaced:
        signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if replaced:
            signal.signal(signal.SIGINT, handler)
        if noted:
            signal.raise_signal(signal.SIGINT)


def _is_reference(cell: Cell) -> bool:
    """Whether other cells are compared with this one."""
    return cell.cache == reference(cell.task)


def finished(cell: Cell, directory: Path) -> dict[str, Any] | None:
    """Return the saved document of a cell, or None."""
    path = cell.path(directory)
    try:
        document = results.load(path)
    except (OSError, ValueError):
        return None
    return document if document["metadata"].get("cell") == cell.key else None


def measure(
    cell: Cell, directory: Path, device: str, progress: Callable[[Cell, int, int], None] | None = None
) -> Outcome:
    """Measure one cell and save its result, or its error."""
    path = cell.path(directory)
    failed = path.with_suffix(".error.json")
    try:
        document = _document(cell, directory, device, progress)
    except Exception as error:  # whatever a cell dies of, the others go on
        text = f"{type(error).__name__}: {models.first_line(error)}"
        cache = None if cell.cache is None else cell.cache.as_dict()
        record = {"cell": cell.key, "model": cell.model, "task": cell.task, "cache": cache, "error": text}
        files.write_text(failed, results.to_json(record))
        return Outcome(cell, None, text)
    files.write_text(path, results.to_json(document))
    failed.unlink(missing_ok=True)
    return Outcome(cell, document)


def _document(
    cell: Cell, directory: Path, device: str, progress: Callable[[Cell, int, int], None] | None
) -> dict[str, Any]:
    loaded = _model(cell.model, device, cell.dtype)
    options = {name: Path(value) if name == "data" else value for name, value in cell.options.items()}
    full = None
    if not _is_reference(cell):
        document = finished(replace(cell, cache=reference(cell.task)), directory)
        full = None if document is None else document["results"]
    document = runner.run(
        loaded,
        cell.task,
        FrameworkCache() if cell.cache is None else cell.cache,
        baseline=_is_reference(cell),
        full=full,
        seed=cell.seed,
        progress=None if progress is None else lambda done, total: progress(cell, done, total),
        **options,
    )
    document["metadata"] |= {"cell": cell.key, "strategy": cell.strategy, "repeat": cell.repeat}
    return document


@lru_cache(maxsize=1)
def _model(name: str, device: str, dtype: str) -> models.Loaded:
    return models.load(name, device=device, dtype=dtype)


_DEVICE = ["auto"]
_NOTICES = ExitStack()
"""What a worker process works on, and what it keeps open to its end."""


def _start(queue: Any, threads: int) -> None:
    """Take a device for this process, and no more than its share of the cores."""
    _DEVICE[0] = queue.get()
    torch.set_num_threads(threads)
    _NOTICES.enter_context(notices.as_lines())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A sweep that is killed must not leave workers behind that hold a GPU."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _measure_there(cell: Cell, directory: Path) -> Outcome:
    return measure(cell, directory, _DEVICE[0])


def devices_of(device: str, jobs: int) -> list[str]:
    """Return one device for each of `jobs` processes: several CUDA devices in turn, else the same for all.

    Raises
    ------
    ConfigError
        `jobs` is below 1, or the device unknown.
    """
    if jobs < 1:
        raise ConfigError(f"jobs {jobs} is not at least 1")
    place = models.resolve_device(device)
    if place.type != "cuda" or place.index is not None:
        return [device] * jobs
    return [f"cuda:{index % torch.cuda.device_count()}" for index in range(jobs)]
