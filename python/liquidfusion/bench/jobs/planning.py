"""``plan``: what fits into a device and how fast it can be, from a model's configuration alone."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from liquidfusion import _core
from liquidfusion.bench import decoding, machine
from liquidfusion.bench.caches import CacheOptions
from liquidfusion.bench.jobs.shapes import SHAPES, shape_config
from liquidfusion.bench.models import ModelError, first_line, locate, resolve_device, silence
from liquidfusion.bench.notices import notice
from liquidfusion.exceptions import ConfigError
from liquidfusion.geometry import Geometry
from liquidfusion.hf.formats import plain_formats, row_bytes
from liquidfusion.precision import Bits, slots_in


@dataclass(frozen=True, slots=True)
class Device:
    """Memory in bytes, its bandwidth in bytes a second, and whether it is an NVIDIA GPU, as what was measured."""

    memory: float
    bandwidth: float
    cuda: bool = False


def _of(memory: float, bandwidth: float, *, cuda: bool = False) -> Device:
    return Device(memory * 1e9, bandwidth * 1e12, cuda)


DEVICES = {
    "rtx3090": _of(24, 0.936, cuda=True),
    "rtx4090": _of(24, 1.008, cuda=True),
    "rtx5090": _of(32, 1.792, cuda=True),
    "rtx4060-laptop": _of(8, 0.256, cuda=True),
    "rtx4090-laptop": _of(16, 0.576, cuda=True),
    "l4": _of(24, 0.300, cuda=True),
    "l40s": _of(48, 0.864, cuda=True),
    "a100": _of(80, 2.039, cuda=True),
    "h100": _of(80, 3.35, cuda=True),
    "h200": _of(141, 4.8, cuda=True),
    "b200": _of(180, 8.0, cuda=True),
    "dgx-spark": _of(128, 0.273, cuda=True),
    "m2-laptop": _of(16, 0.100),
    "m4-laptop": _of(16, 0.120),
    "m4-pro-laptop": _of(24, 0.273),
    "m4-max-laptop": _of(64, 0.546),
    "laptop-ddr5": _of(16, 0.0896),
    "laptop-lpddr5x": _of(32, 0.120),
    "desktop-ddr5": _of(64, 0.0896),
    "epyc-9004": _of(768, 0.4608),
    "xeon-sapphire-rapids": _of(512, 0.3072),
}
"""From the makers' data sheets: bandwidth as it is written there, memory in the size that is usual. CPUs: two channels
of DDR5-5600, a 128-bit bus of LPDDR5X-7500, twelve channels of DDR5-4800, eight channels of DDR5-4800."""

THIS = "this"
"""The device of this machine, its bandwidth measured."""

_GRAPH, _COMPILED = 0.58, 0.70
"""Shares of the data sheet's bandwidth that whole decode steps reached on an H100; see docs/performance.md."""

_COPIED = 0.75
"""The least share of a data sheet's bandwidth that a copy reaches on the card it is about."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a model's weights.

    Attributes
    ----------
    total
        All of them.
    looked_up
        Of them the embedding, where it is not the output layer as well: a step reads only a few rows of it.
    experts
        Of them the experts, of which a token is sent to some.
    share
        The share of its experts that one token is sent to; 1 where there are none.
    """

    total: int
    looked_up: int = 0
    experts: int = 0
    share: float = 1.0

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Count a model's weights, which may be on the meta device."""
        embedding: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        tied = head is not None and head.weight is embedding.weight
        experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
        config, share = model.config.get_text_config(decoder=True), 1.0
        for name in ("num_local_experts", "num_experts", "n_routed_experts"):
            if experts and getattr(config, name, None):
                share = min(1.0, config.num_experts_per_tok / getattr(config, name))
        total = sum(parameter.nbytes for parameter in model.parameters())
        return cls(total, 0 if tied else embedding.weight.nbytes, experts, share)

    def read(self, rows: int) -> float:
        """Return the bytes that a decode step of so many rows reads, each sent to experts as if drawn evenly."""
        return self.total - self.looked_up - self.experts * (1 - self.share) ** rows


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
    largest_budget
        Tokens that a bounded cache of this batch may keep so that it fits; 0: not even the fewest.
    model_positions
        Positions that the model was made for; None: it does not say.
    full_least_seconds, bounded_least_seconds
        Least time for one token of every row: weights and cache are read once.
    full_step_seconds, bounded_step_seconds
        Time to expect, from what was measured: of transformers' StaticCache with torch.compile, and of `KVCache`. None
        for devices on which nothing was.
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
    largest_budget: int
    model_positions: int | None
    full_least_seconds: float
    bounded_least_seconds: float
    full_step_seconds: float | None
    bounded_step_seconds: float | None
    speedup: float | None
    full_tokens_per_second: float | None
    bounded_tokens_per_second: float | None

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


