"""``speed``: decode and prefill timed beside transformers' own caches."""

from dataclasses import dataclass
from typing import Annotated

import typer

from liquidfusion.bench.commands.options import Device, Output, takes_options
from liquidfusion.exceptions import ConfigError


@dataclass(frozen=True, slots=True)
class Lengths:
    """What is measured."""

    budget: Annotated[int, typer.Option(min=8, help="Slots of the bounded cache.")] = 2048
    bits: Annotated[
        str | None,
        typer.Option(
            help="Of each number of the bounded cache's keys and values: 16, 8, 4, or of both: 4,2.",
            show_default="the model's own",
        ),
    ] = None
    contexts: Annotated[str, typer.Option(help="Context lengths of the full caches, with commas.")] = "32768,131072"
    prefill: Annotated[str, typer.Option(help="Prompt lengths, with commas.")] = "32768"
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once, where there are several.")] = 64
    chunk: Annotated[int, typer.Option(min=2, help="Tokens of a prompt fed in one call.")] = 4096
    steps: Annotated[int, typer.Option(min=1, help="Decode steps timed together.")] = 100
    parts: Annotated[
        str | None,
        typer.Option(
            help="What to measure, with commas: decode, compile, generate, batch, prefill, memory, bookkeeping (what "
            "eviction costs), compiled_batch.",
            show_default="all but the last two, a few minutes on a GPU",
        ),
    ] = None
    static: Annotated[
        bool, typer.Option(help="With decode: also StaticCache with torch.compile, which takes minutes a context.")
    ] = False
    profile: Annotated[bool, typer.Option(help="Also the kernels of our steps with one row, by time.")] = False


@takes_options()
def speed(
    shape: Annotated[
        str,
        typer.Option(
            help="Random weights: llama-3.1-8b, qwen3-8b, gemma-2-9b, gpt-oss-20b, smollm2-135m or custom (small)."
        ),
    ] = "smollm2-135m",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A model instead of a shape: smollm2, a directory or a hub id.")
    ] = None,
    lengths: Lengths = Lengths(),
    device: Device = Device(),  # noqa: B008 - frozen
    output: Output = Output(),  # noqa: B008 - frozen
) -> None:
    """Time decode and prefill beside transformers' own caches, on one model in one run.

    Beside the throughputs stands the roofline of any engine with an exact cache: rows that fit, read once, full speed.
    """
    from dataclasses import asdict

    from liquidfusion import files
    from liquidfusion.bench import inputs, machine, models, results
    from liquidfusion.bench.jobs import shapes
    from liquidfusion.bench.jobs import speed as job
    from liquidfusion.bench.terminal.output import table
    from liquidfusion.precision import Bits

    chosen = tuple(inputs.words(lengths.parts)) or job.USUAL
    for part in chosen:
        if part not in job.PARTS:
            raise ConfigError(f"--parts {part!r} is unknown; accepted: {', '.join(job.PARTS)}")
    bits = Bits.of(lengths.bits)
    plan = job.Plan(
        budget=lengths.budget,
        bits=None if bits is None else bits.given,
        contexts=_numbers("contexts", lengths.contexts),
        prefill=_numbers("prefill", lengths.prefill),
        batch=lengths.batch,
        chunk=lengths.chunk,
        steps=lengths.steps,
        parts=chosen,
        static=lengths.static,
        profile=lengths.profile,
    )
    where = models.resolve_device(device.device)
    kind = models.resolve_dtype(device.dtype, where)
    shapes.shape_config(shape)
    files.check_writable(output.output_dir)
    if model is None:
        name, measured = shape, shapes.build(shape, where, kind)
    else:
        loaded = models.load(model, device=device.device, dtype=device.dtype)
        name, measured = loaded.name, loaded.model
    path = output.output_dir / f"speed_{results.safe(name)}_{results.stamp()}.json"
    found = job.Results()
    metadata = {
        "model_name": name,
        **asdict(plan),
        "dtype": str(kind).removeprefix("torch."),
        "device": str(where),
        "versions": machine.versions(),
        "machine": machine.describe(where),
    }

    def save() -> str:
        text = results.to_json({"metadata": metadata, "figures": found.figures, "failures": found.failures})
        files.write_text(path, text)
        return text

    def keep(line: str) -> None:
        if not output.as_json and not output.quiet:
            typer.echo(line)
        save()

    found.report = keep
    job.Bench(measured, plan, found).run()
    text = save()
    if output.as_json:
        typer.echo(text, nl=False)
    elif output.quiet:
        typer.echo(path)
    else:
        table(["figure", "value"], [[key, job.shown(value)] for key, value in found.figures.items()])
        typer.echo(str(path))


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; numbers of tokens with commas are accepted") from None
    if min(lengths) < 1:
        raise ConfigError(f"{name} is {text!r}; every length must be at least 1")
    return lengths
