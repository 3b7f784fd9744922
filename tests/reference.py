"""Naive twins of the fast paths: plain Python and float64, written from the exact rules, sharing no code with them.

A twin knows no slots. It keeps a mapping from position to scores, a number of empty places and the list of doomed
positions, so nothing of the product's slot bookkeeping can be mistaken for the rule it implements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

PEAK_DECAY = 0.9995
SMALLEST = 1e-35
"""Scores below it are not numbers that float32 tells apart."""


@dataclass(frozen=True)
class Rules:
    """What one strategy does with one (layer, row, kv head).

    Parameters
    ----------
    budget : int or None
        Most tokens kept; ``None`` never evicts.
    sink_size : int
        Protected first tokens, or the number of adaptive sinks.
    heavy, recent : float
        Weights by which the tokens that are not sinks are shared between heavy hitters and the recent window.
    distinct_ratio : float
        Share of the heavy hitters that is chosen by how far their keys point from the mean of all candidates' keys.
    peak_ratio : float
        Share of the heavy hitters that is chosen by peak attention, as far as distinctness leaves any.
    gamma, pi : float
        Fading of mass and peak per query token.
    interval : int
        Tokens between two choices of victims.
    adaptive : bool
        Sinks are the largest masses outside the recent window instead of the first tokens.
    look_gap : int
        Looks at a token count from the query this many tokens later; at most the recent window of the whole budget.
    averaged : bool
        Mass is judged per query that could look at the token: divided by what those queries weigh.
    half_life : int
        An averaged mass halves with every so many queries that could look, 24 times at most; 0: it does not.
    peak_reach : float
        Looks at a token by its own chunk count for its peak up to this distance.
    weighted : bool
        Looks count by the length of the token's value over the length of its key.
    window : int or None
        The recent window has this many tokens, or half of those kept where that is less, whatever the weights say.
    pool : int
        A contender for a place by mass is worth the largest mass of the contenders up to this many positions away.
    drawn : bool
        A contender is worth a number drawn for its layer, kv head and position, whatever was looked at.
    """

    budget: int | None
    sink_size: int = 0
    heavy: float = 0.0
    recent: float = 1.0
    distinct_ratio: float = 0.0
    peak_ratio: float = 0.0
    gamma: float = 1.0
    pi: float = PEAK_DECAY
    interval: int = 1
    adaptive: bool = False
    look_gap: int = 0
    peak_reach: float = math.inf
    averaged: bool = False
    half_life: int = 0
    weighted: bool = False
    window: int | None = None
    pool: int = 0
    drawn: bool = False

    @property
    def gap(self) -> int:
        """The look gap in force."""
        return self.look_gap if self.budget is None else min(self.look_gap, self.parts(self.budget)[1])

    def parts(self, keep: int) -> tuple[int, int, int, int]:
        """Number of sinks, recent, peak and mass tokens among `keep`; what they leave goes by distinctness."""
        sinks = min(self.sink_size, keep - 1)
        rest = keep - sinks
        recent = max(1, math.floor(rest * self.recent / (self.heavy + self.recent) + 0.5))
        if self.window is not None:
            recent = max(1, min(self.window, keep // 2))
        heavy = rest - recent
        others = heavy - math.floor(heavy * self.distinct_ratio + 0.5)
        peak = min(others, math.floor(heavy * self.peak_ratio + 0.5))
        return sinks, recent, peak, others - peak


def gamma_of(sink_update_rate: float) -> float:
    """Fading of the mass per query token for an exponential moving average over 64 tokens."""
    return float((1.0 - sink_update_rate) ** (1.0 / 64.0))


def _full(_budget: int | None) -> Rules:
    return Rules(budget=None)


def _local(budget: int | None) -> Rules:
    return Rules(budget)


def _streaming(budget: int | None) -> Rules:
    return Rules(budget, sink_size=4)


def _h2o(budget: int | None) -> Rules:
    return Rules(budget, heavy=1.0, recent=1.0)


def _liquid_fusion(budget: int | None) -> Rules:
    return Rules(
        budget, sink_size=4, heavy=0.75, recent=0.25, distinct_ratio=0.3, peak_ratio=0.4, gamma=gamma_of(0.3),
        peak_reach=math.inf if budget is None else budget, look_gap=8, averaged=True, half_life=4096, weighted=True,
    )  # fmt: skip


def _tova(budget: int | None) -> Rules:
    return Rules(budget, heavy=1.0, recent=0.0, gamma=0.0)


def _snapkv(budget: int | None) -> Rules:
    return Rules(budget, heavy=1.0, recent=0.0, gamma=31 / 32, window=32, pool=3)


def _random(budget: int | None) -> Rules:
    return Rules(budget, heavy=1.0, recent=0.0, drawn=True)


def _keydiff(budget: int | None) -> Rules:
    return Rules(budget, heavy=1.0, recent=0.0, distinct_ratio=1.0)


STRATEGIES: dict[str, Callable[[int | None], Rules]] = {
    "full": _full,
    "local": _local,
    "streaming": _streaming,
    "h2o": _h2o,
    "liquid_fusion": _liquid_fusion,
    "tova": _tova,
    "snapkv": _snapkv,
    "random": _random,
    "keydiff": _keydiff,
}
"""Strategy name to its own defaults; a strategy of the product that is missing here has no twin and fails the tests."""

# The parameters each strategy listens to; any other is ignored.
LISTENS: dict[str, frozenset[str]] = {
    "full": frozenset(),
    "local": frozenset(),
    "streaming": frozenset({"sink_size"}),
    "h2o": frozenset({"heavy", "recent"}),
    "liquid_fusion": frozenset(
        {
            *("sink_size", "adaptive", "heavy", "recent", "distinct_ratio", "peak_ratio"),
            *("gamma", "look_gap", "peak_reach", "averaged", "half_life", "weighted"),
        }
    ),
    "tova": frozenset(),
    "snapkv": frozenset(),
    "random": frozenset(),
    "keydiff": frozenset(),
}


def rules(strategy: str, budget: int | None, *, interval: int = 1, **given: float | bool) -> Rules:
    """Rules of a strategy with the given parameters instead of its own, where it listens to them."""
    own = STRATEGIES[strategy](budget)
    heard = {name: value for name, value in given.items() if name in LISTENS[strategy]}
    return replace(own, interval=interval, **heard)  # type: ignore[arg-type]


def splitmix64(n: int) -> int:
    """Return the number at index `n` of the generator splitmix64 with the seed 0."""
    word = (n + 1) * 0x9E3779B97F4A7C15 % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


@cache
def _weight_of(queries: int, gamma: float) -> float:
    return sum(gamma**age for age in range(queries))


@dataclass
class Scores:
    """Ledger entry of one token."""

    mass: float = 0.0
    peak: float = 0.0


def distinctness(keys: Sequence[Sequence[float]]) -> list[float]:
    """How far each key points from the mean direction of all: the negative cosine, 0 where there is none."""

    def unit(vector: Sequence[float]) -> list[float]:
        length = math.sqrt(sum(x * x for x in vector)) or 1.0
        return [x / length for x in vector]

    directions = [unit(key) for key in keys]
    mean = unit([sum(column) for column in zip(*directions, strict=True)])
    return [-sum(x * y for x, y in zip(direction, mean, strict=True)) for direction in directions]


Keys = Callable[[list[int]], Sequence[Sequence[float]]]
"""From positions to the tokens' keys [tokens][head_dim]."""

