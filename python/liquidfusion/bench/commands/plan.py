"""``plan``: what fits into a device, and how fast it can be."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liquidfusion.bench.commands.options import ListJsonOption, takes_options

if TYPE_CHECKING:
    from liquidfusion.bench.caches import CacheOptions
else:
    CacheOptions = Any


@dataclass(frozen=True, slots=True)
class Device:
    """What the model is to run on."""

    name: Annotated[
        str,
        typer.Option("--on", "--gpu", help="h100, l4, rtx4090, m4-laptop, laptop-ddr5, …; this: measure this machine."),
    ] = "h100"
    memory: Annotated[float | None, typer.Option(help="Memory of the device in GB.", show_default="that of --on")] = (
        None
    )
    bandwidth: Annotated[float | None, typer.Option(help="Memory bandwidth in TB/s.", show_default="that of --on")] = (
        None
    )
    reserve: Annotated[float, typer.Option(help="Share of the memory held back.")] = 0.1


@takes_options(without=("memory", "positions", "threads", "graph", "overlap"), budget=2048)
def plan(
    cache: CacheOptions,
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="smollm2, a local directory or a hub id; only its configuration is read."),
    ] = "smollm2",
    shape: Annotated[
        str | None,
        typer.Option(
            help="A shape instead of a model: llama-3.1-8b, qwen3-8b, gemma-2-9b, gpt-oss-20b, smollm2-135m.",
            show_default=False,
        ),
    ] = None,
    device: Device = Device(),
    context: Annotated[int, typer.Option(min=1, help="Tokens of prompt and answer.")] = 32768,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of weights and cache: float32, bfloat16 or float16.")] = "bfloat16",
    as_json: ListJsonOption = False,
) -> None:
    """Tell what fits into a device, and how fast it can be, from a model's configuration alone.

    The largest budget that fits is the answer to the reverse question: what may a cache for this batch keep?
    """
    import torch

    from liquidfusion.bench import models, results
    from liquidfusion.bench.jobs import planning
    from liquidfusion.bench.terminal.plan import show_plan

    place = planning.find_device(device.name)
    place = planning.Device(
        place.memory if device.memory is None else device.memory * 1e9,
        place.bandwidth if device.bandwidth is None else device.bandwidth * 1e12,
        place.cuda,
    )
    found = planning.plan(
        planning.read_config(shape or model),
        cache,
        place,
        context=context,
        batch=batch,
        dtype=models.resolve_dtype(dtype, torch.device("cuda")),
        reserve=device.reserve,
    )
    if as_json:
        typer.echo(results.to_json(found.as_dict()), nl=False)
    else:
        show_plan(found, f"{shape or model}, {context:,} tokens, batch {batch}", cache.strategy)
