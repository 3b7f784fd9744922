"""What each layer of a model keeps, how its slots hold it, and how many slots a number of bytes buys."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakSet

import torch
from transformers import PreTrainedModel

from liquidfusion import _core
from liquidfusion.compute.codes import Coding
from liquidfusion.compute.rotary import Rotary
from liquidfusion.exceptions import UnsupportedError
from liquidfusion.geometry import Geometry, Layer
from liquidfusion.hf.probe import COSTLY, probe
from liquidfusion.options import Strategy
from liquidfusion.precision import Bits, slots_in
from liquidfusion.state.slots import Format

SMALLEST_WINDOW = 8
"""Sliding windows of fewer tokens are kept by the cache's own strategy."""

POSITION_BYTES, SCORE_BYTES, VICTIM_BYTES = 4, 8, 4

_warned: WeakSet[PreTrainedModel] = WeakSet()


def layer_spec(spec: _core.Spec, window: int) -> _core.Spec:
    """What a layer keeps: its window alone where that fits into the budget, since it never attends to other tokens.

    Parameters
    ----------
    spec : _core.Spec
        The cache's own.
    window : int
        Sliding window of the layer in tokens, 0 for none.
    """
    if not window or window < SMALLEST_WINDOW or (spec.budget is not None and window > spec.budget):
        return spec
    return _core.Spec("local", window)


def layers_kept(spec: _core.Spec, geometry: Geometry) -> dict[int, tuple[_core.Spec, int]]:
    """What each layer that has slots keeps, and for how many key/value heads."""
    layers = geometry.layers
    return {i: (layer_spec(spec, layers[i].window), layers[i].kv_heads) for i in geometry.attention_layers}


def layer_formats(model: PreTrainedModel, geometry: Geometry, bits: Bits | None, rotary: Rotary | None) -> list[Format]:
    """How the slots of every layer hold keys and values: a function of the model and of what was asked for, alone.

    Warns once per model where `probe` finds that the bits cost more than 3 % of perplexity.
    """
    if bits is None or not bits.coded:
        return plain_formats(geometry, bits)
    if any(layer.latent for layer in geometry.layers):
        raise UnsupportedError(
            f"bits={bits.given!r}: {geometry.architecture} keeps a latent that all heads share, which is not coded; 16 "
            "is accepted"
        )
    found = probe(model, geometry, bits, rotary)
    if found.cost > COSTLY and model not in _warned:
        _warned.add(model)
        warnings.warn(
            f"bits={bits.given!r} costs {type(model).__name__} about {found.cost:.0%} perplexity on random text; "
            "more bits cost less",
            RuntimeWarning,
            stacklevel=3,
        )
    formats = []
    for index, layer in enumerate(geometry.layers):
        if index not in geometry.attention_layers:
            formats.append(Format())  # it has no slots
            continue
        own, half = found.bits(index), _half(geometry)
        keys = half if own.keys == 16 else Coding(own.keys, layer.key_dim, found.layers[index].mu)
        formats.append(Format(keys, half if own.values == 16 else Coding(own.values, layer.value_dim)))
    return formats


def with_first(held: Format, spec: _core.Spec) -> Format:
    """The same format with a strategy's pinned sinks in 16 bits beside codes: they always lie in the first slots."""
    coded = isinstance(held.keys, Coding) or isinstance(held.values, Coding)
    pinned = spec.params.get("sinks") in (None, "pinned")
    return replace(held, first=int(spec.params.get("sink_size") or 0) if coded and pinned and spec.bounded else 0)


def first_bytes(layer: Layer, held: Format) -> int:
    """Bytes that the first slots of a layer take beside their codes, in all heads."""
    widths = [how.width for how in (held.keys, held.values) if isinstance(how, Coding)]
    return layer.kv_heads * held.first * 2 * sum(widths)


def slot_bytes(layer: Layer, held: Format, spec: _core.Spec, element: int) -> int:
    """Bytes of one token in all heads of a layer; `element`: of a number in the model's dtype."""

    def side(how: torch.dtype | Coding | None, head_dim: int) -> int:
        if isinstance(how, Coding):
            return how.nbytes
        return head_dim * (element if how is None else how.itemsize)

    values = 0 if held.front else side(held.values, layer.value_dim)
    beside = POSITION_BYTES + (SCORE_BYTES if spec.scored else 0)
    return layer.kv_heads * (side(held.keys, layer.key_dim) + values + beside)


def row_bytes(geometry: Geometry, formats: Sequence[Format], spec: _core.Spec, context: int, element: int) -> int:
    """Bytes of one row: keys and values, positions, scores, queues, and sinks in 16 bits beside codes.

    Parameters
    ----------
    geometry : Geometry
        The model's, or a process' share of it.
    formats : sequence of Format
        How each of its layers holds keys and values.
    spec : _core.Spec
        What is kept.
    context : int
        Tokens of a row, where nothing bounds what is kept.
    element : int
        Bytes of a number in the model's dtype.
    """
    total = 0
    for index in geometry.attention_layers:
        layer, own = geometry.layers[index], layer_spec(spec, geometry.layers[index].window)
        total += (context if own.budget is None else own.budget) * slot_bytes(layer, formats[index], own, element)
        total += first_bytes(layer, with_first(formats[index], own))
        total += layer.kv_heads * 2 * own.interval * VICTIM_BYTES if own.bounded else 0
    return total


def plain_formats(geometry: Geometry, bits: Bits | None) -> list[Format]:
    """Formats as bits say, of a model that need not be there: layers that `layer_formats` would raise are not known."""

    def side(number: int | None, width: int) -> torch.dtype | Coding | None:
        return None if number is None else _half(geometry) if number == 16 else Coding(number, width)

    keys, values = (None, None) if bits is None else (bits.keys, bits.values)
    return [Format(side(keys, layer.key_dim), side(values, layer.value_dim), layer.latent) for layer in geometry.layers]


def _half(geometry: Geometry) -> torch.dtype:
    """What 16 bits are for a model."""
    return torch.float16 if geometry.dtype == "float16" else torch.bfloat16


def fit(strategy: Strategy, memory: int | str, geometry: Geometry, formats: Sequence[Format]) -> _core.Spec:
    """Resolve a strategy with the largest budget whose slots take no more than `memory` bytes a row.

    Raises
    ------
    ConfigError
        Even the sinks and 4 tokens take more; the message names how much.
    """
    element = getattr(torch, geometry.dtype).itemsize

    def nbytes(budget: int) -> int:
        return row_bytes(geometry, formats, strategy.spec(budget), budget, element) * geometry.processes

    sinks = int(strategy.spec().params.get("sink_size") or 0)
    return strategy.spec(slots_in(memory, nbytes, sinks + 4))
