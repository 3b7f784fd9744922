"""What users choose: a strategy with its parameters, and how a cache runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from liquidfusion import _core
from liquidfusion.exceptions import ConfigError

PARAMETERS: Mapping[str, Mapping[str, Any]] = MappingProxyType({row["name"]: row for row in _core.parameters()})
"""Every parameter of every strategy by name: the core's one table of kinds, ranges and help."""

SHORT = ("window_size", "sink_size", "sink_update_rate", "heavy_ratio", "recent_ratio")
"""Parameters that `KVCache` and `use` take by keyword, as the original research code did."""


class Strategy:
    """A strategy and its parameters, for `KVCache(model, strategy)`.

    Parameters
    ----------
    name : str
        A name from `liquidfusion.strategies()`.
    **parameters
        Those that the strategy listens to (`liquidfusion.strategies()` lists them; docs/strategies.md says what each
        does). One that is left out or None is the strategy's own default.

    Raises
    ------
    ConfigError
        The name is unknown, or a parameter is unknown, out of range or not one of the strategy's.

    Examples
    --------
    >>> Strategy("liquid_fusion", sink_size=8)
    Strategy('liquid_fusion', sink_size=8)
    """

    __slots__ = ("name", "parameters")
    name: str
    parameters: Mapping[str, Any]

    def __init__(self, name: str = "liquid_fusion", /, **parameters: Any) -> None:
        given = {key: value for key, value in parameters.items() if value is not None}
        # How long an interval may be depends on the budget.
        _core.Spec(name, None, **{key: value for key, value in given.items() if key != "eviction_interval"})
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "parameters", MappingProxyType(given))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Strategy cannot be changed; build Strategy({self.name!r}, {name}={value!r}) instead")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Strategy) and (self.name, self.parameters) == (other.name, other.parameters)

    def __hash__(self) -> int:
        return hash((self.name, frozenset(self.parameters.items())))

    def __repr__(self) -> str:
        return f"Strategy({', '.join([repr(self.name), *(f'{k}={v!r}' for k, v in self.parameters.items())])})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _strategy, (self.name, dict(self.parameters))

    def spec(self, budget: int | None = None) -> _core.Spec:
        """Resolve for a budget in tokens; None: what `window_size` asks for."""
        return _core.Spec(self.name, budget, **self.parameters)


def _strategy(name: str, parameters: dict[str, Any]) -> Strategy:
    return Strategy(name, **parameters)


def chosen(strategy: str | Strategy, short: Mapping[str, Any], misplaced: Mapping[str, Any]) -> Strategy:
    """Put together what a caller said of the strategy.

    Parameters
    ----------
    strategy : str or Strategy
        The strategy.
    short : mapping
        The parameters of `SHORT` that were given by keyword; None: not given.
    misplaced : mapping
        Other keywords: they belong to a `Strategy`, or nowhere.

    Raises
    ------
    ConfigError
        A keyword is not accepted; where it is a parameter of strategies the message gives the line to write.
    """
    name = strategy.name if isinstance(strategy, Strategy) else strategy
    given = {key: value for key, value in short.items() if value is not None}
    if misplaced:
        ours = {key: value for key, value in misplaced.items() if key in PARAMETERS}
        if len(ours) < len(misplaced):
            raise ConfigError(f"{next(key for key in misplaced if key not in ours)!r} is no parameter of a KVCache")
        told = ", ".join(f"{key}={value!r}" for key, value in (given | ours).items())
        raise ConfigError(f"{next(iter(ours))} belongs to the strategy: write strategy=lf.Strategy({name!r}, {told})")
    if not isinstance(strategy, Strategy):
        return Strategy(name, **given)
    both = sorted(set(given) & set(strategy.parameters))
    if both:
        raise ConfigError(f"{both[0]}={given[both[0]]!r} is given twice: {strategy!r} has it too")
    return Strategy(name, **strategy.parameters, **given)


def resolve(
    strategy: Strategy, budget: int | None, cache_size: float | None = None, prompt_tokens: int | None = None
) -> _core.Spec:
    """Resolve a strategy, with the budget in tokens or in percent of the prompt.

    Raises
    ------
    ConfigError
        Both or an incomplete pair of sizes, or a parameter out of range.
    """
    if cache_size is None:
        return strategy.spec(budget)
    if budget is not None:
        raise ConfigError(f"budget={budget} and cache_size={cache_size} are both given; one of them is accepted")
    if prompt_tokens is None:
        raise ConfigError(f"cache_size={cache_size} is a percentage of the prompt: prompt_tokens is needed with it")
    sink_size = strategy.spec().params.get("sink_size") or 0
    return strategy.spec(_core.budget_from_percent(cache_size, prompt_tokens, sink_size))


@dataclass(frozen=True)
class Run:
    """How a cache runs; nothing of it changes what is kept.

    `threads`: cap on the Rust core's threads; None: the environment's `LIQUIDFUSION_NUM_THREADS`, else all cores.
    `graph`: on an NVIDIA GPU, replay each decode step as one CUDA graph. `compile`: let torch.compile fuse what lies
    between the kernels. `overlap`: on an NVIDIA GPU, choose victims while the next step runs.

    Raises
    ------
    ConfigError
        A value of another kind.
    """

    threads: int | None = None
    graph: bool = True
    compile: bool = False
    overlap: bool = True

    def __post_init__(self) -> None:
        if self.threads is not None and (
            not isinstance(self.threads, int) or isinstance(self.threads, bool) or self.threads < 1
        ):
            raise ConfigError(f"threads={self.threads!r}; an integer of at least 1 or None is accepted")
        for name in ("graph", "compile", "overlap"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}; True or False is accepted")