def full_row_bytes(geometry: Geometry, context: int, element: int) -> int:
    """Return the bytes of one row of transformers' own cache; layers with a sliding window keep no more than that."""
    return sum(
        layer.kv_heads
        * (layer.key_dim + (0 if layer.latent else layer.value_dim))
        * element
        * min(context, layer.window or context)
        for layer in map(geometry.layers.__getitem__, geometry.attention_layers)
    )


def bounded_row_bytes(geometry: Geometry, spec: _core.Spec, bits: Bits | None, context: int, element: int) -> int:
    """Return the bytes of one row of a bounded cache, positions, scores and queues included.

    Layers whose keys few bits would spoil are found by running the model; here they count like the others.
    """
    return row_bytes(geometry, plain_formats(geometry, bits), spec, context, element)


def largest_budget(geometry: Geometry, cache: CacheOptions, room: float, element: int) -> int:
    """Return the most tokens that a row of a cache may keep in `room` bytes; 0 if not even the fewest fit."""

    def nbytes(budget: int) -> int:
        spec = replace(cache, cache_size=None, memory=None, budget=budget).spec()
        return bounded_row_bytes(geometry, spec, Bits.of(cache.bits), budget, element)

    least = int(cache.spec().params.get("sink_size") or 0) + 4
    room = min(int(room), nbytes(2**30))
    return slots_in(room, nbytes, least) if room >= nbytes(least) else 0


