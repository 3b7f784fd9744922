"""Make docs/results.md: measure what docs/results.yaml lists, keep the figures in docs/results.jsonl, write the page.

Both steps, the second of them alone, or the first within a time limit (start it again and it goes on)::

    python benches/results.py --model qwen=models/qwen2.5-coder-0.5b --rival-python rivals/bin/python --jobs 8
    python benches/results.py --page-only
    python benches/results.py --minutes 8 --only ruler

Every figure of the page is in the ``.jsonl`` file, a line for each cell: model, task, length, method and size.
"""

import argparse
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from liquidfusion.bench import models
from liquidfusion.bench.caches import CacheOptions
from liquidfusion.bench.rivals import Framework, parse
from liquidfusion.bench.rivals.names import PYTHON
from liquidfusion.bench.sweep import work
from liquidfusion.bench.sweep.cells import Cell
from liquidfusion.bench.tasks import TASKS

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A cell, and what the page calls it."""

    cell: Cell
    model: str
    length: int | None
    method: str
    size: str


def jobs(config: Mapping[str, Any], paths: Mapping[str, str], only: Sequence[str], limit: int | None) -> list[Job]:
    """Every cell of the configuration, the most telling first: full caches, then ours and rivals size by size."""
    found = []
    for task, suite in config["suites"].items():
        if only and task not in only:
            continue
        for name in suite.get("models", config["models"]):
            path = paths.get(name, name)
            width = token_bytes(path, config["dtype"])
            compared = suite.get("lengths", [None])
            for length in [*suite.get("full_lengths", []), *compared]:
                options = {**suite.get("options", {}), **({} if length is None else {"context": [length]})}
                if limit is not None:
                    options["limit"] = limit

                def add(method: str, size: str, cache: Any) -> None:
                    cell = Cell(path, task, cache, options, dtype=config["dtype"])  # noqa: B023 - used at once
                    found.append(Job(cell, name, length, method, size))  # noqa: B023

                add("full", "100 %", CacheOptions(strategy="full"))
                for label, size in sizes(suite, length, width) if length in compared else ():
                    for method in suite.get("methods", config["methods"]):
                        for one, cache in caches(method, size, width):
                            add(one, "all tokens" if isinstance(cache, Framework) else label, cache)
    unique = {(job.model, job.cell.task, job.cell.key): job for job in found}
    return sorted(unique.values(), key=lambda job: job.method != "full")


def sizes(suite: Mapping[str, Any], length: int | None, width: int) -> Iterable[tuple[str, dict[str, int]]]:
    """Label and size of each: a share of the full cache's bytes, or tokens."""
    for share in suite.get("shares", []):
        yield f"{share:g} %", {"memory": int((length or 0) * width * share / 100)}
    for budget in suite.get("budgets", []):
        yield f"{budget} tokens", {"budget": budget}


def caches(method: str | Mapping[str, Any], size: Mapping[str, int], width: int) -> Iterable[tuple[str, Any]]:
    """Label and cache of a method: text for rivals, a mapping for ours."""
    if isinstance(method, str):
        for rival in parse(method, **size):
            yield rival.strategy, rival
        return
    given = dict(method)
    label = given.pop("name", None)
    if "budget" in size and given.get("bits"):  # fewer bits, more tokens in the same bytes
        size = {"memory": size["budget"] * width}
    cache = CacheOptions.of(**given, **size)
    words = [f"{key} {value}" for key, value in cache.as_dict().items() if key not in ("strategy", "budget", "memory")]
    yield label or ", ".join([cache.strategy, *words]), cache