Attend = Callable[[list[int], list[int]], Sequence[Sequence[Sequence[float]]]]
"""From (visible positions, positions of the queries) to probabilities [group][query][visible]."""


@dataclass
class Twin:
    """One (layer, row, kv head): which positions are kept, doomed, and how they score.

    `margin` is the smallest relative distance between a kept and a dropped score over all choices so far. Where it is
    far above the float32 error of the product, the product must choose the same tokens; an exact tie does not count,
    because the rule decides it, and neither does a choice by drawn numbers, which have no error. `distinct_margin` is
    the same for choices by distinctness, which float32 holds: a test that hands the product this twin's needs none.

    Layer and kv head matter to drawn numbers only, `keys` to distinctness only.
    """

    rules: Rules
    layer: int = 0
    head: int = 0
    tokens: dict[int, Scores] = field(default_factory=dict)
    doomed: list[int] = field(default_factory=list)
    seen: int = 0
    evictions: int = 0
    margin: float = math.inf
    distinct_margin: float = math.inf
    keys: Keys | None = None

    @property
    def empty(self) -> float:
        """Places that hold no token."""
        return math.inf if self.rules.budget is None else self.rules.budget - len(self.tokens)

    @property
    def kept(self) -> list[int]:
        """Visible positions, ascending."""
        return sorted(self.tokens)

    def copy(self) -> Twin:
        """Independent twin in the same state."""
        tokens = {position: Scores(token.mass, token.peak) for position, token in self.tokens.items()}
        return replace(self, tokens=tokens, doomed=list(self.doomed))

    def call(self, new: int, attend: Attend) -> None:
        """One call with `new` real tokens: one is a decode step, more are a chunk, none is nothing."""
        if new == 0:
            return
        queries = list(range(self.seen, self.seen + new))
        if new == 1 and self.empty == 0:
            del self.tokens[self.doomed.pop(0)]
            self.evictions += 1
        for position in queries:
            self.tokens[position] = Scores()
        self.seen += new
        visible = self.kept
        self._look(visible, new, attend(visible, queries))
        if new > 1:
            self._shrink()
        self._doom()

    def _look(self, visible: list[int], new: int, probabilities: Sequence[Sequence[Sequence[float]]]) -> None:
        gamma, pi, group = self.rules.gamma, self.rules.pi, len(probabilities)
        for token in self.tokens.values():
            token.mass *= gamma**new
            token.peak *= pi**new
        for query in range(new):
            age = new - 1 - query
            rows = [probabilities[head][query] for head in range(group)]
            for position, looks in zip(visible, zip(*rows, strict=True), strict=True):
                if self.seen - 1 - age - position < self.rules.gap:
                    continue
                p = sum(looks) / group
                token = self.tokens[position]
                token.mass += gamma**age * p
                far = self.seen - 1 - age - position > self.rules.peak_reach
                if position < self.seen - new or not far:
                    token.peak = max(token.peak, pi**age * p)

    def _shrink(self) -> None:
        self.doomed = []
        budget = self.rules.budget
        if budget is None or len(self.tokens) <= budget:
            return
        staying = self._choose(self.kept, budget)
        self.evictions += len(self.tokens) - budget
        self.tokens = {position: self.tokens[position] for position in staying}

    def _doom(self) -> None:
        queued = self.empty + len(self.doomed)
        if queued > self.rules.interval:
            return
        free = [position for position in self.kept if position not in self.doomed]
        staying = self._choose(free, len(free) - int(2 * self.rules.interval - queued))
        self.doomed += [position for position in free if position not in staying]

    def _choose(self, positions: list[int], keep: int) -> set[int]:
        sinks, recent, peak, mass = self.rules.parts(keep)
        left = list(positions)
        chosen: set[int] = set()

        def take(count: int, score: Callable[[int], float]) -> float:
            """Choose the first by score; returns how far they are from the rest."""
            nonlocal left
            ranked = sorted(left, key=lambda position: (score(position), position), reverse=True)
            margin = math.inf
            if 0 < count < len(ranked):
                last, next_ = score(ranked[count - 1]), score(ranked[count])
                if last != next_ and not self.rules.drawn:
                    largest = max(abs(last), abs(next_))
                    margin = (last - next_) / largest if largest > SMALLEST else 0.0
            chosen.update(ranked[:count])
            left = sorted(ranked[count:])
            return margin

        def newest(_position: int) -> float:
            return 0.0  # a tie everywhere, which the newest position wins

        distinct = keep - sinks - recent - peak - mass
        if self.rules.adaptive:
            take(recent, newest)
            self.margin = min(self.margin, take(sinks, self._mass))
        else:
            first = [position for position in left if position < self.rules.sink_size][:sinks]
            chosen.update(first)
            left = [position for position in left if position not in chosen]
            take(recent + sinks - len(first), newest)
        if distinct:
            far = self._distinct(positions)
            self.distinct_margin = min(self.distinct_margin, take(distinct, lambda position: far[position]))
        self.margin = min(self.margin, take(peak, lambda position: self.tokens[position].peak))
        contenders = list(left)
        self.margin = min(self.margin, take(mass, lambda position: self._worth(position, contenders)))
        return chosen

    def _distinct(self, positions: list[int]) -> dict[int, float]:
        assert self.keys is not None, "distinctness is a matter of keys"
        far = torch.tensor(distinctness(self.keys(positions)), dtype=torch.float32)
        return dict(zip(positions, far.tolist(), strict=True))

    def _worth(self, position: int, contenders: list[int]) -> float:
        if self.rules.drawn:
            return splitmix64(self.layer * 2**48 + self.head * 2**32 + position) // 2**40
        if self.rules.pool:
            return max(self.tokens[other].mass for other in contenders if abs(other - position) <= self.rules.pool)
        return self._mass(position)

    def _mass(self, position: int) -> float:
        mass = self.tokens[position].mass
        if not self.rules.averaged:
            return mass
        could_look = max(1, self.seen - self.rules.gap - position)
        age = min(24.0, could_look / self.rules.half_life) if self.rules.half_life else 0.0
        return mass / _weight_of(could_look, self.rules.gamma) / 2.0**age


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention of one kv head's group over the visible tokens, float64.

    Parameters
    ----------
    query : Tensor
        ``[group, queries, head_dim]``.
    keys, values : Tensor
        ``[tokens, head_dim]``.
    visible : Tensor
        bool ``[queries, tokens]``.
    scale : float
        Factor on the dot products.
    softcap : float
        Logits stay between minus this and this; 0: wherever they are.
    sinks : Tensor or None
        ``[group]``: logits of no token, which take their part of the attention.

    Returns
    -------
    tuple of Tensor
        Output ``[group, queries, head_dim]``, 0 where a query sees nothing, and probabilities
        ``[group, queries, tokens]``.
    """
    logits = query.double() @ keys.double().T * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~visible, -math.inf)
    if sinks is not None:
        logits = torch.cat((logits, sinks.double()[:, None, None].expand(-1, logits.shape[1], 1)), -1)
    probabilities = torch.softmax(logits, dim=-1).nan_to_num(0.0)[..., : keys.shape[0]]
    return probabilities @ values.double(), probabilities
