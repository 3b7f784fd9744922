"""The command ``liquidfusion-bench``.

Exit codes: 0 done; 1 the run failed (model, memory, disk); 2 a bad option or value; 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liquidfusion.bench.options import (
    CACHE,
    INPUT,
    OUTPUT,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ListJsonOption,
    ModelOption,
    OutputOption,
    QuietOption,
    takes_cache,
)
from liquidfusion.exceptions import ConfigError, LiquidFusionError

if TYPE_CHECKING:
    from liquidfusion.bench.caches import CacheOptions

app = typer.Typer(
    help="Measure what a bounded KV cache keeps of a language model, and what it saves.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 the run failed, 2 a bad option or value, 130 interrupted.",
)

_INTERRUPTED = "interrupted; finished results are kept"


def _task_names() -> list[str]:
    from liquidfusion.bench.tasks import TASKS

    return list(TASKS)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and how it was built.")] = False,
) -> None:
    """Handle options that need no command."""
    if version:
        from liquidfusion import _core

        typer.echo(" ".join(f"{name}={value}" for name, value in _core.build_info().items()))
        raise typer.Exit


@app.command()
@takes_cache()
def run(
    model: ModelOption = "smollm2",
    *,
    cache: "CacheOptions",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens to write.", show_default="32, or the task's own", **INPUT),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 takes the likeliest token.", show_default="0", **INPUT)
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.", **INPUT)] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompt-file", "--data", help="Prompts, text or examples of the task: text, or .jsonl.", **INPUT
        ),
    ] = None,
    task: Annotated[
        str,
        typer.Option("--task", "-t", help="What to measure: see `tasks`.", autocompletion=_task_names, **INPUT),
    ] = "generate",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Prompts, segments or examples.", show_default="the task's own", **INPUT)
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens in a segment or haystack; several for a grid: 1024,4096.",
            show_default="the task's own",
            **INPUT,
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            min=1, help="Prompt tokens fed in one call.", show_default="64 or the whole prompt, by task", **INPUT
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows run together.", show_default="the task's own", **INPUT)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another option of the task: see `tasks`.", **INPUT),
    ] = None,
    baseline: Annotated[
        bool | None,
        typer.Option(
            "--baseline/--no-baseline",
            help="Measure the full cache, too.",
            show_default="by task",
            **INPUT,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seeds everything that is drawn.", **INPUT)] = 0,
    output_dir: OutputOption = Path("benchmark_results"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure one strategy at one cache size on one task, and write the result as JSON."""
    from liquidfusion.bench import inputs, models, output, results, runner

    options = inputs.task_options(
        runner.find_task(task),
        prompt=prompt,
        prompt_file=prompt_file,
        limit=limit,
        context=context,
        chunk=chunk,
        batch_size=batch_size,
        max_tokens=max_tokens,
        temperature=temperature,
        extra=set_ or [],
    )
    results.check_writable(output_dir)
    terminal = output.Terminal(quiet=quiet or as_json)
    with terminal.waiting(f"loading {model}"):
        loaded = models.load(model, device=device, dtype=dtype)
    with terminal.progress(f"{cache.strategy} · {task}") as progress:
        document = runner.run(loaded, task, cache, baseline=baseline, seed=seed, progress=progress, **options)
    path = None
    try:
        path = results.save(document, output_dir)
    finally:  # a full disk must not swallow what was measured
        if as_json:
            typer.echo(results.to_json(document), nl=False)
        elif not quiet:
            terminal.show(document, path)
        elif path is not None:
            typer.echo(path)


