"""From settings to a service: the model, as many rows as fit, and what is kept."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liquidfusion.exceptions import ConfigError

if TYPE_CHECKING:
    import torch

    from liquidfusion.serving.service import Service

CPU_ROWS = 8
"""Rows without a GPU: more only make each slower."""
MOST_ROWS = 256
"""Rows on a GPU, unless asked for."""
RESERVE = 0.12
"""Share of a GPU's memory left to activations, captured graphs and logits."""
QUEUE = 4
"""Requests that may wait for each row, unless asked for."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 2 ** (10 * power) for power, unit in enumerate("KMGT", 1)}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is served, and how.

    Parameters
    ----------
    model : str
        ``"smollm2"``, a directory or a hub id.
    name : str, optional
        The model's name in requests.
    device, dtype : str
        As `liquidfusion-bench` takes them.
    strategy : str
        What a row keeps.
    budget : int
        Slots of a row, per layer and head.
    bits : int or pair of int, optional
        Bits of a stored number, or of keys and values; None: the model's own.
    rows : int, optional
        Requests that run side by side; None: as many as fit.
    queue_limit : int, optional
        Requests that may wait; None: four for each row.
    chunk, step_tokens : int
        Prompt tokens read at once, and tokens of one step.
    conversations : int
        Bytes of host memory for rows of finished answers.
    directory : Path, optional
        Where these rows are kept, too.
    parameters : mapping
        Of the strategy.
    """

    model: str = "smollm2"
    name: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    strategy: str = "liquid_fusion"
    budget: int = 2048
    bits: int | tuple[int, int] | None = None
    rows: int | None = None
    queue_limit: int | None = None
    chunk: int = 512
    step_tokens: int = 1024
    conversations: int = 2**30
    directory: Path | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


def build(settings: Settings) -> Service:
    """Load the model and make its service.

    Raises
    ------
    ConfigError
        A setting is out of range, or not one row fits.
    LiquidFusionError
        The model cannot be loaded, or not be served.
    """
    from liquidfusion.bench.models import load
    from liquidfusion.hf.engine import Engine, end_tokens, row_nbytes
    from liquidfusion.serving.conversations import Conversations
    from liquidfusion.serving.service import Service

    loaded = load(settings.model, device=settings.device, dtype=settings.dtype)
    model: Any = loaded.model
    options = dict(settings.parameters)
    if settings.bits is not None:
        options["bits"] = settings.bits
    rows = settings.rows or rows_that_fit(
        model.device, row_nbytes(model, settings.strategy, settings.budget, **options)
    )
    engine = Engine(
        model,
        rows=rows,
        strategy=settings.strategy,
        budget=settings.budget,
        tokenizer=loaded.tokenizer,
        chunk=settings.chunk,
        step_tokens=settings.step_tokens,
        queue_limit=QUEUE * rows if settings.queue_limit is None else settings.queue_limit,
        **options,
    )
    try:
        conversations = Conversations(settings.conversations, directory=settings.directory, load=engine.load_state)
    except ConfigError:
        engine.close()
        raise
    name = settings.name or loaded.name
    return Service(
        engine,
        loaded.tokenizer,
        name=name,
        aliases=tuple({settings.model, loaded.name} - {name}),
        ends=frozenset(end_tokens(model, loaded.tokenizer)),
        defaults=defaults(model),
        conversations=conversations,
    )


async def stop(service: Service) -> None:
    """End the engine; nobody waits for an answer any more."""
    await asyncio.to_thread(service.close)


def defaults(model: Any) -> dict[str, float]:
    """Sampling parameters that the model's maker set."""
    given = model.generation_config.to_diff_dict()
    names = ["top_k", "top_p", "min_p", "repetition_penalty"] + ["temperature"] * bool(given.get("do_sample"))
    return {name: given[name] for name in names if given.get(name) is not None}


def rows_that_fit(device: torch.device, row: int) -> int:
    """Rows of `row` bytes for which `device` has room beside the model that it holds already.

    Raises
    ------
    ConfigError
        Not one.
    """
    import torch

    if device.type != "cuda":
        return CPU_ROWS
    free, total = torch.cuda.mem_get_info(device)
    room = free - RESERVE * total
    if room < row:
        raise ConfigError(
            f"rows=auto: {free / 1e9:.1f} GB of {total / 1e9:.1f} are free and {RESERVE:.0%} are held back; "
            f"not one row of {row / 1e9:.2f} GB fits. A smaller budget or fewer bits are accepted"
        )
    return min(MOST_ROWS, int(room // row))


def size(text: str) -> int:
    """Bytes that a text says: ``"8GiB"``, ``"500MB"``, ``"0"``.

    Raises
    ------
    ConfigError
        It says none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match[2] not in _UNITS:
        raise ConfigError(f"size {text!r}; bytes such as 0, 500MB or 8GiB are accepted")
    return int(float(match[1]) * _UNITS[match[2]])


def precision(text: str | None) -> int | tuple[int, int] | None:
    """Bits that a text says: ``"4"``, or keys and values as ``"8,4"``; None for none.

    Raises
    ------
    ConfigError
        It says none.
    """
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts) or len(parts) > 2:
        raise ConfigError(f"bits {text!r}; 16, 8, 4, or a pair for keys and values such as 4,2 is accepted")
    numbers = tuple(int(part) for part in parts)
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
