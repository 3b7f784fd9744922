"""What a model's keys look like, and what few bits cost it: read once per model, from one text of random tokens.

The model reads 1,024 fixed pseudo-random tokens in two rows. The first row is exact; from its keys come the centres
`mu` that keys are coded without, and the layers whose attention few bits would spoil, which get keys of 8 bits. The
second row reads the same tokens through coded keys and values; how far its predictions end up from the first row's is
what the bits cost. So all three are functions of the model alone: no row, prompt or process has others.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from liquidfusion.compute.codes import Coding
from liquidfusion.compute.softmax import How, attend, blocks, visible
from liquidfusion.geometry import Geometry, attention_configs
from liquidfusion.hf.hook import switched
from liquidfusion.precision import Bits

IMPLEMENTATION = "liquidfusion_probe"
TOKENS = 1024
"""Length of the text."""
SCORED = 64
"""Queries at its end whose attention and predictions are compared."""
SPOILT = 0.25
"""Relative error of a layer's attention from which on its keys get 8 bits."""
COSTLY = 0.03
"""Cost from which on a cache warns."""
_FIRST = 4  # the first tokens' keys are like no other's: every query looks at them

Rotate = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """What the text tells of a layer.

    `mu`: float32 `[kv_heads, head_dim]`, the mean of the keys. `error`: of attention over coded keys, relative.
    """

    mu: Tensor
    error: float


@dataclass(frozen=True, eq=False)
class Probe:
    """What the text tells.

    `layers`: of each layer that attends, by index. `cost`: expected relative growth of perplexity, exp(KL) - 1 with the
    mean divergence of predictions over coded slots from exact ones; 0.03 is 3 %.
    """

    asked: Bits
    layers: dict[int, Layer]
    cost: float

    @property
    def raised(self) -> tuple[int, ...]:
        """Layers whose keys get 8 bits, though fewer were asked for."""
        return tuple(i for i in sorted(self.layers) if self.bits(i) != self.asked)

    def bits(self, layer: int) -> Bits:
        """Bits of a layer."""
        return _bits(self.asked, self.layers[layer].error)


def probe(model: PreTrainedModel, geometry: Geometry, bits: Bits, rotary: Rotate | None = None) -> Probe:
    """Read the text, or remember what it told; a model's weights are taken to stay as they are.

    Parameters
    ----------
    model : PreTrainedModel
        A model that a KVCache can serve; nothing else may run it meanwhile, as attention is a setting of it.
    geometry : Geometry
        Of the model.
    bits : Bits
        What was asked for; with fewer than 16 for a side.
    rotary : callable or None
        `Rotary` of the model where keys are stored un-rotated, to be rotated when they attend: then the centres are
        those of un-rotated keys.

    Returns
    -------
    Probe
        The same object for the same question.
    """
    known = _known.setdefault(model, {})
    question = (bits, rotary is not None)
    if question not in known:
        known[question] = _read(model, geometry, bits, rotary)
    return known[question]


def forget(model: PreTrainedModel) -> None:
    """Read the text again when next asked, because the weights have changed."""
    _known.pop(model, None)


_known: WeakKeyDictionary[PreTrainedModel, dict[tuple[Bits, bool], Probe]] = WeakKeyDictionary()


def text(vocabulary: int, tokens: int) -> list[int]:
    """The pseudo-random tokens of a vocabulary, without its ends, where tokens with a meaning of their own stand."""
    margin, state, found = vocabulary // 32, 1, []
    for _ in range(tokens):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        found.append(margin + (state >> 33) % (vocabulary - 2 * margin))
    return found


def _bits(asked: Bits, error: float) -> Bits:
    return asked.raised() if error > SPOILT else asked