@app.command()
def sweep(
    models_: Annotated[str, typer.Option("--models", "-m", help="Models, with commas between them.")] = "smollm2",
    strategies_: Annotated[
        str | None,
        typer.Option("--strategies", "-s", help="Strategies, with commas.", show_default="all", **CACHE),
    ] = None,
    cache_sizes: Annotated[
        str | None,
        typer.Option("--cache-sizes", "-c", help="Percentages, with commas.", show_default="4,20,40,80,100", **CACHE),
    ] = None,
    budgets: Annotated[str | None, typer.Option(help="Sizes in tokens, with commas.", **CACHE)] = None,
    tasks_: Annotated[str, typer.Option("--tasks", "-t", help="Tasks, with commas.", **INPUT)] = "generate,perplexity",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Processes; CUDA devices are taken in turn.")] = 1,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to write.", **INPUT)] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 takes the likeliest token.", **INPUT)] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.", **INPUT)] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", "--data", help="Prompts, text or examples.", **INPUT)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts, segments or examples.", **INPUT)] = None,
    context: Annotated[str | None, typer.Option(help="Tokens in a segment or haystack.", **INPUT)] = None,
    chunk: Annotated[int | None, typer.Option(min=1, help="Prompt tokens fed in one call.", **INPUT)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows run together.", **INPUT)] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Another option of a task.", **INPUT)
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", metavar="NAME=VALUE", help="A parameter of the strategies: sink_size=8.", **CACHE),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seeds everything that is drawn.", **INPUT)] = 0,
    output_dir: OutputOption = Path("benchmark_results"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure strategies x sizes x tasks x models; start it again and it continues where it stopped."""
    from liquidfusion.bench import inputs, sweeping
    from liquidfusion.bench.caches import strategy_names

    names = inputs.words(tasks_)
    options = inputs.options_by_task(
        names,
        extra=set_ or [],
        prompt=prompt,
        prompt_file=prompt_file,
        limit=limit,
        context=context,
        chunk=chunk,
        batch_size=batch_size,
        max_tokens=max_tokens,
        temperature=temperature,
    )
    if cache_sizes is None and budgets is None:
        cache_sizes = "4,20,40,80,100"
    work = sweeping.cells(
        models=inputs.words(models_),
        tasks=names,
        strategies=strategy_names() if strategies_ is None else inputs.words(strategies_),
        cache_sizes=inputs.numbers("cache-sizes", cache_sizes, float),
        budgets=inputs.numbers("budgets", budgets, int),
        parameters=inputs.parameters(parameter or []),
        options=options.__getitem__,
        seed=seed,
        dtype=dtype,
    )
    _sweep(work, output_dir, device=device, jobs=jobs, as_json=as_json, quiet=quiet)


def _sweep(work: Sequence[Any], directory: Path, *, device: str, jobs: int, as_json: bool, quiet: bool) -> None:
    """Measure the cells, show them, and end with code 1 if any failed."""
    from liquidfusion.bench import results, sweeping
    from liquidfusion.bench.sweepview import SweepView

    outcomes = []
    with SweepView(work, quiet=quiet or as_json) as view:
        for outcome in sweeping.sweep(work, directory, devices=sweeping.devices_of(device, jobs), progress=view.step):
            outcomes.append(outcome)
            view.finish(outcome)
    if as_json:
        summary = [
            {"file": str(o.cell.path(directory)), "error": o.error, "metrics": o.document and o.document["metrics"]}
            for o in outcomes
        ]
        typer.echo(results.to_json(summary), nl=False)
    elif quiet:
        typer.echo(directory)
    else:
        view.print()
        typer.echo(f"{len(outcomes)} results in {directory}; see them with: liquidfusion-bench report {directory}")
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        print(f"error: {len(failed)} of {len(outcomes)} cells failed; the first: {failed[0].error}", file=sys.stderr)
        raise typer.Exit(1)


def _experiment_names() -> list[str]:
    from liquidfusion.bench import experiments

    return [f"experiment={name}" for name in experiments.available([Path("configs")])]


@app.command()
def experiment(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE...",
            help="experiment=NAME takes NAME.yaml; other keys override it: seed=1 tasks.perplexity.context=512",
            autocompletion=_experiment_names,
            show_default=False,
        ),
    ] = None,
    config_dir: Annotated[
        list[Path] | None, typer.Option(help="Where your experiments are.", show_default="configs, then those shipped")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the settings and count the cells only.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a sweep that is written down in YAML."""
    from dataclasses import asdict

    import yaml

    from liquidfusion.bench import experiments

    chosen = experiments.load(settings or [], config_dir or [Path("configs")])
    work = chosen.cells()
    if dry_run:
        typer.echo(yaml.safe_dump(asdict(chosen), sort_keys=False), nl=False)
        typer.echo(f"# {len(work)} cells")
        return
    _sweep(work, Path(chosen.output_dir), device=chosen.device, jobs=chosen.jobs, as_json=as_json, quiet=quiet)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A directory of results.")] = Path("benchmark_results"),
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Where the report goes.", show_default="the directory itself"),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Also write every chart as SVG into this directory.")] = None,
    png: Annotated[bool, typer.Option("--png", help="Charts as PNG, too (needs cairosvg).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths and the tables' data as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the paths.")] = False,
) -> None:
    """Make one HTML page and a Markdown table of all results in a directory."""
    from liquidfusion.bench import reporting, results

    found = reporting.read(directory)
    target = output_dir or directory
    written = reporting.write(found, target, images=images or (target if png else None), png=png)
    if as_json:
        rows = [
            {"model": r.model, "task": r.task, "strategy": r.strategy, "budget": r.budget, "context": r.context}
            | {"metrics": r.metrics}
            for r in found.rows
        ]
        typer.echo(results.to_json({"files": [str(path) for path in written], "rows": rows}), nl=False)
        return
    if not quiet:
        typer.echo(reporting.markdown(found))
    for path in written:
        typer.echo(path)


