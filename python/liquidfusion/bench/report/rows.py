"""Results as rows: read from files, keyed by everything that differs, repeats of one measurement put together."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from liquidfusion.bench import parameters, results
from liquidfusion.bench.caches import HOW
from liquidfusion.bench.stats import mean_and_spread
from liquidfusion.bench.sweep.cells import REFERENCE
from liquidfusion.bench.tasks import TASKS
from liquidfusion.exceptions import ConfigError

UNBOUNDED = (REFERENCE, "full")
NAMES = {REFERENCE: "transformers' cache", "full": "full cache"}
_NOT_CONDITIONS = ("context", "data", "text", "prompts", "seed")

_NEEDED = {
    "figures": ("model_name", "budget", "contexts", "dtype"),
    "windows": ("model_name", "strategy", "budgets_used"),
    "metrics": ("model_name",),
}
"""What the metadata of documents of `speed`, `stream` and `load` must have."""

Facts = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement, all its repeats together.

    Attributes
    ----------
    model, task, strategy
        What was measured.
    label
        The size as it was asked for; ``unbounded`` where a cache has none.
    budget
        Tokens kept; None: all.
    context
        Tokens of the prompt, segment or haystack.
    conditions
        What else was the same for every cache: text, seed, dtype, options of the task, machine, versions.
    settings
        What else was set of the cache: bits, parameters of the strategy, how it ran.
    metrics
        Name → ``value``, ``unit``, ``low``, ``high``, ``full``, ``n``, and over repeats ``sd``. The value of repeats is
        their mean.
    documents
        The results themselves, one for each repeat; none for a row that other rows' figures tell of.
    memory
        Bytes of a row of the batch, if the size was asked for so.
    """

    model: str
    task: str
    strategy: str
    label: str
    budget: int | None
    context: int
    conditions: Facts
    settings: Facts
    metrics: dict[str, dict[str, Any]]
    documents: tuple[dict[str, Any], ...] = ()
    memory: int | None = None

    @property
    def bounded(self) -> bool:
        """Whether the cache forgets."""
        return self.strategy not in UNBOUNDED

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that tells this row from others."""
        return self.model, self.task, self.strategy, self.label, self.context, self.conditions, self.settings

    @property
    def repeats(self) -> int:
        """How often it was measured."""
        return len(self.documents)

    @property
    def size(self) -> str:
        """The size in words."""
        return "all tokens" if self.budget is None else f"{self.budget} tokens"

    @property
    def asked(self) -> str:
        """The size in words; in bytes, in which unlike methods are alike, where it was asked for so."""
        return self.size if self.memory is None else self.label

    def main(self) -> dict[str, Any] | None:
        """Return the metric that its task is judged by, None if it was not measured."""
        return self.metrics.get(main_of(self.task))

    def value(self) -> float | None:
        """Return the value of the main metric; None also for one that is not a number."""
        metric = self.main()
        return None if metric is None else metric["value"]

    def bytes(self) -> float | None:
        """Return the bytes that the cache held for each row of a batch, the mean over what was measured."""
        held = [
            item["result"]["scores"]["cache_bytes"] / item["result"]["request_time"]["batch_size"]
            for document in self.documents
            for item in document["results"]
            if "cache_bytes" in item["result"]["scores"]
        ]
        return float(np.mean(held)) if held else None

    def speed(self) -> float | None:
        """Return tokens, or questions, a second."""
        for name in ("tokens_per_second", "seconds_per_question"):
            value = self.metrics.get(name, {}).get("value")
            if value:
                return float(value if name == "tokens_per_second" else 1 / value)
        return None


def main_of(task: str) -> str:
    """Return the name of the metric that a task is judged by; a task of another version: the first of all."""
    return TASKS[task].main if task in TASKS else next(iter(TASKS.values())).main


def lower_is_better(task: str) -> bool:
    """Whether less of a task's main metric is better."""
    return task in TASKS and TASKS[task].lower