@dataclass
class _Reading:
    """The running forward."""

    bits: Bits
    rotary: Rotate | None
    processes: int
    layers: dict[int, Layer] = field(default_factory=dict)

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        """Row 0 exactly, row 1 over coded keys and values."""
        columns = key.shape[2]
        positions = torch.arange(columns, device=key.device)
        turned = self._turned(query, positions, index)
        if index not in self.layers:  # else keys of an earlier layer are read again
            mu = key[0, :, min(_FIRST, columns - 1) :].float().mean(1)
            coded = self._coded(key[:1], self.bits.keys, mu)
            last = slice(max(0, columns - SCORED), columns)
            exact, rough = (
                _attend(turned[:1, :, last], self._turned(keys, positions, index), value[:1], how)
                for keys in (key[:1], coded)
            )
            self.layers[index] = Layer(mu, self._relative(exact, rough))
        layer = self.layers[index]
        bits = _bits(self.bits, layer.error)
        keys = torch.cat((key[:1], self._coded(key[1:], bits.keys, layer.mu)))
        values = torch.cat((value[:1], self._coded(value[1:], bits.values, None)))
        return _attend(turned, self._turned(keys, positions, index), values, how)

    def _turned(self, states: Tensor, positions: Tensor, index: int) -> Tensor:
        return states if self.rotary is None else self.rotary(states, positions, index)

    @staticmethod
    def _coded(states: Tensor, bits: int, mu: Tensor | None) -> Tensor:
        if bits == 16:
            return states if states.dtype == torch.float16 else states.bfloat16().to(states.dtype)
        coding = Coding(bits, states.shape[-1], mu)
        coded = coding.decode(coding.encode(states), states.dtype)
        coded[:, :, :_FIRST] = states[:, :, :_FIRST]  # sinks are held in 16 bits beside their codes
        return coded

    def _relative(self, exact: Tensor, rough: Tensor) -> float:
        """Relative error over the heads of all processes, which must come to the same bits."""
        sums = torch.stack([(rough.float() - exact.float()).square().sum(), exact.float().square().sum()])
        if self.processes > 1:
            torch.distributed.all_reduce(sums)
        wrong, whole = sums.tolist()
        return float((wrong / whole) ** 0.5) if whole else 0.0


def _attend(query: Tensor, keys: Tensor, values: Tensor, how: How) -> Tensor:
    """Causal attention of the last queries to all columns."""
    (batch, heads, queries, _), columns = query.shape, keys.shape[2]
    output = query.new_empty((batch, heads, queries, values.shape[3]))
    at = torch.arange(columns, device=query.device)
    first = columns - queries
    for block in blocks(batch * heads, queries, columns, query.device):
        end = first + block.stop  # no query of this block sees a later column
        mask = visible(at[None, first + block.start : end], at[None, None, :end], how.window)
        output[:, :, block] = attend(query[:, :, block], keys[:, :, :end], values[:, :, :end], mask, how, None)
    return output


_running: ContextVar[_Reading] = ContextVar("liquidfusion_probe")


def _function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - causal, and the window where there is one
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - the model is in evaluation mode
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend (transformers' attention interface), as `liquidfusion.hf.function` has it."""
    how = How(
        query.shape[-1] ** -0.5 if scaling is None else float(scaling), sliding_window or 0, softcap or 0.0, s_aux
    )
    index: Any = module.layer_idx
    output = _running.get().attend(index, query.to(value.dtype), key.to(value.dtype), value, how)
    return output.transpose(1, 2), None


def _read(model: PreTrainedModel, geometry: Geometry, bits: Bits, rotary: Rotate | None) -> Probe:
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _function)
    reading = _Reading(bits, rotary, int(getattr(model, "_tp_size", None) or 1))
    device = next(model.get_input_embeddings().parameters()).device
    token = _running.set(reading)
    try:
        with (
            torch.inference_mode(False),  # what is remembered outlives the block that asks
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            switched(attention_configs(model), IMPLEMENTATION),
            _evaluating(model),
        ):
            tokens = min(TOKENS, geometry.positions or TOKENS)
            ids = torch.tensor([text(geometry.vocabulary, tokens)] * 2, device=device)
            inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
            if rotary is not None:
                inputs["position_ids"] = torch.zeros_like(ids)
            if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
                inputs["logits_to_keep"] = SCORED
            exact, rough = model(**inputs).logits[:, -SCORED:].float().log_softmax(-1)
            divergence = float((exact.exp() * (exact - rough)).sum(-1).mean())
    finally:
        _running.reset(token)
    return Probe(bits, reading.layers, math.expm1(divergence))


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