def token_bytes(path: str, dtype: str) -> int:
    """Bytes of one token in a full cache of a model, in the dtype that will be used."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(models.locate(path)).get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = models.resolve_dtype(dtype, models.resolve_device("auto")).itemsize
    return int(2 * config.num_hidden_layers * heads * width * item)


def row(job: Job, document: Mapping[str, Any], command: str, jobs: int = 1) -> Row:
    """What the page needs of a result document."""
    metadata, figures = document["metadata"], document["metrics"]
    main = TASKS[job.cell.task].main
    machine = metadata["machine"]
    shown = ("cache_bytes", "share", "seconds_per_question", "passes", "tokens_per_second", "answer_tokens")
    groups: dict[str, list[float]] = {}
    for item in document["results"]:
        groups.setdefault(item["request"].get("subtask", ""), []).append(item["result"]["scores"]["score"])
    return {
        "cell": job.cell.key,
        "model": job.model,
        "task": job.cell.task,
        "length": job.length,
        "method": job.method,
        "size": job.size,
        "n": len(document["results"]),
        **{key: figures[main][key] for key in ("value", "low", "high")},
        "subtasks": {name: sum(values) / len(values) for name, values in groups.items() if name},
        **{name: figures[name]["value"] for name in shown if name in figures},
        "question": metadata["task_options"].get("question", "seen"),
        "card": machine.get("gpu") or machine.get("processor"),
        "dtype": metadata["dtype"],
        "versions": {
            **metadata["versions"],
            **{f"{name} of rivals": version for name, version in (metadata.get("rival") or {}).items()},
        },
        "created": metadata["created"],
        "command": command,
        "jobs": jobs,
    }


def read(path: Path) -> list[Row]:
    """The rows kept so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()] if path.exists() else []


def measure(todo: Sequence[Job], args: argparse.Namespace, kept: list[Row]) -> list[str]:
    """Measure what is not kept yet, append each row as it is there, and return what failed."""
    by_key = {job.cell.key: job for job in todo}
    done = {row["cell"] for row in kept}
    cells = [job.cell for job in todo if job.cell.key not in done]
    command = "python benches/results.py" + "".join(f" --only {name}" for name in args.only)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    failed = []
    outcomes = work.sweep(cells, args.work, devices=work.devices_of(args.device, args.jobs))
    with args.rows.open("a", encoding="utf8") as file:
        for number, outcome in enumerate(outcomes, 1):
            job = by_key[outcome.cell.key]
            label = f"{job.model} {job.cell.task} {job.length or ''} {job.method} {job.size}"
            if outcome.document is None:
                failed.append(f"{label}: {outcome.error}")
                print(f"{number}/{len(cells)} FAILED {failed[-1]}", flush=True)
            else:
                kept.append(row(job, outcome.document, command, args.jobs))
                file.write(json.dumps(kept[-1]) + "\n")
                file.flush()
                print(f"{number}/{len(cells)} {label}: {kept[-1]['value']:.1f}", flush=True)
            if time.monotonic() > deadline:
                print("the time is over: start again to go on")
                break
        outcomes.close()
    return failed


# The page


def ours(row: Row, config: Mapping[str, Any]) -> bool:
    """Whether a row is of the method that the page speaks for."""
    return bool(row["method"] == config["ours"])


def rival(row: Row) -> bool:
    """Whether a row is of somebody else's program."""
    return ":" in row["method"]


def once(row: Row) -> bool:
    """Whether a method read its prompt once and without the question."""
    return row.get("passes", 1) < 1.01 and row["question"] != "seen"


def page(rows: Sequence[Row], config: Mapping[str, Any]) -> str:
    """The page: what rivals win, then every table, then how it was measured."""
    groups: dict[tuple[str, str, int | None], list[Row]] = {}
    for one in rows:
        groups.setdefault((one["task"], one["model"], one["length"]), []).append(one)
    parts = [_HEAD, _losses(groups, config), _tasks(groups, config)]
    title = None
    for (task, model, length), group in sorted(groups.items(), key=lambda item: str(item[0])):
        if task != title:
            title = task
            parts.append(f"## {task}\n\n{TASKS[task].summary[:1].upper()}{TASKS[task].summary[1:]}.")
        parts.append(_table(model, length, group))
    parts.append(_how(rows, config))
    return "\n\n".join(parts) + "\n"