@app.command()
@takes_cache()
def stream(
    model: ModelOption = "smollm2",
    *,
    cache: "CacheOptions",
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompt-file",
            "--data",
            help="Text, repeated when it ends; - is standard input, to its end.",
            show_default="Python's reference, repeated",
            **INPUT,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to feed; a --cache-size refers to them.", **INPUT)] = 16384,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens fed in one call; 1 measures decoding.", **INPUT)] = 64,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a reported row.", **INPUT)] = 1024,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    output_dir: OutputOption = Path("benchmark_results"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Feed a text without end through one cache; show perplexity, step time and memory as they go."""
    import time

    from liquidfusion.bench import models, output, results, streaming
    from liquidfusion.bench.streamview import StreamView

    text = streaming.read(prompt_file)
    results.check_writable(output_dir)
    with output.Terminal(quiet=quiet or as_json).waiting(f"loading {model}"):
        loaded = models.load(model, device=device, dtype=dtype)
    size = results.size_label(cache.cache_size, cache.budget)
    path = output_dir / f"{results.file_stem(cache.strategy, loaded.name, size)}_stream_{results.stamp()}.json"
    rows, start, document = [], time.perf_counter(), {}
    ids = streaming.read_tokens(loaded.tokenizer, text)
    try:
        with StreamView(tokens, quiet=quiet or as_json) as view:
            for row in streaming.stream(loaded, ids, cache, tokens=tokens, chunk=chunk, window=window):
                rows.append(row)
                seconds = time.perf_counter() - start
                document = streaming.document(loaded, cache, rows, seconds=seconds, tokens=tokens, chunk=chunk)
                results.write_atomic(path, results.to_json(document))
                view.show(row)
    finally:  # interrupted or failed: what was measured is kept
        if as_json and rows:
            typer.echo(results.to_json(document), nl=False)
        elif rows:
            typer.echo(path)


@app.command()
@takes_cache(without=("cache_size",))
def chat(
    model: ModelOption = "smollm2",
    *,
    cache: "CacheOptions",
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.", **INPUT)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.", **INPUT)] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.", **INPUT)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seeds what is drawn.", **INPUT)] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print each turn as one line of JSON.", **OUTPUT)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the answers.", **OUTPUT)] = False,
) -> None:
    """Chat without end in constant memory: each turn feeds only what is new. /reset, /stats, /quit."""
    from liquidfusion.bench import chatting, models, output

    with output.Terminal(quiet=quiet or as_json).waiting(f"loading {model}"):
        loaded = models.load(model, device=device, dtype=dtype)
    talk = chatting.Chat(loaded, cache, system=system, max_tokens=max_tokens, temperature=temperature, seed=seed)
    chatting.converse(talk, as_json=as_json, quiet=quiet)


