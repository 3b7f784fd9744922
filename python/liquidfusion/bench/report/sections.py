"""The parts of a report that tasks fill: a block of rows as charts and tables."""

from collections.abc import Sequence

from liquidfusion.bench import results
from liquidfusion.bench.parameters import strategy_names
from liquidfusion.bench.report.charts import LOOKS, Chart, Point, Section, Series, short
from liquidfusion.bench.report.rows import NAMES, Block, Row, front, lower_is_better, main_of
from liquidfusion.bench.sweep.cells import REFERENCE
from liquidfusion.bench.tasks import TASKS
from liquidfusion.bench.terminal.output import number


def section(block: Block) -> Section:
    """Return the section of a block: the same figures in its charts and in its tables."""
    main, task = main_of(block.task), block.task
    told = "; ".join(f"{name} {value}" for name, value in block.told.items())
    stem = "-".join(filter(None, (task, results.safe(block.model), results.safe(told) if told else "")))
    charts = _timing(stem, block) if task == "generate" else {}
    if task != "generate":
        for context in sorted({row.context for row in block.rows}):
            at = f" at {short(context)} tokens" if context else ""
            for name, chart in _quality(block, context, at).items():
                charts[f"{stem}-{name}-{context}"] = chart
    header, body = _grid(block)
    summary = f"{TASKS[task].summary.capitalize()}." if task in TASKS else ""
    unit = next((m["unit"] for row in block.rows if (m := row.main()) is not None and m["unit"]), "")
    caption = f"{_title(main)} ({f'{unit}, ' if unit else ''}95 % interval; ± standard deviation of n repeats)"
    subject = block.model + (f" · {told}" if told else "")
    return Section(task, subject, summary, charts, caption, header, body, _details(block))


def _title(name: str) -> str:
    return name.replace("_", " ")


def cell(metric: dict[str, object] | None, repeats: int = 1) -> str:
    """Return a figure with its spread over repeats, or its interval, or that it is one sample."""
    if metric is None:
        return ""
    value, low, high, spread = (metric[name] for name in ("value", "low", "high", "sd"))
    text = number(value)  # type: ignore[arg-type]
    if value is None:
        return text
    if repeats > 1:
        return f"{text} ± {number(spread)} (n = {repeats})"  # type: ignore[arg-type]
    if low is not None and high is not None:
        return f"{text} ({number(low)} to {number(high)})"  # type: ignore[arg-type]
    return f"{text} (n = 1)" if metric["n"] == 1 else text


def _grid(block: Block) -> tuple[list[str], list[list[str]]]:
    bounded = sorted((row for row in block.rows if row.bounded), key=lambda row: row.memory or 0)
    columns = list(dict.fromkeys((row.asked, row.context) for row in bounded))
    contexts = {row.context for row in block.rows}
    if not columns:
        columns = [("all tokens", context) for context in sorted(contexts)]
    header = ["cache"] + [size + (f" of {context}" if len(contexts) > 1 else "") for size, context in columns]
    body = []
    for method, rows in block.methods().items():
        if all(row.main() is None for row in rows):
            continue
        cells = {(row.asked, row.context): cell(row.main(), row.repeats) for row in rows}
        if not rows[0].bounded:
            of = {row.context: cell(row.main(), row.repeats) for row in rows}
            cells = {(size, context): of.get(context, "") for size, context in columns}
        body.append([method, *(cells.get(column, "") for column in columns)])
    return header, body


def _details(block: Block) -> tuple[str, list[str], list[list[str]]]:
    """Return one line for each row: quality, bytes and speed, those of the front marked."""
    best = {id(row) for row in front(block.rows, lower_is_better(block.task))}
    header = ["cache", "size", _title(main_of(block.task)), "÷ full", "bytes a row", "÷ full", "per second", "front"]
    if several := len({row.context for row in block.rows}) > 1:
        header.insert(1, "context")
    body = []
    for method, rows in block.methods().items():
        for row in rows:
            full = block.reference(row.context)
            line = [method, *([number(row.context)] if several else []), row.size, cell(row.main(), row.repeats)]
            level, whole = (None, None) if full is None else (full.value(), full.bytes())
            line += [_ratio(row.value(), level), number(row.bytes(), "bytes"), _ratio(row.bytes(), whole)]
            line.append(number(row.speed()))
            body.append([*line, "●" if id(row) in best else ""])
    return "● no other is at least as good in quality, bytes and speed, and better in one", header, body


