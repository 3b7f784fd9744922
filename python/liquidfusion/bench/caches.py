"""The cache options of a run, and the one place where the benchmark makes a cache."""

from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

import liquidfusion as lf
from liquidfusion import _core
from liquidfusion.cache import make_spec
from liquidfusion.exceptions import ConfigError


def strategy_names() -> list[str]:
    """Return the name of every strategy the core registers, in its order."""
    return [str(entry["name"]) for entry in _core.strategies()]


POSITIONS = ("absolute", "cache", "auto")
"""What a token's position counts: the text, the tokens kept, or the first until the model's limit."""

HOW = ("positions", "threads", "graph", "compile", "overlap")
"""Options that say how a cache works and not which tokens it keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """Which cache a run uses. None leaves a parameter to the strategy's own default.

    Attributes
    ----------
    strategy
        A name from :func:`strategy_names`.
    cache_size
        Percent of the prompt, above 0 and up to 100.
    budget
        Tokens kept for each layer, row and kv head; excludes `cache_size`.
    window_size, sink_size, sink_update_rate, heavy_ratio, recent_ratio, peak_ratio, eviction_interval, sinks
        As :class:`liquidfusion.KVCache` takes them.
    value_weighted, look_gap, peak_reach, averaged, age_half_life, positions, threads, graph, compile, overlap
        Likewise.
    """

    strategy: str = "liquid_fusion"
    cache_size: float | None = None
    budget: int | None = None
    window_size: int | None = None
    sink_size: int | None = None
    sink_update_rate: float | None = None
    heavy_ratio: float | None = None
    recent_ratio: float | None = None
    peak_ratio: float | None = None
    eviction_interval: int | None = None
    sinks: str | None = None
    value_weighted: bool | None = None
    look_gap: int | None = None
    peak_reach: int | None = None
    averaged: bool | None = None
    age_half_life: int | None = None
    positions: str | None = None
    threads: int | None = None
    graph: bool | None = None
    compile: bool | None = None
    overlap: bool | None = None

    def given(self) -> dict[str, Any]:
        """Return what is not left to the strategy or to `KVCache`, the strategy excluded."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "strategy"}
        defaults = {None, POSITIONS[0]}
        return {name: value for name, value in values.items() if value not in defaults}

    def spec(self, prompt_tokens: int = 1) -> _core.Spec:
        """Return the resolved parameters for a prompt of `prompt_tokens` tokens.

        Raises
        ------
        ConfigError
            An unknown strategy, a parameter out of range, or both `cache_size` and `budget`.
        """
        if self.strategy not in strategy_names():
            raise ConfigError(f"strategy {self.strategy!r} is unknown; accepted: {', '.join(strategy_names())}")
        if self.positions not in (None, *POSITIONS):
            raise ConfigError(f"positions {self.positions!r} is unknown; accepted: {', '.join(POSITIONS)}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads {self.threads} is not at least 1")
        given = {name: value for name, value in self.given().items() if name not in HOW}
        return make_spec(self.strategy, given.pop("budget", None), prompt_tokens=prompt_tokens, **given)

    def make(self, model: PreTrainedModel, prompt_tokens: int) -> lf.KVCache:
        """Return a fresh cache for prompts of `prompt_tokens` tokens."""
        return lf.KVCache(model, self.strategy, prompt_tokens=prompt_tokens, **self.given())


PARAMETERS = tuple(f.name for f in fields(CacheOptions) if f.name not in ("strategy", "cache_size", "budget", *HOW))
"""Names of the parameters of the strategies."""


@dataclass(frozen=True, slots=True)
class FrameworkCache:
    """The cache that transformers itself uses: the reference for speed and memory."""

    strategy: str = "transformers DynamicCache"

    def make(self, model: PreTrainedModel, prompt_tokens: int) -> Cache:  # noqa: ARG002 - it grows as it must
        """Return a fresh cache."""
        return DynamicCache(config=model.config)


CacheMaker = CacheOptions | FrameworkCache


def facts(cache: Cache) -> dict[str, int | None]:
    """Return the bytes a used cache holds, its budget (None: unbounded) and the tokens it has evicted."""
    if isinstance(cache, lf.KVCache):
        return {"cache_bytes": cache.nbytes, "budget": cache.spec.budget, "evictions": cache.evictions}
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return {"cache_bytes": sum(t.nbytes for t in tensors if t is not None), "budget": None, "evictions": 0}
