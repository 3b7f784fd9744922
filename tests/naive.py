"""A naive bounded cache for a whole model: one sequence, float64 attention over the twins' visible tokens, no slots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reference import Rules, Twin, attention

_running: ContextVar[NaiveCache | None] = ContextVar("naive_cache", default=None)


class NaiveCache:
    """Keys and values by position for one unpadded sequence.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder; it is run without any cache of transformers, on new tokens only.
    rules : Rules
        Strategy of every (layer, kv head).
    """

    def __init__(self, model: PreTrainedModel, rules: Rules) -> None:
        self.model = model
        self.seen = 0
        heads = model.config.num_key_value_heads
        layers = range(model.config.num_hidden_layers)
        self.twins = [[Twin(rules, layer, head) for head in range(heads)] for layer in layers]
        self.stored: list[list[dict[int, tuple[Tensor, Tensor]]]] = [[{} for _ in layer] for layer in self.twins]

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

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
        """Output `[heads, queries, head_dim]` of one layer for new columns `[heads or kv_heads, queries, head_dim]`."""
        group = query.shape[0] // key.shape[0]
        return torch.cat(
            [
                self._head(layer, head, query[head * group : (head + 1) * group], key[head], value[head], scale, window)
                for head in range(key.shape[0])
            ]
        )

    def _head(
        self, layer: int, head: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int
    ) -> Tensor:
        twin, stored = self.twins[layer][head], self.stored[layer][head]
        twin.keys = lambda positions: [stored[position][0].double().tolist() for position in positions]
        stored.update({twin.seen + i: (key[i], value[i]) for i in range(len(key))})
        output: list[Tensor] = []

        def look(visible: list[int], queries: list[int]) -> list[list[list[float]]]:
            values = torch.stack([stored[position][1] for position in visible])
            distance = torch.tensor(queries)[:, None] - torch.tensor(visible)[None]
            mask = (distance >= 0) & (distance < (window or math.inf))
            keys = torch.stack([stored[position][0] for position in visible])
            out, probabilities = attention(query, keys, values, mask, scale)
            output.append(out)
            if twin.rules.weighted:
                length = keys.double().norm(dim=-1)
                probabilities = probabilities * torch.where(length > 0, values.double().norm(dim=-1) / length, 0.0)
            return probabilities.tolist()

        twin.call(len(key), look)
        self.stored[layer][head] = {position: stored[position] for position in twin.kept}
        return output[0]


def _function(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    running = _running.get()
    assert running is not None
    scale, window = options["scaling"], options.get("sliding_window") or 0
    output = running.attend(module.layer_idx, query[0], key[0], value[0], scale, window)  # type: ignore[arg-type]
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
