"""A naive bounded cache for a whole model: one sequence, float64 attention over the twins' visible tokens, no slots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reference import Rules, Twin, attention

_running: ContextVar[NaiveCache | None] = ContextVar("naive_cache", default=None)


class Stored(NamedTuple):
    """A token of one kv head: key and value as queries meet them, and as the strategy judges them."""

    key: Tensor
    value: Tensor
    judged_key: Tensor
    judged_value: Tensor


class Memory(Protocol):
    """What storing does to a token's key and value `[head_dim]`."""

    def expected(self, layer: int, head: int, key: Tensor) -> Tensor:
        """Return the key as it will be judged once it is stored."""
        ...

    def stored(self, layer: int, head: int, position: int, key: Tensor, value: Tensor) -> Stored:
        """Return what came of both."""
        ...


class Exact:
    """Memory that changes nothing."""

    def expected(self, _layer: int, _head: int, key: Tensor) -> Tensor:
        return key

    def stored(self, _layer: int, _head: int, _position: int, key: Tensor, value: Tensor) -> Stored:
        return Stored(key, value, key, value)


class NaiveCache:
    """Keys and values by position for one unpadded sequence.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder; it is run without any cache of transformers, on new tokens only.
    rules : Rules
        Strategy of every (layer, kv head).
    memory : Memory or None
        What storing does; None: nothing.
    """

    def __init__(self, model: PreTrainedModel, rules: Rules, memory: Memory | None = None) -> None:
        self.model = model
        self.memory = Exact() if memory is None else memory
        self.seen = 0
        heads = model.config.num_key_value_heads
        layers = range(model.config.num_hidden_layers)
        self.twins = [[Twin(rules, layer, head) for head in range(heads)] for layer in layers]
        self.stored: list[list[dict[int, Stored]]] = [[{} for _ in layer] for layer in self.twins]

    @property
    def margin(self) -> float:
        """Smallest relative margin of any choice so far."""
        return min(min(twin.margin, twin.distinct_margin) for layer in self.twins for twin in layer)

    def call(self, tokens: Sequence[int]) -> Tensor:
        """Feed tokens in one call; logits of the last, `[vocabulary]`."""
        positions = torch.arange(self.seen, self.seen + len(tokens))[None]
        token = _running.set(self)
        try:
            with _switched(self.model), torch.no_grad():
                output = self.model(torch.tensor([list(tokens)]), position_ids=positions, use_cache=False)
        finally:
            _running.reset(token)
        self.seen += len(tokens)
        return output.logits[0, -1]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, **more: Any
    ) -> Tensor:
        """Output `[heads, queries, head_dim]` of one layer for new columns `[heads or kv_heads, queries, head_dim]`."""
        group = query.shape[0] // key.shape[0]
        sinks = more.get("sinks")
        output = []
        for head in range(key.shape[0]):
            own = slice(head * group, (head + 1) * group)
            options = {**more, "sinks": None if sinks is None else sinks[own]}
            output.append(self._head(layer, head, query[own], key[head], value[head], scale, window, options))
        return torch.cat(output)

    def _head(
        self,
        layer: int,
        head: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int,
        options: dict[str, Any],
    ) -> Tensor:
        twin, stored, memory = self.twins[layer][head], self.stored[layer][head], self.memory
        new = range(twin.seen, twin.seen + len(key))
        for i, position in enumerate(new):
            if len(key) == 1:  # it is stored before anyone looks
                stored[position] = memory.stored(layer, head, position, key[0], value[0])
            else:
                judged = memory.expected(layer, head, key[i])
                stored[position] = Stored(key[i], value[i], judged, value[i])
        twin.keys = lambda positions: [stored[position].judged_key.double().tolist() for position in positions]
        output: list[Tensor] = []

        def look(visible: list[int], queries: list[int]) -> list[list[list[float]]]:
            held = [stored[position] for position in visible]
            distance = torch.tensor(queries)[:, None] - torch.tensor(visible)[None]
            mask = (distance >= 0) & (distance < (window or math.inf))
            keys, values = (torch.stack([one[which] for one in held]) for which in (0, 1))
            out, probabilities = attention(query, keys, values, mask, scale, **options)
            output.append(out)
            if twin.rules.weighted:
                if len(queries) == 1:
                    keys, values = (torch.stack([one[which] for one in held]) for which in (2, 3))
                length = keys.double().norm(dim=-1)
                probabilities = probabilities * torch.where(length > 0, values.double().norm(dim=-1) / length, 0.0)
            return probabilities.tolist()

        twin.call(len(key), look)
        self.stored[layer][head] = kept = {position: stored[position] for position in twin.kept}
        for i, position in enumerate(new):
            if len(key) > 1 and position in kept:
                kept[position] = memory.stored(layer, head, position, key[i], value[i])
        return output[0]


def _function(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    running = _running.get()
    assert running is not None
    scale, window = options["scaling"], options.get("sliding_window") or 0
    more = {"softcap": options.get("softcap") or 0.0, "sinks": options.get("s_aux")}
    output = running.attend(module.layer_idx, query[0], key[0], value[0], scale, window, **more)  # type: ignore[arg-type]
    return output.to(query.dtype).transpose(0, 1)[None], None


@contextmanager
def _switched(model: PreTrainedModel) -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS.register("naive_twin", _function)
    before = model.config._attn_implementation
    model.config._attn_implementation = "naive_twin"
    try:
        yield
    finally:
        model.config._attn_implementation = before
