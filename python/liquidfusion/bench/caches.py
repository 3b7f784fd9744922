"""The cache options of a run, and the one place where the benchmark makes a cache."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol
from weakref import WeakSet

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

import liquidfusion as lf
from liquidfusion import _core
from liquidfusion.bench import parameters as of_strategies
from liquidfusion.bench.notices import notice
from liquidfusion.exceptions import ConfigError
from liquidfusion.precision import Bits, bytes_of

POSITIONS = ("absolute", "cache", "auto")
"""What a token's position counts: the text, the tokens kept, or the first until the model's limit."""

HOW = ("positions", "threads", "graph", "compile", "overlap")
"""Options that say how a cache works and not which tokens it keeps."""

SIZES = ("cache_size", "budget", "memory")
"""Options that say how large a cache is; one of them at most."""

_RANKED: "WeakSet[Cache]" = WeakSet()


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """Which cache a run uses. What is not given is left to the strategy and to :class:`liquidfusion.KVCache`.

    Attributes
    ----------
    strategy
        A name from :func:`liquidfusion.bench.parameters.strategy_names`.
    cache_size
        Percent of the prompt, above 0 and up to 100.
    budget
        Tokens kept for each layer, row and kv head.
    memory
        Bytes for each row, all layers and heads. Of `cache_size`, `budget` and `memory` one is accepted.
    bits
        Of each number of keys and of values; None: the model's own.
    parameters
        Parameters of the strategies. Those that `strategy` does not listen to are checked and left out.
    how
        Name → value of those in :data:`HOW`.
    """

    strategy: str = "liquid_fusion"
    cache_size: float | None = None
    budget: int | None = None
    memory: int | None = None
    bits: tuple[int, int] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, **words: Any) -> "CacheOptions":
        """Return the options that these words say; None is as if a word was not there.

        ``bits`` and ``memory`` may be text: ``"4,2"``, ``"512MiB"``.

        Raises
        ------
        ConfigError
            There is no such option.
        """
        parameters: dict[str, Any] = {}
        how: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for name, value in words.items():
            if name not in option_names():
                raise ConfigError(f"{name!r} is no option of a cache; accepted: {', '.join(option_names())}")
            if value is None:
                continue
            if name in HOW:
                how[name] = value
            elif name in of_strategies.table():
                parameters[name] = value
            else:
                own[name] = bytes_of(value) if name == "memory" else value
        if (bits := Bits.of(own.get("bits"))) is not None:
            own["bits"] = (bits.keys, bits.values)
        return cls(**own, parameters=parameters, how=how)

    def as_dict(self) -> dict[str, Any]:
        """Return everything that was given, by name, as JSON can say it; the strategy comes first."""
        own = {name: getattr(self, name) for name in ("strategy", *SIZES)}
        bits = None if self.bits is None else list(self.bits)
        everything = {**own, "bits": bits, **self.parameters, **self.how}
        return {name: value for name, value in everything.items() if value not in (None, POSITIONS[0])}

    def heard(self) -> dict[str, Any]:
        """Return the parameters that the strategy listens to."""
        listens = of_strategies.listens(self.strategy)
        return {name: value for name, value in self.parameters.items() if name in listens}

    def spec(self, prompt_tokens: int = 1) -> _core.Spec:
        """Return the resolved parameters for a prompt of `prompt_tokens` tokens; a `memory` is not resolved.

        Raises
        ------
        ConfigError
            An unknown strategy, a value out of range, or more than one size.
        """
        heard = self.heard()
        given = [f"{name} {getattr(self, name)}" for name in SIZES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are given; one of {', '.join(SIZES)} is accepted")
        table = of_strategies.table()
        for name, value in self.parameters.items():
            table[name].check(value)
        positions, threads = (self.how.get(name) for name in HOW[:2])
        if positions not in (None, *POSITIONS):
            raise ConfigError(f"positions {positions!r} is unknown; accepted: {', '.join(POSITIONS)}")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads {threads} is not at least 1")
        Bits.of(self.bits)
        if self.memory is not None:
            bytes_of(self.memory)
        if self.cache_size is None:
            return _core.Spec(self.strategy, self.budget, **heard)
        sinks = int(_core.Spec(self.strategy, None, **heard).params.get("sink_size") or 0)
        budget = _core.budget_from_percent(self.cache_size, prompt_tokens, sinks)
        return _core.Spec(self.strategy, budget, **heard)

    def check(self) -> None:
        """Refuse what cannot be, and tell of parameters that the strategy does not listen to.

        Raises
        ------
        ConfigError
            As of :meth:`spec`.
        """
        self.spec()
        unheard = [name for name in self.parameters if name not in self.heard()]
        if unheard:
            own = [name for name in of_strategies.table() if name in of_strategies.listens(self.strategy)]
            listens = f"listens to {', '.join(own)}" if own else "listens to no parameter"
            notice(f"{self.strategy} does not use {', '.join(unheard)}: left out; it {listens}")

    def arguments(self) -> dict[str, Any]:
        """Return what :class:`liquidfusion.KVCache` and :func:`liquidfusion.use` take for these options."""
        chosen: dict[str, Any] = {"strategy": lf.Strategy(self.strategy, **self.heard())}
        chosen |= {name: getattr(self, name) for name in (*SIZES, "bits") if getattr(self, name) is not None}
        return chosen | {name: value for name, value in self.how.items() if value != POSITIONS[0]}

    def make(self, model: PreTrainedModel, prompt_tokens: int) -> lf.KVCache:
        """Return a fresh cache for prompts of `prompt_tokens` tokens."""
        cache = lf.KVCache(model, prompt_tokens=prompt_tokens, **self.arguments())
        if self.how.get("positions", POSITIONS[0]) != POSITIONS[0]:
            _RANKED.add(cache)
        return cache


def option_names() -> list[str]:
    """Return the name of every word that :meth:`CacheOptions.of` takes."""
    own = [f.name for f in fields(CacheOptions) if f.name not in ("parameters", "how")]
    return [*own, *of_strategies.table(), *HOW]


def ranked(cache: Cache) -> bool:
    """Whether a cache counts positions by rank, so that a text may run past those that the model knows."""
    return cache in _RANKED


@dataclass(frozen=True, slots=True)
class FrameworkCache:
    """The cache that transformers itself uses: the reference for speed and memory."""

    strategy: str = "transformers DynamicCache"

    def make(self, model: PreTrainedModel, prompt_tokens: int) -> Cache:  # noqa: ARG002 - it grows as it must
        """Return a fresh cache."""
        return DynamicCache(config=model.config)


class CacheMaker(Protocol):
    """What a task measures: :class:`CacheOptions`, :class:`FrameworkCache` or a rival."""

    @property
    def strategy(self) -> str:
        """The name under which results are filed."""

    def make(self, model: PreTrainedModel, prompt_tokens: int) -> Cache:
        """Return a fresh cache for prompts of `prompt_tokens` tokens."""


def facts(cache: Cache) -> dict[str, int | None]:
    """Return the bytes a used cache holds, its budget (None: unbounded) and the tokens it has evicted."""
    if isinstance(cache, lf.KVCache):
        return {"cache_bytes": cache.nbytes, "budget": cache.spec.budget, "evictions": cache.evictions}
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return {"cache_bytes": sum(t.nbytes for t in tensors if t is not None), "budget": None, "evictions": 0}