def plan(
    config: PreTrainedConfig,
    cache: CacheOptions,
    device: Device,
    *,
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
    device
        Where the model is to run.
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
        ("memory", device.memory / 1e9, " GB"),
        ("bandwidth", device.bandwidth / 1e12, " TB/s"),
        ("context", context, ""),
        ("batch", batch, ""),
    ):
        if not value > 0:
            raise ConfigError(f"{name} {value:g}{unit} is not above 0")
    if not 0 <= reserve < 1:
        raise ConfigError(f"reserve {reserve:g} is not a share from 0 up to, but not including, 1")
    known = decoding.known_positions(config)
    if known is not None and context > known:
        notice(f"a context of {context:,} tokens is longer than the model's positions: it was made for {known:,}")
    spec = cache.spec(context)
    element = dtype.itemsize
    geometry, weights = _model(config, dtype)
    full_row = full_row_bytes(geometry, context, element)
    bounded_row = bounded_row_bytes(geometry, spec, Bits.of(cache.bits), context, element)
    room = device.memory * (1 - reserve) - weights.total
    full_most, bounded_most = (max(0, int(room // row)) for row in (full_row, bounded_row))
    group = config.get_text_config(decoder=True).num_attention_heads // max(layer.kv_heads for layer in geometry.layers)
    copies = 1 if group == 1 else 1 + 2 * group
    reached = _COMPILED if cache.how.get("compile") else _GRAPH

    def full_step(rows: int) -> float | None:
        seconds = (weights.read(rows) / _GRAPH + rows * full_row * copies / _COMPILED) / device.bandwidth
        return seconds if device.cuda else None

    def bounded_step(rows: int) -> float | None:
        return (weights.read(rows) + rows * bounded_row) / reached / device.bandwidth if device.cuda else None

    full, bounded = full_step(batch), bounded_step(batch)
    return Plan(
        weight_bytes=weights.total,
        full_cache_bytes=batch * full_row,
        bounded_cache_bytes=batch * bounded_row,
        budget=spec.budget,
        full_fits=full_most >= batch,
        bounded_fits=bounded_most >= batch,
        full_largest_batch=full_most,
        bounded_largest_batch=bounded_most,
        largest_budget=largest_budget(geometry, cache, room / batch, element),
        model_positions=known,
        full_least_seconds=(weights.read(batch) + batch * full_row) / device.bandwidth,
        bounded_least_seconds=(weights.read(batch) + batch * bounded_row) / device.bandwidth,
        full_step_seconds=full,
        bounded_step_seconds=bounded,
        speedup=_ratio(full, bounded),
        full_tokens_per_second=_ratio(full_most, full_step(full_most)),
        bounded_tokens_per_second=_ratio(bounded_most, bounded_step(bounded_most)),
    )


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def _model(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[Geometry, Weights]:
    """Return a model's geometry and the bytes of its weights."""
    with torch.device("meta"), silence():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    return Geometry.of(model), Weights.of(model)


def find_device(name: str) -> Device:
    """Return a device of :data:`DEVICES`, or that of this machine: ``this``.

    Raises
    ------
    ConfigError
        It is not in the list.
    """
    if name == THIS:
        return this(resolve_device("auto"))
    if name not in DEVICES:
        raise ConfigError(
            f"device {name!r} is unknown; accepted: {THIS}, {', '.join(DEVICES)}, or give --memory and --bandwidth"
        )
    return DEVICES[name]


def this(place: torch.device, rate: float | None = None) -> Device:
    """Return the device at hand: all its memory, and the rate of a copy, measured unless it is given."""
    cuda = place.type == "cuda"
    memory = torch.cuda.get_device_properties(place).total_memory if cuda else psutil.virtual_memory().total
    return Device(float(memory), machine.copy_rate(place) if rate is None else rate, cuda=cuda)


def at_best(place: torch.device, rate: float | None = None) -> Device:
    """Return the device at hand with the bandwidth that bounds everything on it: its data sheet's where it is known."""
    device = this(place, rate)
    if not device.cuda:
        return device
    return replace(device, bandwidth=published(torch.cuda.get_device_name(place), device.bandwidth))


def published(card: str, rate: float) -> float:
    """Return a card's bandwidth by its data sheet, or a copy's `rate` where :data:`DEVICES` does not have the card.

    Cards of one name differ (for laptops, with other memory): one whose copy is far from a data sheet is not that card.
    """
    name = card.lower().replace(" ", "")
    known = [device.bandwidth for key, device in DEVICES.items() if device.cuda and key in name]
    return max([rate, *(bandwidth for bandwidth in known if _COPIED <= rate / bandwidth <= 1)])


def roofline(
    model: PreTrainedModel, contexts: Sequence[int], device: Device, most: int | None = None
) -> tuple[int, float]:
    """Return the rows of an exact cache that fit beside the weights, and their tokens a second at full bandwidth.

    No engine that keeps every token in the model's dtype exceeds them: all memory is weights and cache, a step takes no
    longer than reading both once, and prompts are for nothing.

    Parameters
    ----------
    contexts
        Tokens that rows hold, as many rows of each.
    device
        See :func:`at_best`.
    most
        Rows that there are.
    """
    geometry, weights = Geometry.of(model), Weights.of(model)
    element = getattr(torch, geometry.dtype).itemsize
    row = statistics.mean(full_row_bytes(geometry, context, element) for context in contexts)
    fitting = max(0, int((device.memory - weights.total) // row))
    rows = fitting if most is None else min(fitting, most)
    return rows, rows * device.bandwidth / (weights.read(rows) + rows * row)