def _ratio(one: float | None, other: float | None) -> str:
    return "-" if one is None or not other else number(one / other)


def look(strategy: str) -> int:
    """Return the number of a strategy's colour and marker."""
    known = [*strategy_names(), REFERENCE]
    return known.index(strategy) if strategy in known else len(known) + sum(map(ord, strategy)) % 3


def point(row: Row, x: float, name: str, scale: float = 1.0, *, ring: bool = False) -> Point | None:
    """Return a row's figure as a point; None for one that is not a number or was not measured."""
    metric = row.metrics.get(name)
    if metric is None or metric["value"] is None:
        return None
    low, high = (None if metric[end] is None else metric[end] / scale for end in ("low", "high"))
    told = f"{row.size}{f' of {row.context}' if row.context else ''}: {cell(metric, row.repeats)}"
    return Point(x, metric["value"] / scale, low, high, told, ring)


def _series(block: Block, points: dict[str, list[Point]]) -> list[Series]:
    """Return a line for each method that has points, variants of a strategy told apart by their dashes."""
    lines, variants = [], dict[str, int]()
    for method, rows in block.methods().items():
        found = sorted(points.get(method, []), key=lambda point: point.x)
        if found:
            variant = variants[rows[0].strategy] = variants.get(rows[0].strategy, -1) + 1
            own = look(rows[0].strategy)
            lines.append(Series(method, found, own, own + variant + own // LOOKS))
    return lines


def _quality(block: Block, context: int, at: str) -> dict[str, Chart]:
    main = main_of(block.task)
    alike = [row for row in block.rows if row.context == context]
    bounded = [row for row in alike if row.bounded and row.value() is not None]
    full = block.reference(context)
    if not bounded:
        return {}
    reference = None
    if full is not None and (level := point(full, 0.0, main)) is not None:
        reference = (NAMES[full.strategy], level)
    title, found = f"{_title(main)}{at}, {block.model}", {}
    against: dict[str, list[Point]] = {}
    for row in bounded:
        if row.budget is not None and (one := point(row, float(row.budget), main)) is not None:
            against.setdefault(block.method(row), []).append(one)
    if against:
        lines = _series(block, against)
        found[main] = Chart(title, "budget (tokens kept per layer and head)", _title(main), lines, reference)
    if chart := _against_bytes(block, bounded, full, at):
        found["bytes"] = chart
    if chart := _trade(block, alike, at):
        found["trade"] = chart
    return found


def _against_bytes(block: Block, rows: Sequence[Row], full: Row | None, at: str) -> Chart | None:
    """Return quality against the bytes held, both as shares of the full cache's, with the best up to each size."""
    whole, level = (None, None) if full is None else (full.bytes(), full.value())
    unit, divisor = ("% of the full cache", whole / 100) if whole else ("MiB", 2.0**20)
    quality = level or 1.0
    lower, points = lower_is_better(block.task), dict[str, list[Point]]()
    for row in rows:
        held = row.bytes()
        one = None if held is None else point(row, held / divisor, main_of(block.task), quality)
        if one is not None:
            points.setdefault(block.method(row), []).append(one)
    lines = _series(block, points)
    if not lines:
        return None
    best: list[Point] = []
    for one in sorted((p for line in lines for p in line.points), key=lambda p: (p.x, p.y if lower else -p.y)):
        if not best or (one.y < best[-1].y if lower else one.y > best[-1].y):
            best.append(one)
    name = f"{_title(main_of(block.task))}{' ÷ full' if level else ''}"
    title = f"{name} against bytes{at}, {block.model}"
    reference = ("full cache", Point(0.0, 1.0)) if level else None
    return Chart(
        title, f"bytes held ({unit})", name, [*lines, Series("best up to this size", best, 0, 2, step=True)], reference
    )


def _trade(block: Block, rows: Sequence[Row], at: str) -> Chart | None:
    """Return quality against speed; those that nothing beats in quality, bytes and speed have a ring."""
    best = {id(row) for row in front(rows, lower_is_better(block.task))}
    points: dict[str, list[Point]] = {}
    for row in rows:
        speed = row.speed()
        one = None if speed is None else point(row, speed, main_of(block.task), ring=id(row) in best)
        if one is not None:
            points.setdefault(block.method(row), []).append(one)
    lines = _series(block, points)
    if sum(len(line.points) for line in lines) < 2:
        return None
    name, note = _title(main_of(block.task)), "ringed: nothing beats it in quality, bytes and speed at once"
    fed = "questions" if any("seconds_per_question" in row.metrics for row in rows) else "tokens"
    return Chart(f"{name} against speed{at}, {block.model}", f"{fed} a second", name, lines, log=False, note=note)


def _timing(stem: str, block: Block) -> dict[str, Chart]:
    """Return charts of speed, memory and latency; against the context if several were measured, else the budget."""
    found: dict[str, Chart] = {}
    several = len({row.context for row in block.rows}) > 1
    for name, label, scale in (("tokens_per_second", "tokens/s", 1.0), ("cache_bytes", "cache (MiB)", 2.0**20)):
        title = f"{'speed' if scale == 1 else 'memory'} of generation, {block.model}"
        chart = (
            _over_context(block, name, label, title, scale)
            if several
            else _over_budget(block, name, label, title, scale)
        )
        if chart.series:
            found[f"{stem}-{name}"] = chart
    largest = max(row.context for row in block.rows)
    best: dict[str, Row] = {}
    for row in block.rows:  # of each method the largest budget
        if row.context == largest and row.metrics.get("latency_p50", {}).get("value") is not None:
            best[block.method(row)] = row
    names = ["p50", "p90", "p99"]
    points = {
        method: [p for i, part in enumerate(names) if (p := point(row, float(i), f"latency_{part}")) is not None]
        for method, row in best.items()
    }
    if lines := _series(block, points):
        title = f"latency of a token after {short(largest)} tokens, {block.model}"
        found[f"{stem}-latency"] = Chart(
            title, "percentile", "ms per token", lines, log=False, zero=True, categories=names
        )
    return found


def _over_budget(block: Block, name: str, label: str, title: str, scale: float) -> Chart:
    points: dict[str, list[Point]] = {}
    for row in block.rows:
        if row.budget is not None and (one := point(row, float(row.budget), name, scale)) is not None:
            points.setdefault(block.method(row), []).append(one)
    full = next((row for row in block.rows if not row.bounded), None)
    level = None if full is None else point(full, 0.0, name, scale)
    reference = None if full is None or level is None else (NAMES[full.strategy], level)
    return Chart(title, "budget (tokens kept per layer and head)", label, _series(block, points), reference, zero=True)


def _over_context(block: Block, name: str, label: str, title: str, scale: float) -> Chart:
    budgets = sorted({row.budget for row in block.rows if row.budget is not None})
    lines: dict[tuple[str, int | None], Series] = {}
    for row in block.rows:
        one = point(row, float(row.context), name, scale)
        if one is None:
            continue
        method = block.method(row) + ("" if row.budget is None else f", {row.budget} tokens")
        dash = None if row.budget is None else budgets.index(row.budget)
        lines.setdefault((method, row.budget), Series(method, [], look(row.strategy), dash)).points.append(one)
    for line in lines.values():
        line.points.sort(key=lambda point: point.x)
    ordered = sorted(lines.items(), key=lambda item: (item[1].look, item[0][1] or 0))
    return Chart(title, "context (tokens)", label, [line for _, line in ordered], zero=True)
