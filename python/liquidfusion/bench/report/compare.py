"""Two directories of results side by side: what tells them apart, and each difference with its interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from liquidfusion.bench.report.charts import Section
from liquidfusion.bench.report.rows import NAMES, Row, lower_is_better, main_of
from liquidfusion.bench.report.sections import cell
from liquidfusion.bench.stats import difference, exp
from liquidfusion.bench.terminal.output import number

Facts = dict[str, str]


@dataclass(frozen=True, slots=True)
class Pair:
    """The same measurement in two directories.

    Attributes
    ----------
    change, low, high
        Of the main metric, the second less the first, or (`ratio`) the second over the first; 95 % interval, None where
        there is none.
    paired
        Whether both measured the same samples, so that what they have in common cancels.
    """

    one: Row
    other: Row
    change: float | None
    low: float | None
    high: float | None
    ratio: bool
    paired: bool

    @property
    def verdict(self) -> str:
        """Return better or worse, if the interval leaves no doubt."""
        same = 1.0 if self.ratio else 0.0
        if self.low is None or self.high is None or self.low <= same <= self.high:
            return ""
        return "better" if (self.high < same) == lower_is_better(self.one.task) else "worse"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two directories.

    Attributes
    ----------
    between
        What differs between the directories as a whole: name → (in the first, in the second).
    pairs
        What both measured.
    alone
        Rows that only one of them has.
    """

    between: dict[str, tuple[str, str]]
    pairs: list[Pair]
    alone: tuple[list[Row], list[Row]]


def _facts(row: Row) -> Facts:
    own = {
        "model": row.model,
        "task": row.task,
        "strategy": row.strategy,
        "size": row.label,
        "context": str(row.context),
    }
    return own | dict(row.conditions) | dict(row.settings)


def compare(first: Sequence[Row], second: Sequence[Row]) -> Comparison:
    """Pair the rows of two directories.

    A fact that has one value in the whole first directory and another one in the whole second (a version, a dtype, a
    parameter) is what tells them apart, and rows are paired without regard to it; in everything else they must agree.
    """
    each = [_facts(row) for row in first], [_facts(row) for row in second]
    between: dict[str, tuple[str, str]] = {}
    for name in dict.fromkeys(name for side in each for facts in side for name in facts):
        values = [{facts.get(name, "not set") for facts in side if _has(name, facts, side)} for side in each]
        if len(values[0]) == len(values[1]) == 1 and values[0] != values[1]:
            between[name] = values[0].pop(), values[1].pop()

    def key(facts: Facts) -> tuple[tuple[str, str], ...]:
        return tuple(sorted((name, value) for name, value in facts.items() if name not in between))

    left = {key(facts): row for row, facts in zip(first, each[0], strict=True)}
    right = {key(facts): row for row, facts in zip(second, each[1], strict=True)}
    pairs = [_pair(row, right[facts]) for facts, row in left.items() if facts in right]
    alone = (
        [row for facts, row in left.items() if facts not in right],
        [row for facts, row in right.items() if facts not in left],
    )
    return Comparison(between, pairs, alone)


def _has(name: str, facts: Facts, side: Sequence[Facts]) -> bool:
    """Whether a row has a say about a fact: strategies that do not listen to a parameter have none."""
    strategy = facts["strategy"]
    return name in facts or not any(name in other for other in side if other["strategy"] != strategy)


def samples(row: Row) -> tuple[list[float], list[float], bool] | None:
    """Return what the main metric of a row is the mean of, how much each counts, and whether they are logarithms.

    None where the results do not have them one by one.
    """
    main, records = main_of(row.task), [item for document in row.documents for item in document["results"]]
    scores = [item["result"]["scores"] for item in records]
    if main == "perplexity" and all("nll" in score for score in scores):
        return [v for s in scores for v in s["nll"]], [float(v) for s in scores for v in s["counts"]], True
    if scores and all(isinstance(score.get(main), int | float) for score in scores):
        return [float(score[main]) for score in scores], [1.0] * len(scores), False
    return None


