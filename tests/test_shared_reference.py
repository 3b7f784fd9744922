"""The executable specification, where it lies beside the repository, agrees with the twin and with the product."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from drive import Call, Drive, key
from liquidfusion import _core
from reference import STRATEGIES, Rules

PATH = Path(__file__).resolve().parents[2] / "shared" / "reference.py"

if not PATH.is_file():
    pytest.skip("../shared/reference.py is not beside this checkout", allow_module_level=True)

# The specification is older than these, and has no words for what they do.
KNOWN = [name for name in STRATEGIES if name not in ("full", "snapkv", "random", "keydiff")]
YOUNGER = {"look_gap": 0, "peak_reach": 2**31 - 1, "averaged": False, "value_weighted": False}
"""What turns off the rules that it does not know."""
LISTENS = {info["name"]: info["parameters"] for info in _core.strategies()}
CALLS = [3, 1, 30, *[1] * 60, 2, *[1] * 40, 75, *[1] * 120, 17, *[1] * 80]


@pytest.fixture(scope="module")
def shared() -> ModuleType:
    """The specification as a module under a name of its own, since the twin's module is called the same."""
    spec = importlib.util.spec_from_file_location("shared_reference", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def of_rules(shared: ModuleType, rules: Rules, scored: bool) -> Any:
    """The specification's parameters for a twin's rules."""
    return shared.Spec(
        budget=rules.budget, sink_size=rules.sink_size, heavy_ratio=rules.heavy, recent_ratio=rules.recent,
        distinct_ratio=rules.distinct_ratio, peak_ratio=rules.peak_ratio, mass_decay=rules.gamma,
        peak_decay=rules.pi, interval=rules.interval, scored=scored,
    )  # fmt: skip


def attention(seed: int) -> Callable[[list[int], list[int]], list[list[float]]]:
    """Probabilities which depend on seed, query and visible tokens only, whoever asks and in whatever order."""

    def probabilities(visible: list[int], new: list[int]) -> list[list[float]]:
        rows = []
        for query in new:
            noise = {p: abs(math.sin(12.9898 * query + 78.233 * p + seed)) * 43758.5453 % 1 for p in sorted(visible)}
            weights = {p: noise[p] ** 8 if p <= query else 0.0 for p in noise}
            total = sum(weights.values())
            rows.append([weights[p] / total for p in visible])
        return rows

    return probabilities


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("strategy", KNOWN)
def test_twin_and_product_agree_with_it(shared: ModuleType, strategy: str, interval: int) -> None:
    """All three on the same probabilities, chunks and decode steps mixed: positions and scores after every call."""
    budget = 40
    off = {name: value for name, value in YOUNGER.items() if name in LISTENS[strategy]}
    spec = _core.Spec(strategy, budget, eviction_interval=interval, **off)
    rules = replace(
        STRATEGIES[strategy](budget), interval=interval, look_gap=0, peak_reach=math.inf, averaged=False, weighted=False
    )
    head = shared.Head(of_rules(shared, rules, scored=rules.heavy > 0))
    one = Drive(spec, rules, layers=1, batch=1, kv_heads=1, group=1, seed=0)
    head.keys = lambda positions: [key(0, 0, 0, position) for position in positions]
    asked = attention(11)
    one.draw = lambda _rng, visible, queries, _group: np.asarray([asked(visible, queries)], np.float32)
    for new in CALLS:
        # float32, as the product is given them; drive.py asserts that the twin equals the product.
        head.call(new, lambda visible, queries: np.asarray(asked(visible, queries), np.float32).astype(float).tolist())
        one.call(Call([new]))
        twin = one.twins[0, 0, 0]
        assert head.positions() == twin.kept
        assert [head.position[slot] for slot in head.queue if head.position[slot] >= 0] == twin.doomed
        scores = {p: (m, k) for p, m, k in zip(head.position, head.mass, head.peak, strict=True) if p >= 0}
        for position, token in twin.tokens.items():
            assert scores[position] == pytest.approx((token.mass, token.peak), rel=1e-9, abs=1e-15)


def test_splits_agree(shared: ModuleType) -> None:
    """Every number of kept tokens, for every strategy's own ratios and for awkward ones."""
    awkward = [(0.5, 0.5, 0.0, 0.25), (1.0, 0.001, 0.0, 1.0), (0.001, 1.0, 0.0, 0.5), (0.7, 0.3, 0.0, 0.0)]
    awkward += [(0.5, 0.5, 0.3, 0.4), (1.0, 0.001, 1.0, 1.0), (0.75, 0.25, 0.7, 0.6), (0.75, 0.25, 1.0, 0.0)]
    rules = [STRATEGIES[name](96) for name in KNOWN]
    drawn = [
        Rules(96, 4, heavy, recent, distinct_ratio=distinct, peak_ratio=peak)
        for heavy, recent, distinct, peak in awkward
    ]
    for rule in rules + drawn:
        for keep in range(1, 97):
            assert of_rules(shared, rule, scored=rule.heavy > 0).split(keep) == rule.parts(keep)
    for (heavy, recent, distinct, peak), rule in zip(awkward, drawn, strict=True):
        own = {"heavy_ratio": heavy, "recent_ratio": recent, "distinct_ratio": distinct, "peak_ratio": peak}
        spec = _core.Spec("liquid_fusion", 96, **own)
        for keep in range(5, 97):
            assert tuple(spec.split(keep)) == rule.parts(keep)


def test_an_idle_call_changes_nothing(shared: ModuleType) -> None:
    """No real token: neither positions nor queue move."""
    head = shared.Head(of_rules(shared, STRATEGIES["h2o"](24), scored=True))
    head.call(20, attention(1))
    before = (list(head.position), list(head.mass), list(head.queue))
    head.call(0, attention(1))
    assert (head.position, head.mass, head.queue) == before
    assert torch.tensor(head.mass).sum() > 0