@app.command()
@takes_cache(without=("graph", "compile", "overlap"), cache_size=20.0)
def show(
    model: ModelOption = "smollm2",
    *,
    cache: "CacheOptions",
    prompt: Annotated[str | None, typer.Option(help="The text.", show_default="built in", **INPUT)] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the text.", **INPUT)] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="Tokens to write after it.", **INPUT)] = 0,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Tokens fed in one call.", show_default="the whole text", **INPUT)
    ] = None,
    layer: Annotated[int | None, typer.Option(help="One layer only.", show_default="all")] = None,
    head: Annotated[int | None, typer.Option(help="One kv head only.", show_default="all")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Also write a page into this file.", **OUTPUT)] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show which tokens of a text a cache kept: bright ones gathered much attention, evicted ones are struck out."""
    from liquidfusion.bench import models, output, results, showing, texts

    if prompt is not None and prompt_file is not None:
        raise ConfigError("give --prompt or --prompt-file, not both")
    text = prompt if prompt_file is None else texts.read_text(prompt_file)
    if page is not None:
        results.check_writable(page.parent)
    with output.Terminal(quiet=quiet or as_json).waiting(f"loading {model}"):
        loaded = models.load(model, device=device, dtype=dtype)
    showing.check_place(loaded.model.config, layer, head)
    kept = showing.keep(
        loaded, texts.DEFAULT_PROMPT if text is None else text, cache, max_tokens=max_tokens, chunk=chunk
    )
    if page is not None:
        results.write_atomic(page, showing.html(kept, f"What {cache.strategy} kept of {len(kept.tokens)} tokens"))
    if as_json:
        share, intensity = kept.share(layer, head).tolist(), kept.intensity(layer, head).tolist()
        typer.echo(results.to_json({"tokens": kept.tokens, "share": share, "attention_rank": intensity}), nl=False)
    elif quiet:
        typer.echo(page or "")
    else:
        output.show_kept(kept, layer, head, cache.strategy, page)


@app.command()
@takes_cache(without=("positions", "threads", "graph", "overlap"), budget=2048)
def plan(
    model: Annotated[
        str, typer.Option("--model", "-m", help="smollm2, llama-3.1-8b, qwen3-8b, a local directory or a hub id.")
    ] = "smollm2",
    *,
    cache: "CacheOptions",
    gpu: Annotated[
        str | None, typer.Option(help="A GPU by name: h100, a100, l4, rtx4090, …", show_default=False)
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="Memory of the device in GB.", show_default="of --gpu, else h100")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Memory bandwidth in TB/s.", show_default="of --gpu, else h100")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of prompt and answer.")] = 32768,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of weights and cache: float32, bfloat16 or float16.")] = "bfloat16",
    reserve: Annotated[float, typer.Option(help="Share of the memory held back.")] = 0.1,
    as_json: ListJsonOption = False,
) -> None:
    """Tell what fits into a GPU, and how fast it can be, from a model's configuration alone."""
    import torch

    from liquidfusion.bench import models, output, planning, results

    of_gpu = planning.gpu(gpu or "h100")
    kind = models.resolve_dtype(dtype, torch.device("cuda"))
    found = planning.plan(
        planning.read_config(model),
        cache,
        memory=of_gpu[0] if memory is None else memory * 1e9,
        bandwidth=of_gpu[1] if bandwidth is None else bandwidth * 1e12,
        context=context,
        batch=batch,
        dtype=kind,
        reserve=reserve,
    )
    if as_json:
        typer.echo(results.to_json(found.as_dict()), nl=False)
    else:
        output.show_plan(found, f"{model}, {context:,} tokens, batch {batch}", cache.strategy)


