"""The cells of a sweep: every combination of model, task, strategy, size and parameters, each once."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liquidfusion.bench import results, runner
from liquidfusion.bench.caches import CacheOptions
from liquidfusion.bench.models import check_name
from liquidfusion.bench.rivals import Rival, parse
from liquidfusion.exceptions import ConfigError
from liquidfusion.precision import bytes_of

REFERENCE = "reference"
"""Strategy name under which transformers' own cache is filed, where a task compares with it."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement of a sweep.

    Attributes
    ----------
    model, task
        As ``--model`` and ``--task``.
    cache
        The cache or rival, or None for the reference that the task compares with.
    options
        Keyword options of the task, as JSON can say them.
    seed, dtype
        The same for every cell.
    repeat
        Which of several measurements of the same it is, from 0.
    """

    model: str
    task: str
    cache: CacheOptions | Rival | None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    dtype: str = "auto"
    repeat: int = 0

    @property
    def strategy(self) -> str:
        """The name of the strategy."""
        return REFERENCE if self.cache is None else self.cache.strategy

    @property
    def method(self) -> str:
        """The strategy, and what of it was set."""
        if self.cache is None:
            return REFERENCE
        size = {"strategy", "cache_size", "budget", "memory"}
        words = [f"{name} {value}" for name, value in self.cache.as_dict().items() if name not in size]
        return ", ".join([self.strategy, *words])

    @property
    def size(self) -> str:
        """The size as a file name says it; unbounded caches have none."""
        if self.cache is None or self.cache.strategy == "full":
            return "unbounded"
        return results.size_label(self.cache.cache_size, self.cache.budget, self.cache.memory)

    @property
    def key(self) -> str:
        """What makes this cell this cell; equal keys mean equal results."""
        cache = None if self.cache is None else self.cache.as_dict()
        facts = [self.model, self.task, cache, dict(self.options), self.seed, self.dtype]
        facts += [self.repeat] if self.repeat else []
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]

    def path(self, directory: Path) -> Path:
        """Return where the result of this cell is kept."""
        name = results.file_stem(self.strategy, Path(self.model).name, self.size)
        return directory / f"{name}_{self.task}_{self.key}.json"


def reference(task: str) -> CacheOptions | None:
    """Return the cache of a task's reference; None is transformers' own."""
    chosen = runner.find_task(task).reference
    return chosen if isinstance(chosen, CacheOptions) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is combined with what.

    Attributes
    ----------
    tasks
        Task → its keyword options.
    cache_sizes, budgets, memory
        Percentages, tokens, and bytes for each row; none of any: each strategy's default size.
    bits
        Of keys and values, as :func:`liquidfusion.KVCache` takes them; none: the model's own.
    parameters
        Parameters of the strategies and options of the cache: a value, or a list of which each is taken.
    rival
        Other people's methods, as :func:`liquidfusion.bench.rivals.parse` takes them, at the same sizes.
    rival_python
        The interpreter for kvpress.
    repeat
        How often each cell is measured.
    """

    models: Sequence[str]
    tasks: Mapping[str, Mapping[str, Any]]
    strategies: Sequence[str]
    cache_sizes: Sequence[float] = ()
    budgets: Sequence[int] = ()
    memory: Sequence[Any] = ()
    bits: Sequence[Any] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rival: Sequence[str] = ()
    rival_python: str | None = None
    seed: int = 0
    dtype: str = "auto"
    repeat: int = 1

    def cells(self) -> list[Cell]:
        """Return the cells, the references first; a cache that a size or parameter does not change is measured once.

        Raises
        ------
        ConfigError
            A name is unknown, a size or a parameter out of range, or there is nothing to measure.
        ModelError
            A model is a directory that does not exist.
        """
        for name in ("models", "tasks", "strategies"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty: give at least one")
        if self.repeat < 1:
            raise ConfigError(f"repeat {self.repeat} is not at least 1")
        for model in self.models:
            check_name(model)
        for task in self.tasks:
            runner.find_task(task)
        caches: list[CacheOptions | Rival] = [c for strategy in self.strategies for c in self._caches(strategy)]
        sizes = self._sizes() or [{}]
        caches += [c for text in self.rival for size in sizes for c in parse(text, python=self.rival_python, **size)]
        pairs = list(itertools.product(self.models, self.tasks))
        wanted: list[tuple[str, str, CacheOptions | Rival | None]] = [(*pair, reference(pair[1])) for pair in pairs]
        wanted += [(*pair, cache) for pair in pairs for cache in caches]
        found: dict[tuple[str, str, str], Cell] = {}
        for (model, task, cache), repeat in itertools.product(wanted, range(self.repeat)):
            cell = Cell(model, task, cache, dict(self.tasks[task]), self.seed, self.dtype, repeat)
            found.setdefault((model, task, cell.key), cell)
        return list(found.values())

    def _sizes(self) -> list[dict[str, Any]]:
        sizes: list[dict[str, Any]] = [{"cache_size": float(size)} for size in self.cache_sizes]
        sizes += [{"budget": budget} for budget in self.budgets]
        return sizes + [{"memory": bytes_of(memory)} for memory in self.memory]

    def _caches(self, strategy: str) -> Iterator[CacheOptions]:
        """Yield the caches of a strategy, without what it does not listen to."""
        names = list(self.parameters)
        values = [v if isinstance(v, list | tuple) else [v] for v in self.parameters.values()]
        for size, bits, *chosen in itertools.product(self._sizes() or [{}], self.bits or [None], *values):
            cache = CacheOptions.of(strategy=strategy, bits=bits, **size, **dict(zip(names, chosen, strict=True)))
            cache.check()
            kept = (
                {}
                if strategy == "full"
                else {name: getattr(cache, name) for name in ("cache_size", "budget", "memory")}
            )
            yield CacheOptions(strategy=strategy, bits=cache.bits, parameters=cache.heard(), how=cache.how, **kept)
