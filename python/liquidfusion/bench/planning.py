"""``plan``: what fits into a GPU and how fast it can be, from a model's configuration alone."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from liquidfusion.bench.caches import CacheOptions
from liquidfusion.bench.models import ModelError, first_line, locate, silence
from liquidfusion.bench.speed import SHAPES, shape_config
from liquidfusion.exceptions import ConfigError

GPUS = {
    "rtx3090": (24, 0.936),
    "rtx4090": (24, 1.008),
    "l4": (24, 0.300),
    "l40s": (48, 0.864),
    "a100": (80, 2.039),
    "h100": (80, 3.35),
    "h200": (141, 4.8),
    "b200": (180, 8.0),
}
"""Name → memory in GB and bandwidth in TB/s, from the makers' data sheets."""

_GRAPH, _COMPILED = 0.58, 0.70
"""Shares of the data sheet's bandwidth that whole decode steps reached on an H100; see docs/performance.md."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes, batches, the least time that memory bandwidth allows and the time to expect.

    Attributes
    ----------
    weight_bytes
        The model's weights.
    full_cache_bytes, bounded_cache_bytes
        The cache of the whole batch at the end of the context.
    budget
        Tokens the bounded cache keeps for each layer, row and kv head; None: all.
    full_fits, bounded_fits
        Whether weights and cache fit into the memory that is not held back.
    full_largest_batch, bounded_largest_batch
        Rows that fit.
    full_least_seconds, bounded_least_seconds
        Least time for one token of every row: weights and cache are read once.
    full_step_seconds, bounded_step_seconds
        Time to expect, from what was measured: of transformers' StaticCache with torch.compile, and of `KVCache`.
    speedup
        The ratio of the times to expect.
    full_tokens_per_second, bounded_tokens_per_second
        Tokens a second to expect at the largest batch that fits; 0 if none fits.
    """

    weight_bytes: int
    full_cache_bytes: int
    bounded_cache_bytes: int
    budget: int | None
    full_fits: bool
    bounded_fits: bool
    full_largest_batch: int
    bounded_largest_batch: int
    full_least_seconds: float
    bounded_least_seconds: float
    full_step_seconds: float
    bounded_step_seconds: float
    speedup: float
    full_tokens_per_second: float
    bounded_tokens_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def read_config(name: str) -> PreTrainedConfig:
    """Return a model's configuration: ``smollm2``, a shape of ``speed``, a directory or a hub id; no weights are read.

    Raises
    ------
    ModelError
        There is none.
    """
    if name in SHAPES:
        return shape_config(name)
    source = locate(name)
    with silence():
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ModelError(f"the configuration of {name!r} cannot be read: {first_line(error)}") from error
    return config


def cache_row_bytes(config: PreTrainedConfig, tokens: int, element: int, ledger: int = 0) -> int:
    """Return the bytes that `tokens` cached tokens of one row take, with `ledger` bytes of bookkeeping a slot."""
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(text.num_hidden_layers * kv_heads * tokens * (2 * head_dim * element + ledger))


def plan(
    config: PreTrainedConfig,
    cache: CacheOptions,
    *,
    memory: float,
    bandwidth: float,
    context: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    reserve: float = 0.1,
) -> Plan:
    """Compute what fits, the least time a token can take and the time to expect.

    The least times are floors: weights and cache read once at full bandwidth. The times to expect use the shares of it
    that were measured, with 8 billion weights on an H100: a smaller model is held up by the number of its kernels
    instead. Where query heads share a key head, a compiled step of transformers copies the cache for each of them: a
    full cache costs a read, and for each query head a write and a read.

    Activations and the transient keys of a prompt in one piece must fit into the reserve.

    Parameters
    ----------
    memory
        Bytes of the device.
    bandwidth
        Bytes a second that the device can read.
    context
        Tokens of prompt and answer; a percentage as cache size refers to it.
    batch
        Rows.
    reserve
        Share of the memory held back.

    Raises
    ------
    ConfigError
        A number is out of range.
    """
    for name, value, unit in (
        ("memory", memory / 1e9, " GB"),
        ("bandwidth", bandwidth / 1e12, " TB/s"),
        ("context", context, ""),
        ("batch", batch, ""),
    ):
        if not value > 0:
            raise ConfigError(f"{name} {value:g}{unit} is not above 0")
    if not 0 <= reserve < 1:
        raise ConfigError(f"reserve {reserve:g} is not a share from 0 up to, but not including, 1")
    spec = cache.spec(context)
    weights, read = _weights(config, dtype.itemsize)
    full_row = cache_row_bytes(config, context, dtype.itemsize)
    # a slot has its position and its place in the queue, 4 bytes each, and two scores if the strategy wants them
    slots = spec.budget if spec.budget is not None else context
    bounded_row = cache_row_bytes(config, slots, dtype.itemsize, ledger=16 if spec.scored else 8)
    room = memory * (1 - reserve) - weights
    full_most, bounded_most = (max(0, int(room // row)) for row in (full_row, bounded_row))
    text = config.get_text_config()
    group = text.num_attention_heads // (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    copies = 1 if group == 1 else 1 + 2 * group
    reached = _COMPILED if cache.compile else _GRAPH

    def full_step(rows: int) -> float:
        return (read / _GRAPH + rows * full_row * copies / _COMPILED) / bandwidth

    def bounded_step(rows: int) -> float:
        return (read + rows * bounded_row) / reached / bandwidth

    return Plan(
        weight_bytes=weights,
        full_cache_bytes=batch * full_row,
        bounded_cache_bytes=batch * bounded_row,
        budget=spec.budget,
        full_fits=full_most >= batch,
        bounded_fits=bounded_most >= batch,
        full_largest_batch=full_most,
        bounded_largest_batch=bounded_most,
        full_least_seconds=(read + batch * full_row) / bandwidth,
        bounded_least_seconds=(read + batch * bounded_row) / bandwidth,
        full_step_seconds=full_step(batch),
        bounded_step_seconds=bounded_step(batch),
        speedup=full_step(batch) / bounded_step(batch),
        full_tokens_per_second=full_most / full_step(full_most),
        bounded_tokens_per_second=bounded_most / bounded_step(bounded_most),
    )


def _weights(config: PreTrainedConfig, element: int) -> tuple[int, int]:
    """Return the bytes of all weights, and of those that every step reads: of the embedding only a few rows are."""
    with torch.device("meta"), silence():
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    return total * element, (total if tied else total - embedding.numel()) * element


def gpu(name: str) -> tuple[float, float]:
    """Return memory in bytes and bandwidth in bytes a second of a GPU from :data:`GPUS`.

    Raises
    ------
    ConfigError
        It is not in the list.
    """
    if name not in GPUS:
        raise ConfigError(f"gpu {name!r} is unknown; accepted: {', '.join(GPUS)}, or give --memory and --bandwidth")
    memory, bandwidth = GPUS[name]
    return memory * 1e9, bandwidth * 1e12