_HEAD = """\
# Results

`liquid_fusion` beside other people's methods on the same prompts, scored by the same rules. Made by
`python benches/results.py` from `docs/results.yaml` and `docs/results.jsonl`; nothing here is typed by hand.

*Bytes* are what a row's cache holds after its answer, and their share of a full cache of the same tokens in the model's
precision; a press keeps its size of the context, and its question and answer come on top. *Passes* says how often a
method fed the context to the model: 2 means that it read everything twice. Brackets: 95 % bootstrap intervals."""


def _where(key: tuple[str, str, int | None], size: str) -> str:
    task, model, length = key
    return f"{task}, {model}{f', {length:,} tokens' if length else ''}, {size}"


def _losses(groups: Mapping[tuple[str, str, int | None], Sequence[Row]], config: Mapping[str, Any]) -> str:
    lines, compared = [], 0
    for key, group in groups.items():
        for own in filter(lambda row: ours(row, config), group):
            beside = [row for row in group if rival(row) and row["size"] == own["size"]]
            compared += len(beside)
            for better in sorted((row for row in beside if row["value"] > own["value"]), key=lambda row: -row["value"]):
                clear = better["low"] is not None and better["low"] > own["high"]
                note = "" if clear else "; the intervals overlap"
                passes = "" if once(better) else f"; it fed the context {better['passes']:.1f} times"
                lines.append(
                    f"- {_where(key, own['size'])}: `{better['method']}` {better['value']:.1f}, "
                    f"`{own['method']}` {own['value']:.1f} ({_bytes(better)} and {_bytes(own)}{passes}{note})"
                )
    if not compared:
        return "## Where rivals win\n\nNo rival has been measured yet."
    told = "\n".join(lines) or "Nowhere in what was measured."
    return (
        f"## Where rivals win\n\n{compared} comparisons at the same size; a rival is ahead in {len(lines)}:\n\n{told}"
    )


def _tasks(groups: Mapping[tuple[str, str, int | None], Sequence[Row]], config: Mapping[str, Any]) -> str:
    lines = [
        "## Tasks that the full cache can do",
        "",
        "RULER's tasks on which the full cache scores at least 50, and on how many of them ours is ahead of a method "
        "or level with it; means over these tasks.",
        "",
        "| where | method | mean | ours | full | ours ahead or level |",
        "|---|---|---|---|---|---|",
    ]
    for key, group in groups.items():
        full = next((row for row in group if row["method"] == "full"), None)
        if full is None:
            continue
        able = [name for name, value in full["subtasks"].items() if value >= 50]
        for own in filter(lambda row: ours(row, config) and able, group):
            beside = [row for row in group if row["size"] == own["size"] and row is not own]
            for other in sorted(beside, key=lambda row: -row["value"]):
                shared = [name for name in able if name in other["subtasks"] and name in own["subtasks"]]
                if shared:
                    level = sum(own["subtasks"][name] >= other["subtasks"][name] for name in shared)
                    means = (_mean(row["subtasks"][name] for name in shared) for row in (other, own, full))
                    lines.append(
                        f"| {_where(key, own['size'])} | `{other['method']}` | "
                        + " | ".join(f"{mean:.1f}" for mean in means)
                        + f" | {level} of {len(shared)} |"
                    )
    return "\n".join(lines) if len(lines) > 6 else "## Tasks that the full cache can do\n\nNot measured yet."


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _bytes(row: Row) -> str:
    return f"{row['cache_bytes'] / 2**20:.2f} MiB"