@dataclass(frozen=True, slots=True)
class Found:
    """Everything that was found in a directory.

    Attributes
    ----------
    rows
        Results of tasks.
    errors
        Cells that failed: ``task`` and ``error``.
    speeds, streams, loads
        Documents of `speed`, `stream` and `load`; of equal ones the newest.
    skipped
        File → why it is no result.
    """

    rows: list[Row]
    errors: list[dict[str, str]] = field(default_factory=list)
    speeds: list[dict[str, Any]] = field(default_factory=list)
    streams: list[dict[str, Any]] = field(default_factory=list)
    loads: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def skipped_words(self) -> str:
        """Return one line about the files that are no results; empty if there are none."""
        if not self.skipped:
            return ""
        files = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
        return f"skipped {len(self.skipped)} file{'s' if len(self.skipped) > 1 else ''}: {files}"


def read(directory: Path) -> Found:
    """Read every result below a directory.

    Raises
    ------
    ConfigError
        The directory does not exist or holds no result.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: there is no such directory")
    singles: list[Row] = []
    found = Found([])
    speeds: dict[str, dict[str, Any]] = {}
    streams: dict[str, dict[str, Any]] = {}
    loads: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.rglob("*.json"), key=lambda path: path.stat().st_mtime):
        try:
            document = json.loads(path.read_text(encoding="utf8"))
            if path.name.endswith(".error.json"):
                found.errors.append({"task": str(document["task"]), "error": str(document["error"])})
            elif "figures" in document:
                speeds[_identity(document)] = _checked(document, "figures")
            elif document["metadata"].get("task") == "load":
                loads[_identity(document)] = _checked(document, "metrics")
            elif "windows" in document:
                streams[_identity(document)] = _checked(document, "windows")
            else:
                singles.append(row(document))
        except (json.JSONDecodeError, UnicodeDecodeError):
            reason = "empty" if path.stat().st_size == 0 else "not JSON, or not all of it"
            found.skipped[str(path.relative_to(directory))] = reason
        except OSError as error:
            found.skipped[str(path.relative_to(directory))] = str(error.strerror)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError):
            found.skipped[str(path.relative_to(directory))] = "not a result"
    of_commands: dict[str, Any] = {
        "speeds": list(speeds.values()),
        "streams": list(streams.values()),
        "loads": list(loads.values()),
    }
    found = replace(found, rows=together(singles), **of_commands)
    if not (found.rows or any(of_commands.values())):
        raise ConfigError(
            f"{directory} holds no result; measure with: liquidfusion-bench sweep --output-dir {directory}"
            + (f" ({found.skipped_words()})" if found.skipped else "")
        )
    return found


def _identity(document: dict[str, Any]) -> str:
    changing = ("created", "seconds", "machine", "versions")
    metadata = document["metadata"]
    facts = {name: value for name, value in metadata.items() if name not in changing}
    return json.dumps([facts, sorted(conditions(metadata))], sort_keys=True)


def _checked(document: dict[str, Any], part: str) -> dict[str, Any]:
    """Refuse a document that lacks what its section needs."""
    metadata = document["metadata"]
    lacking = [name for name in _NEEDED[part] if name not in metadata]
    if lacking or not isinstance(metadata.get("machine", {}), dict) or not document[part]:
        raise ValueError("not a result")
    return document


def row(document: dict[str, Any]) -> Row:
    """Return the row of one result document; what a document must have for that is a KeyError or a TypeError away."""
    metadata, metrics = document["metadata"], document["metrics"]
    budgets, request = metadata["budgets_used"], document["results"][0]["request"]
    tokens = metrics["prompt_tokens"]["value"] if "prompt_tokens" in metrics else request.get("tokens")
    for item in document["results"]:
        _ = item["result"]["scores"], item["result"]["request_time"]["batch_size"] / 1
    strategy = str(metadata["strategy"])
    return Row(
        model=str(metadata["model_name"]),
        task=str(metadata["task"]),
        strategy=strategy,
        label="unbounded"
        if strategy in UNBOUNDED
        else results.size_label(metadata["cache_size"], metadata["budget"], metadata.get("memory")),
        budget=round(sum(budgets) / len(budgets)) if budgets and strategy not in UNBOUNDED else None,
        context=int(tokens or request.get("length") or 0),
        conditions=conditions(metadata),
        settings=settings(metadata),
        metrics={name: _metric(metric) for name, metric in metrics.items()},
        memory=None if strategy in UNBOUNDED else metadata.get("memory"),
        documents=(document,),
    )


def _metric(metric: Mapping[str, Any]) -> dict[str, Any]:
    whole = {"unit": "", "low": None, "high": None, "full": None, "n": None, "sd": None} | dict(metric)
    for name in ("value", "low", "high", "full"):
        number = whole[name]
        if number is not None and not math.isfinite(number):
            whole[name] = None
    return whole


def conditions(metadata: Mapping[str, Any]) -> Facts:
    """Return what was the same for every cache, in words: name and value."""
    machine, read = metadata.get("machine") or {}, metadata.get("input") or {}
    text = str(read.get("source", "unknown")) + (f" ({read['sha256'][:6]})" if read.get("sha256") else "")
    facts = {
        "text": text,
        "seed": metadata.get("seed"),
        "dtype": metadata.get("dtype"),
        **{name: v for name, v in (metadata.get("task_options") or {}).items() if name not in _NOT_CONDITIONS},
        "lengths": lengths
        if isinstance(lengths := (metadata.get("task_options") or {}).get("context"), list)
        else None,
        "device": str(metadata.get("device", "")).partition(":")[0],
        "processor": machine.get("gpu") or machine.get("processor"),
        "cores": machine.get("cores"),
        "torch threads": machine.get("torch_threads"),
        **{name: value for name, value in (metadata.get("versions") or {}).items() if value is not None},
    }
    return tuple((name, _words(value)) for name, value in facts.items() if value is not None)


def settings(metadata: Mapping[str, Any]) -> Facts:
    """Return what was set of a cache, in words: name and value. What follows from the budget is not set."""
    strategy, given = metadata["strategy"], metadata.get("given") or {}
    known = parameters.defaults(strategy) if strategy in parameters.strategy_names() else {}
    facts = {"bits": metadata.get("bits")}
    for name in parameters.table():
        facts[name] = given.get(name) if known.get(name) is None else metadata.get(name)
    facts |= {name: metadata.get(name) for name in HOW}
    facts |= {str(name): value for name, value in (metadata.get("rival") or {}).items()}
    return tuple((name, _words(value)) for name, value in facts.items() if value is not None)


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_words, dict.fromkeys(value)))
    return (
        "on" if value is True else "off" if value is False else f"{value:g}" if isinstance(value, float) else str(value)
    )


def together(rows: Iterable[Row]) -> list[Row]:
    """Return the rows with repeats of one measurement put together, in order of budget."""
    alike: dict[tuple[Any, ...], list[Row]] = {}
    for one in rows:
        alike.setdefault(one.key, []).append(one)
    merged = [_mean(group) for group in alike.values()]
    return sorted(merged, key=lambda row: (row.model, row.task, row.budget or 0, row.context))


def _mean(group: Sequence[Row]) -> Row:
    if len(group) == 1:
        return group[0]
    metrics = {}
    for name, metric in group[-1].metrics.items():
        each = [row.metrics[name] for row in group if name in row.metrics]
        means = {part: _over([one[part] for one in each]) for part in ("value", "low", "high", "full")}
        values = [one["value"] for one in each if one["value"] is not None]
        spread = mean_and_spread(values)[1] if len(values) == len(each) else None
        metrics[name] = metric | means | {"sd": spread}
    return replace(group[-1], metrics=metrics, documents=tuple(d for row in group for d in row.documents))


def _over(values: Sequence[float | None]) -> float | None:
    """Return the mean; None if one of them is missing."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one model and task that were measured under the same conditions, so that caches can be compared.

    Attributes
    ----------
    told
        The conditions in which it differs from the other blocks of its model and task.
    rows
        With the full cache's figures; where it has no result of its own, those that the others tell of.
    """

    model: str
    task: str
    told: dict[str, str]
    rows: list[Row]

    def method(self, row: Row) -> str:
        """Return the name of a row's cache: the strategy, and what of it differs from others of the same strategy."""
        alike = [dict(other.settings) for other in self.rows if other.strategy == row.strategy]
        own = dict(row.settings)
        differing = [name for name in own if len({other.get(name) for other in alike}) > 1]
        words = [f"{own[name]} bits" if name == "bits" else f"{name} {own[name]}" for name in differing]
        return ", ".join([NAMES.get(row.strategy, row.strategy), *words])

    def methods(self) -> dict[str, list[Row]]:
        """Return method → its rows, bounded ones by strategy in the order of the registry."""
        order = [*UNBOUNDED, *parameters.strategy_names()]
        found: dict[str, list[Row]] = {}
        place = {name: index for index, name in enumerate(order)}
        for row in sorted(self.rows, key=lambda row: place.get(row.strategy, len(order))):
            found.setdefault(self.method(row), []).append(row)
        return found

    def reference(self, context: int) -> Row | None:
        """Return the row that others are compared with: the task's own reference, in the model's own precision."""
        for strategy in UNBOUNDED:
            for row in self.rows:
                if row.strategy == strategy and row.context == context and "bits" not in dict(row.settings):
                    return row
        return None