@app.command()
def speed(
    shape: Annotated[
        str, typer.Option(help="Random weights: llama-3.1-8b, qwen3-8b, smollm2-135m or custom (small).")
    ] = "smollm2-135m",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A model instead of a shape: smollm2, a directory or a hub id.")
    ] = None,
    budget: Annotated[int, typer.Option(min=8, help="Slots of the bounded cache.")] = 2048,
    contexts: Annotated[str, typer.Option(help="Context lengths of the full caches, with commas.")] = "32768,131072",
    prefill: Annotated[str, typer.Option(help="Prompt lengths, with commas.")] = "32768",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once, where there are several.")] = 64,
    chunk: Annotated[int, typer.Option(min=2, help="Tokens of a prompt fed in one call.")] = 4096,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps timed together.")] = 100,
    parts: Annotated[str | None, typer.Option(help="What to measure, with commas.", show_default="everything")] = None,
    static: Annotated[bool, typer.Option(help="Also StaticCache with torch.compile, which takes minutes.")] = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    output_dir: OutputOption = Path("benchmark_results"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Time decode and prefill beside transformers' own caches, on one model in one run."""
    from dataclasses import asdict

    from liquidfusion.bench import inputs, machine, models, output, results
    from liquidfusion.bench.speed import PARTS, Bench, Plan, Results, build, shape_config, shown

    chosen = tuple(inputs.words(parts or "")) or PARTS
    for part in chosen:
        if part not in PARTS:
            raise ConfigError(f"--parts {part!r} is unknown; accepted: {', '.join(PARTS)}")
    plan = Plan(
        budget, _lengths("contexts", contexts), _lengths("prefill", prefill), batch, chunk, steps, chosen, static
    )
    where = models.resolve_device(device)
    kind = models.resolve_dtype(dtype, where)
    shape_config(shape)
    results.check_writable(output_dir)
    if model is None:
        name, measured = shape, build(shape, where, kind)
    else:
        loaded = models.load(model, device=device, dtype=dtype)
        name, measured = loaded.name, loaded.model
    path = output_dir / f"speed_{results.safe(name)}_{results.stamp()}.json"
    found = Results()
    metadata = {
        "model_name": name,
        **asdict(plan),
        "dtype": str(kind).removeprefix("torch."),
        "versions": machine.versions(),
        "machine": machine.describe(where),
    }

    def save() -> str:
        text = results.to_json({"metadata": metadata, "figures": found.figures, "failures": found.failures})
        results.write_atomic(path, text)
        return text

    def keep(line: str) -> None:
        if not as_json and not quiet:
            typer.echo(line)
        save()

    found.report = keep
    Bench(measured, plan, found).run()
    text = save()
    if as_json:
        typer.echo(text, nl=False)
    elif quiet:
        typer.echo(path)
    else:
        output.table(["figure", "value"], [[key, shown(value)] for key, value in found.figures.items()])
        typer.echo(str(path))


def _lengths(name: str, text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; numbers of tokens with commas are accepted") from None
    if min(lengths) < 1:
        raise ConfigError(f"{name} is {text!r}; every length must be at least 1")
    return lengths


@app.command()
def tasks(as_json: ListJsonOption = False) -> None:
    """List the tasks and their own options."""
    from liquidfusion.bench import output, results
    from liquidfusion.bench.tasks import TASKS

    if as_json:
        listed = [{"task": t.name, "measures": t.summary, "options": t.options()} for t in TASKS.values()]
        typer.echo(results.to_json(listed), nl=False)
        return
    rows = [
        (task.name, task.summary, " ".join(f"{k}={v}" for k, v in task.options().items() if v is not None))
        for task in TASKS.values()
    ]
    output.table(("task", "measures", "options and defaults"), rows)


@app.command()
def strategies(as_json: ListJsonOption = False) -> None:
    """List the strategies, what each keeps, and the paper it comes from."""
    from liquidfusion import _core
    from liquidfusion.bench import output, results

    if as_json:
        typer.echo(results.to_json([dict(entry) for entry in _core.strategies()]), nl=False)
        return
    output.table(
        ("strategy", "keeps", "parameters", "paper"),
        [
            (str(s["name"]), str(s["summary"]), ", ".join(map(str, s["parameters"])), str(s["paper"] or ""))
            for s in _core.strategies()
        ],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; every foreseen error is one line on standard error."""
    try:
        outcome = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        code = outcome if isinstance(outcome, int) else 0
        return _fail(_INTERRUPTED, code) if code == 130 else code
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_INTERRUPTED, 130)
    except ConfigError as error:
        return _fail(str(error), 2)
    except LiquidFusionError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        # the reader of our output left: nothing to tell it, and the interpreter must not try again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}", 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # a bad command line
            return _fail(f"{error.format_message()} (try --help)", getattr(error, "exit_code", 2))
        if type(error).__name__ == "OutOfMemoryError":
            return _fail(f"out of memory: {str(error).splitlines()[0]}", 1)
        raise


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
