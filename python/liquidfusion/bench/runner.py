"""One measurement from start to result document, as the command line and Python both run it."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from liquidfusion.bench import machine, parameters, results
from liquidfusion.bench.caches import HOW, SIZES, CacheMaker, CacheOptions
from liquidfusion.bench.models import Loaded
from liquidfusion.bench.rivals import Press
from liquidfusion.bench.tasks import TASKS
from liquidfusion.bench.tasks.task import Progress, Record, Task
from liquidfusion.exceptions import ConfigError


def find_task(name: str) -> Task:
    """Return a task by its name.

    Raises
    ------
    ConfigError
        There is no such task; the message lists them.
    """
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is unknown; accepted: {', '.join(TASKS)}")
    return TASKS[name]


def run(
    loaded: Loaded,
    task: str = "generate",
    cache: CacheMaker | None = None,
    *,
    baseline: bool | None = None,
    full: Sequence[Record] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure one task with one cache and return the result document.

    Parameters
    ----------
    loaded
        From :func:`liquidfusion.bench.models.load`.
    task
        A name from :data:`liquidfusion.bench.tasks.TASKS`.
    cache
        The cache to measure; None: the default strategy and size.
    baseline
        Measure the full cache, too, and put its figures beside; None: as is usual for the task.
    full
        Records of the full cache measured before with the same options; then it is not measured again.
    seed
        Seeds everything that is drawn.
    progress
        Called with steps done and steps in all.
    options
        Keyword options of the task; None leaves a default.

    Returns
    -------
    dict
        ``metadata``, ``results`` and ``metrics``, ready for :func:`liquidfusion.bench.results.save`.

    Raises
    ------
    ConfigError
        An unknown task or option, or a value out of range.
    """
    chosen = find_task(task)
    cache = cache or CacheOptions()
    if isinstance(cache, CacheOptions):
        cache.spec()
    known = chosen.options()
    given = {name: value for name, value in options.items() if value is not None}
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise ConfigError(f"task {task!r} has no option {unknown[0]!r}; accepted: {', '.join(known)}")
    _check(given)
    if "seed" in known:
        given["seed"] = seed
    torch.manual_seed(seed)
    needed = full is None and (chosen.baseline if baseline is None else baseline)
    own = cache == chosen.reference or (cache.strategy == "full" and isinstance(chosen.reference, CacheOptions))
    parts = 2 if needed and not own else 1
    start = time.perf_counter()
    records = chosen.measure(loaded.model, loaded.tokenizer, cache, progress=_part(progress, 0, parts), **given)
    seconds = time.perf_counter() - start
    if needed:
        full = records
        if not own:
            reference = chosen.reference
            full = chosen.measure(
                loaded.model, loaded.tokenizer, reference, progress=_part(progress, 1, parts), **given
            )
    figures = chosen.metrics(records, full)
    budgets = sorted({b for item in records if (b := item["result"]["scores"].get("budget")) is not None})
    told = {"seed": seed, "budgets_used": budgets, "input": source(given)}
    return {
        "metadata": metadata(loaded, task, cache, {**known, **given}, seconds, **told),
        "results": records,
        "metrics": {name: metric.as_dict() for name, metric in figures.items()},
    }


def _part(progress: Progress | None, part: int, parts: int) -> Progress | None:
    """Return a progress of one of several parts, which takes as long as each of the others."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(part * total + done, parts * total)

    return None if progress is None else report


def source(options: dict[str, Any]) -> dict[str, Any]:
    """Return where a task's input came from, and a digest by which results of another input are told apart."""
    path = options.get("data")
    given = options.get("text", options.get("prompts"))
    if path is None and given is None:
        return {"source": "built in", "sha256": None}
    if path is None:
        return {"source": "given", "sha256": hashlib.sha256(json.dumps(given).encode()).hexdigest()[:12]}
    path = Path(path)
    found = sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in found))
    return {"source": path.name, "sha256": digest.hexdigest()[:12]}


def _check(options: dict[str, Any]) -> None:
    for name in ("limit", "context", "chunk", "batch_size", "max_tokens"):
        value = options.get(name)
        if value is not None and any(item < 1 for item in (value if isinstance(value, list | tuple) else [value])):
            raise ConfigError(f"{name} {value} is not at least 1")
    if options.get("temperature", 0) < 0:
        raise ConfigError(f"temperature {options['temperature']:g} is negative; 0 or more is accepted")


def metadata(
    loaded: Loaded, task: str, cache: CacheMaker, options: dict[str, Any], seconds: float, **more: Any
) -> dict[str, Any]:
    """Return what a result must say about how it came to be: parameters, versions, machine."""
    device = loaded.model.device
    own = isinstance(cache, CacheOptions)
    values = cache.spec().params if isinstance(cache, CacheOptions) else {}
    how = cache.how if isinstance(cache, CacheOptions) else {}
    return {
        "model_name": loaded.name,
        "strategy": cache.strategy,
        **{name: getattr(cache, name, None) for name in (*SIZES, "bits")},
        "attention_type": "liquidfusion" if own else loaded.model.config._attn_implementation,
        **{name: values.get(name) for name in parameters.table()},
        "given": cache.heard() if isinstance(cache, CacheOptions) else {},
        **{name: how.get(name) for name in HOW},
        "task": task,
        "task_options": {name: value for name, value in options.items() if name not in ("text", "prompts", "seed")},
        "device": str(device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "created": results.now().isoformat(timespec="seconds"),
        "seconds": seconds,
        "versions": machine.versions(),
        "machine": machine.describe(device),
        "rival": cache.start(loaded.model).versions if isinstance(cache, Press) else None,
        **more,
    }
