"""The Rust ledger keeps, dooms and scores exactly what the naive twin does, over hundreds of decode steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from drive import Call, Drive, dyadic
from liquidfusion import _core
from reference import STRATEGIES, gamma_of, rules

PARAMETERS = {info["name"]: info["parameters"] for info in _core.strategies()}
REGISTRY = tuple(PARAMETERS)
STEPS = 300


def drive(
    strategy: str,
    budget: int,
    *,
    interval: int,
    rate: float,
    adaptive: bool,
    sink_size: int | None = None,
    ratios: tuple[float, float, float] | None = None,
    looks: tuple[int, bool, bool] | None = None,
    reach: int | None = None,
    half_life: int | None = None,
    distinct_ratio: float | None = None,
    **shape: Any,
) -> Drive:
    """Ledger and twins with the same parameters, those that the strategy listens to."""
    given: dict[str, Any] = {"gamma": gamma_of(rate), "adaptive": adaptive}
    options: dict[str, Any] = {"sink_update_rate": rate, "sinks": "adaptive" if adaptive else "pinned"}
    if distinct_ratio is not None:
        given["distinct_ratio"] = options["distinct_ratio"] = distinct_ratio
    if sink_size is not None:
        given["sink_size"] = options["sink_size"] = sink_size
    if ratios is not None:
        given |= dict(zip(("heavy", "recent", "peak_ratio"), ratios, strict=True))
        options |= dict(zip(("heavy_ratio", "recent_ratio", "peak_ratio"), ratios, strict=True))
    if looks is not None:
        given |= dict(zip(("look_gap", "averaged", "weighted"), looks, strict=True))
        options |= dict(zip(("look_gap", "averaged", "value_weighted"), looks, strict=True))
    if half_life is not None:
        given["half_life"] = options["age_half_life"] = half_life
    if reach is not None:
        given["peak_reach"] = options["peak_reach"] = reach
    options["eviction_interval"] = interval
    spec = _core.Spec(strategy, budget, **{name: options[name] for name in options if name in PARAMETERS[strategy]})
    return Drive(spec, rules(strategy, budget, interval=interval, **given), **shape)


def prompt(tokens: int, batch: int, chunks: int) -> list[Call]:
    """A left-padded prompt: row b is 3 b tokens shorter than `tokens`, cut into `chunks` calls of equal width.

    Cutting a padded prompt gives chunks in which a row has no real token, or just one, beside rows which have many.
    """
    width = -(-tokens // chunks)
    calls = []
    for start in range(0, tokens, width):
        end = min(start + width, tokens)
        lengths = [max(0, min(end - start, end - min(3 * row, tokens - 1))) for row in range(batch)]
        calls.append(Call(lengths, padding=end - start - max(lengths)))
    return calls


def test_every_strategy_has_a_twin() -> None:
    assert set(REGISTRY) == set(STRATEGIES)


@pytest.mark.parametrize("strategy", REGISTRY)
def test_defaults_are_the_twins(strategy: str) -> None:
    """Each strategy's own parameters, and how it splits any number of kept tokens."""
    budget = 96
    spec, own = _core.Spec(strategy, budget), STRATEGIES[strategy](budget)
    assert spec.budget == own.budget
    assert spec.bounded == (own.budget is not None)
    if not spec.bounded:
        return
    assert (spec.look_gap, spec.averaged, spec.value_weighted) == (own.gap, own.averaged, own.weighted)
    assert (spec.params["age_half_life"] or 0) == own.half_life
    assert spec.distinct == (own.distinct_ratio > 0)
    assert (math.inf if spec.peak_reach is None else spec.peak_reach) == own.peak_reach
    assert spec.interval == max(1, min(budget // 32, (budget - own.sink_size) // 8))
    for keep in range(own.sink_size + 1, budget + 1):
        assert tuple(spec.split(keep)) == own.parts(keep)
    if spec.scored:
        assert spec.mass_decay == pytest.approx(own.gamma, rel=1e-12)
        assert spec.peak_decay == pytest.approx(own.pi, rel=1e-12)


def combinations() -> Iterator[Any]:
    """Every combination; a strategy that needs no scores is given none, so their fading and grouping cannot matter."""
    for strategy in REGISTRY:
        scored = _core.Spec(strategy, 64).scored
        for interval, adaptive, chunks in product([1, 8], [False, True], [1, 4]):
            for rate, group in product([0.0, 0.3], [1, 3]) if scored else [(0.0, 1)]:
                names = [strategy, str(interval), "fading" if rate else "sum", "adaptive" if adaptive else "pinned"]
                names += ["MHA" if group == 1 else "GQA", f"{chunks} chunks"]
                yield pytest.param(strategy, interval, rate, adaptive, group, chunks, id="-".join(names))


@pytest.mark.parametrize(("strategy", "interval", "rate", "adaptive", "group", "chunks"), list(combinations()))
def test_whole_trace(strategy: str, interval: int, rate: float, adaptive: bool, group: int, chunks: int) -> None:
    """Every combination, on a prompt longer than the budget in one call and on one that fills it in several."""
    one = drive(
        strategy,
        68,
        interval=interval,
        rate=rate,
        adaptive=adaptive,
        layers=1,
        batch=2,
        kv_heads=1,
        group=group,
        seed=7,
    )
    for call in prompt(75 if chunks == 1 else 41, 2, chunks):
        one.call(call)
    for _ in range(STEPS):
        one.call(Call([1, 1]))
    assert one.ledger.seen == [twin.seen for twin in one.twins.values()]


@pytest.mark.parametrize("strategy", REGISTRY)
def test_a_chunk_forgets_the_queue(strategy: str) -> None:
    """Victims are chosen while slots are still empty; a chunk that fits beside them makes the choice anew."""
    one = drive(strategy, 68, interval=8, rate=0.3, adaptive=False, layers=1, batch=1, kv_heads=2, group=2, seed=5)
    for new in (61, 3, 2, *[1] * 20, 5, *[1] * 20):
        one.call(Call([new]))


@pytest.mark.parametrize("strategy", REGISTRY)
@settings(
    derandomize=True,
    deadline=None,
    max_examples=5,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # an example takes a second, so shrinking one would take minutes
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_drawn_shapes_and_budgets(strategy: str, data: st.DataObject) -> None:
    """Shapes, budgets, ratios and call patterns drawn: prompts, decode steps, idle rows, second turns."""
    sink_size = data.draw(st.sampled_from([0, 1, 4, 7]), "sink_size")
    budget = data.draw(st.integers(sink_size + 4, 80), "budget")
    interval = data.draw(st.integers(1, max(1, (budget - sink_size) // 8)), "interval")
    batch = data.draw(st.integers(1, 3), "batch")
    one = drive(
        strategy,
        budget,
        interval=interval,
        rate=data.draw(st.sampled_from([0.0, 0.1, 0.9]), "rate"),
        adaptive=data.draw(st.booleans(), "adaptive"),
        sink_size=sink_size,
        ratios=data.draw(st.sampled_from([None, (0.2, 0.3, 0.5), (1.0, 0.2, 1.0), (0.5, 1.0, 0.0)]), "ratios"),
        looks=data.draw(st.sampled_from([None, (0, False, False), (1, True, False), (30, True, True)]), "looks"),
        reach=data.draw(st.sampled_from([None, 1, 12]), "reach"),
        half_life=data.draw(st.sampled_from([None, 0, 4, 50]), "half_life"),
        distinct_ratio=data.draw(st.sampled_from([None, 0.3, 0.8, 1.0]), "distinct_ratio"),
        layers=data.draw(st.integers(1, 2), "layers"),
        batch=batch,
        kv_heads=1 if batch == 3 else data.draw(st.integers(1, 2), "kv_heads"),
        group=data.draw(st.integers(1, 3), "group"),
        seed=data.draw(st.integers(0, 1 << 16), "seed"),
        threads=data.draw(st.sampled_from([None, 1, 2]), "threads"),
    )
    lengths = st.lists(st.integers(0, 40), min_size=batch, max_size=batch)
    for turn in range(3):
        one.call(Call(data.draw(lengths, f"turn {turn}"), padding=data.draw(st.integers(0, 2))))
        one.call(Call(data.draw(st.lists(st.integers(0, 1), min_size=batch, max_size=batch), f"idle rows {turn}")))
        for _ in range(STEPS // 3):
            one.call(Call([1] * batch))


@pytest.mark.parametrize("adaptive", [False, True], ids=["pinned", "adaptive"])
@pytest.mark.parametrize("strategy", REGISTRY)
def test_ties_keep_the_newer_token(strategy: str, adaptive: bool) -> None:
    """Attention in quarters makes many exactly equal masses, zeros among them."""
    one = drive(
        strategy, 24, interval=2, rate=0.0, adaptive=adaptive, ratios=(1.0, 0.5, 0.0),
        looks=(0, False, False), layers=1, batch=1, kv_heads=2, group=1, seed=3, draw=dyadic,
    )  # fmt: skip
    for call in [Call([30]), *[Call([1])] * 100, Call([17]), *[Call([1])] * 20]:
        one.call(call)