def blocks(rows: Sequence[Row]) -> list[Block]:
    """Return the rows in blocks of one model, task and set of conditions."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.task), []).append(row)
    found = []
    for (model, task), group in groups.items():
        each = list(dict.fromkeys(row.conditions for row in group))
        names = list(dict.fromkeys(name for facts in each for name, _ in facts))
        differing = [name for name in names if len({dict(facts).get(name) for facts in each}) > 1]
        for facts in each:
            told = {name: dict(facts).get(name, "unknown") for name in differing}
            alike = [row for row in group if row.conditions == facts]
            found.append(Block(model, task, told, [*_missing_full(alike), *alike]))
    return found


def _missing_full(rows: Sequence[Row]) -> list[Row]:
    """Return rows of full caches that have no result of their own, of the figures that others carry of them."""
    found: dict[int, Row] = {}
    known = {row.context for row in rows if row.strategy in UNBOUNDED}
    for row in rows:
        full = {name: metric["full"] for name, metric in row.metrics.items() if metric["full"] is not None}
        if row.context in known or row.context in found or main_of(row.task) not in full:
            continue
        metrics = {name: _metric({"value": value, "unit": row.metrics[name]["unit"]}) for name, value in full.items()}
        strategy = REFERENCE if row.task in TASKS and TASKS[row.task].reference.strategy != "full" else "full"
        found[row.context] = replace(
            row, strategy=strategy, label="unbounded", budget=None, settings=(), metrics=metrics, documents=()
        )
    return list(found.values())


def front(rows: Sequence[Row], lower: bool) -> list[Row]:
    """Return the rows of which no other is at least as good in quality, bytes and speed, and better in one.

    Rows without a quality or bytes are not compared; a speed that is unknown counts as the slowest.
    """

    def worth(row: Row) -> tuple[float, float, float] | None:
        value, held = row.value(), row.bytes()
        if value is None or held is None:
            return None
        return -value if lower else value, -held, row.speed() or 0.0

    known = [(row, found) for row in rows if (found := worth(row)) is not None]
    return [
        row
        for row, own in known
        if not any(all(o >= w for o, w in zip(other, own, strict=True)) and other != own for _, other in known)
    ]
