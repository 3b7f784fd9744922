"""The cache options of a run, and the one place where the benchmark makes a cache."""

import math
import re
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
from liquidfusion.bench.parameters import strategy_names
from liquidfusion.exceptions import ConfigError

POSITIONS = ("absolute", "cache", "auto")
"""What a token's position counts: the text, the tokens kept, or the first until the model's limit."""

HOW = ("positions", "threads", "graph", "compile", "overlap")
"""Options that say how a cache works and not which tokens it keeps."""

SIZES = ("cache_size", "budget", "memory")
"""Options that say how large a cache is; one of them at most."""

BITS = ((16, 8, 4), (16, 8, 4, 2))
"""What keys and values may be coded with."""

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}
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
                own[name] = parse_bits(value) if name == "bits" else parse_bytes(value) if name == "memory" else value
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
        for name, number in (("bits", self.bits), ("memory", self.memory)):
            if number is not None:
                {"bits": parse_bits, "memory": parse_bytes}[name](number)
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
        heard = self.heard()
        chosen: dict[str, Any] = {"strategy": self.strategy}
        if heard and hasattr(lf, "Strategy"):
            chosen["strategy"] = lf.Strategy(self.strategy, **heard)
        else:
            chosen |= heard
        chosen |= {name: getattr(self, name) for name in SIZES if getattr(self, name) is not None}
        if self.bits is not None:
            chosen["bits"] = self.bits[0] if self.bits[0] == self.bits[1] else self.bits
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


def parse_bits(value: Any) -> tuple[int, int]:
    """Return the bits of keys and of values: ``4`` and ``"4"`` are both alike, ``"4,2"`` and ``(4, 2)`` differ.

    Raises
    ------
    ConfigError
        It is no such pair.
    """
    words = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        keys, values = (int(words[0]), int(words[-1])) if 1 <= len(words) <= 2 else (0, 0)
    except (TypeError, ValueError):
        keys = values = 0
    if keys not in BITS[0] or values not in BITS[1]:
        kinds = (", ".join(map(str, accepted)) for accepted in BITS)
        raise ConfigError(f"bits {value}: keys of {' and values of '.join(kinds)} bits are accepted, such as 4 or 4,2")
    return keys, values


def parse_bytes(value: Any) -> int:
    """Return a number of bytes: ``1000000``, ``"512MiB"``, ``"1.5 GB"``.

    Raises
    ------
    ConfigError
        It is no such number, or below 1.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?|)b?\s*", str(value).lower())
    size = math.floor(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise ConfigError(f"memory {value!r}: bytes with a unit are accepted, such as 512MiB or 2GB")
    return size


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


__all__ = [
    "BITS",
    "HOW",
    "POSITIONS",
    "SIZES",
    "CacheMaker",
    "CacheOptions",
    "FrameworkCache",
    "facts",
    "option_names",
    "parse_bits",
    "parse_bytes",
    "ranked",
    "strategy_names",
]