def _pair(one: Row, other: Row) -> Pair:
    x, y, low, high = one.value(), other.value(), None, None
    found = samples(one), samples(other)
    ratio = found[0] is not None and found[0][2]
    if x is None or y is None:
        return Pair(one, other, None, None, None, ratio, False)
    change, paired = (y / x if ratio and x else y - x), False
    if found[0] is not None and found[1] is not None:
        paired = _prompts(one) == _prompts(other) and len(found[0][0]) == len(found[1][0])
        weights = found[0][1], found[1][1]
        _, low, high = difference(found[0][0], found[1][0], weights=weights, paired=paired)
        low, high = (exp(low), exp(high)) if ratio else (low, high)
    else:
        low, high = _independent(one, other, change)
    if low is None or high is None or math.isnan(low + high):
        low = high = None
    return Pair(one, other, change, low, high, ratio, paired)


def _prompts(row: Row) -> list[Any]:
    return [item["request"]["prompt"] for document in row.documents for item in document["results"]]


def _independent(one: Row, other: Row, change: float) -> tuple[float | None, float | None]:
    """Return the interval of a difference of two figures that have each their own spread."""
    widths = [_half_width(row) for row in (one, other)]
    if None in widths:
        return None, None
    width = math.hypot(*[width for width in widths if width is not None])
    return change - width, change + width


def _half_width(row: Row) -> float | None:
    """Return half a row's 95 % interval: by its repeats if there are several, else its own."""
    metric = row.main()
    if metric is None:
        return None
    if row.repeats > 1 and metric["sd"] is not None:
        # Student's t for few repeats: 97.5 % points from 1 degree of freedom on
        t = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
        return float(t[min(row.repeats, 10) - 2] * metric["sd"] / math.sqrt(row.repeats))
    return None if metric["low"] is None or metric["high"] is None else float(metric["high"] - metric["low"]) / 2


def intro(comparison: Comparison, names: tuple[str, str]) -> list[str]:
    """Return, as lines, what is compared and what tells the directories apart."""
    first, second = names
    differing = [f"{name}: {a} in {first}, {b} in {second}" for name, (a, b) in comparison.between.items()]
    lines = [f"{second} compared with {first}. " + ("; ".join(differing) if differing else "Nothing else differs.")]
    for name, rows in zip(names, comparison.alone, strict=True):
        if rows:
            listed = dict.fromkeys(f"{row.task}, {NAMES.get(row.strategy, row.strategy)}, {row.size}" for row in rows)
            lines.append(f"only in {name} ({len(rows)}): {'; '.join(listed)}")
    return lines


def sections(comparison: Comparison, names: tuple[str, str]) -> list[Section]:
    """Return a section for each model and task that both directories have."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in comparison.pairs:
        groups.setdefault((pair.one.model, pair.one.task), []).append(pair)
    return [_section(*group, pairs, names) for group, pairs in groups.items()]


def _section(model: str, task: str, pairs: Sequence[Pair], names: tuple[str, str]) -> Section:
    told = [dict(pair.one.conditions) | dict(pair.one.settings) for pair in pairs]
    differing = [n for n in dict.fromkeys(n for facts in told for n in facts) if len({f.get(n) for f in told}) > 1]
    body = []
    for pair, facts in zip(pairs, told, strict=True):
        words = [f"{name} {facts[name]}" for name in differing if name in facts]
        cache = ", ".join([NAMES.get(pair.one.strategy, pair.one.strategy), *words])
        size = pair.one.size + (f" of {pair.one.context}" if pair.one.context else "")
        figures = [cell(row.main(), row.repeats) for row in (pair.one, pair.other)]
        body.append([cache, size, *figures, _change(pair), pair.verdict])
    main = main_of(task).replace("_", " ")
    ratio = any(pair.ratio for pair in pairs)
    header = ["cache", "size", *names, f"{names[1]} ÷ {names[0]}" if ratio else f"{names[1]} less {names[0]}", ""]
    return Section(task, model, "", {}, f"{main}; 95 % intervals, paired where both read the same", header, body)


def _change(pair: Pair) -> str:
    if pair.change is None:
        return "-"
    text = number(pair.change) if pair.ratio else f"{'+' if pair.change > 0 else ''}{number(pair.change)}"
    return text if pair.low is None or pair.high is None else f"{text} ({number(pair.low)} to {number(pair.high)})"