def _table(model: str, length: int | None, group: Sequence[Row]) -> str:
    full = next((row["value"] for row in group if row["method"] == "full"), None)
    title = f"### {model}{f', {length:,} tokens' if length else ''}"
    speed = any("tokens_per_second" in row for row in group)
    head = ["size", "method", "score", "of full", "bytes", "share", "s a question", "passes", "question", "n"]
    lines = [title, "", "| " + " | ".join(head + (["tokens/s"] if speed else [])) + " |"]
    lines.append("|---" * (len(head) + speed) + "|")
    sizes = list(dict.fromkeys(row["size"] for row in group))
    for row in sorted(group, key=lambda row: (sizes.index(row["size"]), -row["value"])):
        interval = "" if row["low"] is None else f" [{row['low']:.0f}, {row['high']:.0f}]"
        cells = [
            row["size"],
            f"`{row['method']}`",
            f"{row['value']:.1f}{interval}",
            f"{row['value'] / full:.2f}" if full else "-",
            _bytes(row),
            f"{100 * row['share']:.1f} %",
            f"{row['seconds_per_question']:.2f}",
            f"{row['passes']:.1f}",
            row["question"],
            str(row["n"]),
        ]
        cells += [f"{row.get('tokens_per_second', 0):.0f}"] if speed else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _how(rows: Sequence[Row], config: Mapping[str, Any]) -> str:
    lines = ["## How it was measured", ""]
    for task, suite in config["suites"].items():
        if all(row["task"] != task for row in rows):
            lines.append(f"- `{task}` has not been measured yet.")
            continue
        options = ", ".join(f"{name} {value}" for name, value in suite.get("options", {}).items()) or "as by default"
        lines.append(f"- `{task}`: {options}.")
    most = max((row["jobs"] for row in rows), default=1)
    if most > 1:
        lines.append(f"- Up to {most} processes shared a card: seconds and tokens/s compare methods, roughly.")
    for card in dict.fromkeys((row["card"], row["dtype"]) for row in rows):
        versions: dict[str, set[str]] = {}
        for row in (row for row in rows if (row["card"], row["dtype"]) == card):
            for name, value in row["versions"].items():
                if value is not None:
                    versions.setdefault(name, set()).add(value)
        told = ", ".join(f"{name} {' and '.join(sorted(values))}" for name, values in versions.items())
        lines.append(f"- On {card[0]}, {card[1]}: {told}.")
    commands = [f"$ {command}" for command in dict.fromkeys(row["command"] for row in rows)]
    return "\n".join([*lines, "", "```console", *commands, "```"] if commands else lines)


def main() -> None:
    """Measure, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("docs/results.yaml"))
    parser.add_argument("--rows", type=Path, help="the figures kept; by default beside the configuration")
    parser.add_argument("--page", type=Path, help="the page; by default beside the configuration")
    parser.add_argument("--work", type=Path, default=Path("benchmark_results/page"), help="where documents are kept")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH", help="where a model is")
    parser.add_argument("--only", action="append", default=[], metavar="SUITE", help="measure these suites only")
    parser.add_argument("--limit", type=int, help="examples of each task, instead of the configuration's")
    parser.add_argument("--minutes", type=float, help="start nothing more after this time")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rival-python", help="an interpreter with kvpress")
    parser.add_argument("--page-only", action="store_true", help="write the page from the figures kept")
    args = parser.parse_args()
    args.rows = args.rows or args.config.with_suffix(".jsonl")
    if args.rival_python:
        os.environ[PYTHON] = str(Path(args.rival_python).absolute())
    config = yaml.safe_load(args.config.read_text(encoding="utf8"))
    kept, failed = read(args.rows), []
    if not args.page_only:
        paths = dict(word.split("=", 1) for word in args.model)
        failed = measure(jobs(config, paths, args.only, args.limit), args, kept)
    target = args.page or args.config.with_suffix(".md")
    target.write_text(page(kept, config), encoding="utf8")
    print(f"{target}: {len(kept)} rows" + "".join(f"\nfailed: {text}" for text in failed))


if __name__ == "__main__":
    main()
