"""Rotary positions that the cache gives out: queries and keys come un-rotated and are rotated where they attend.

A model that is told position 0 for every token multiplies by cos 0 = 1 and sin 0 = 0: its queries and keys stay as they
are (but for YaRN's factor on both, which belongs to them). Stored like that, a key can be rotated to any position
afterwards, by one rotation in float32 from what was never rounded by another. Source: StreamingLLM,
https://arxiv.org/abs/2309.17453.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from liquidfusion.exceptions import UnsupportedError
from liquidfusion.geometry import Geometry, Kind, attention_configs

_followed: WeakSet[PreTrainedModel] = WeakSet()

ALONE = "liquidfusion_alone"
"""The attention function of `_watched`."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary frequencies that do not depend on how long the text is."""


class Rotary:
    """The rotations of a model's layers.

    Parameters
    ----------
    model : PreTrainedModel
        A model with rotary positions.
    geometry : Geometry
        Of the model.

    Raises
    ------
    UnsupportedError
        The model has other positions, frequencies that depend on the length, or another order of the rotated halves.
    """

    def __init__(self, model: PreTrainedModel, geometry: Geometry) -> None:
        name = type(model).__name__
        module = next((m for path, m in model.named_modules() if path.endswith("rotary_emb")), None)
        if module is None:
            raise UnsupportedError(f"positions relative to the cache need rotary positions; {name} has none")
        kinds = [layer.rope for layer in geometry.layers]
        rope_type = getattr(module, "rope_type", None)
        if rope_type is None:
            raise UnsupportedError(f"{name} rotates by code of its own, so positions relative to the cache cannot be")
        rope_types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
        other = sorted(set(map(str, rope_types)) - set(ROPE_TYPES))
        if other:
            raise UnsupportedError(f"{name} has rotary positions of type {other[0]!r}; {list(ROPE_TYPES)} are accepted")
        first = next(iter(geometry.attention_layers))
        names = ["inv_freq" if kind is None else f"{kind}_inv_freq" for kind in kinds]
        attending = [i for i, layer in enumerate(geometry.layers) if layer.kind != Kind.NONE]
        if not all(isinstance(getattr(module, names[i], None), Tensor) for i in attending):
            raise UnsupportedError(f"{name} rotates by code of its own, so positions relative to the cache cannot be")
        self._frequencies = {i: getattr(module, names[i]).float() for i in attending}
        self._check(model, module, first, kinds[first])
        if model not in _followed:
            self._check_layers(model, geometry)
            _followed.add(model)

    def __call__(self, states: Tensor, positions: Tensor, layer: int) -> Tensor:
        """Rotate to positions.

        Parameters
        ----------
        states : Tensor
            `[..., head_dim]`, un-rotated.
        positions : Tensor
            Integers that broadcast to `states` without its last dimension.
        layer : int
            Whose frequencies.

        Returns
        -------
        Tensor
            Like `states`; computed in float32.
        """
        frequencies = self._frequencies[layer]
        if frequencies.device != states.device:
            frequencies = self._frequencies[layer] = frequencies.to(states.device)
        angles = positions[..., None].float() * frequencies
        cos, sin, half = angles.cos(), angles.sin(), frequencies.shape[0]
        first, second = states[..., :half].float(), states[..., half : 2 * half].float()
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(states.dtype)
        return rotated if 2 * half == states.shape[-1] else torch.cat((rotated, states[..., 2 * half :]), -1)

    def _check_layers(self, model: PreTrainedModel, geometry: Geometry) -> None:
        """Compare what each layer makes at some positions with what it makes at 0, rotated there.

        Not every layer need rotate, nor all of a key, and queries may change with their position in other ways too. A
        token alone attends to itself: nothing else depends on where.
        """
        name = type(model).__name__
        positions = torch.tensor([[0], [1], [7], [max(7, geometry.positions - 1)]], device=model.device)
        theirs = DynamicCache(config=model.config)
        parameters = inspect.signature(model.forward).parameters
        keyword = "cache" if "cache" in parameters else "past_key_values"
        if "position_ids" not in parameters:
            raise UnsupportedError(f"{name} takes no position_ids, so positions relative to the cache cannot be")
        with torch.no_grad(), _watched(model) as queries:
            model(input_ids=torch.full_like(positions, 2), position_ids=positions, **{keyword: theirs})
        made = {"keys": {i: getattr(theirs.layers[i], "keys", None) for i in geometry.attention_layers}}
        for what, by_layer in (made | {"queries": queries}).items():
            for layer, states in by_layer.items():
                if states is None:
                    continue
                at = positions[:, :, None].to(states.device)
                expected = self(states[:1].expand(len(positions), -1, -1, -1), at, layer).float()
                if not torch.allclose(expected, states.float(), atol=2e-2 * float(states.float().abs().max())):
                    raise UnsupportedError(
                        f"{name} does not rotate the {what} of layer {layer} as its frequencies say, so positions "
                        "relative to the cache cannot be"
                    )

    def _check(self, model: PreTrainedModel, module: torch.nn.Module, first: int, kind: str | None) -> None:
        """Compare one rotation with what the model's own code makes of it."""
        name = type(model).__name__
        apply: Any = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
        if apply is None:
            raise UnsupportedError(f"{name} rotates by code of its own, so positions relative to the cache cannot be")
        frequencies = self._frequencies[first]
        width = 2 * frequencies.shape[0]
        probe = torch.linspace(-1, 1, 3 * width, dtype=torch.float32, device=frequencies.device).view(1, 1, 3, width)
        positions = torch.tensor([[0, 1, 7]], device=frequencies.device)
        try:
            cos, sin = module(probe[:, 0], positions, *([kind] if kind else []))
            scale = float(cos[0, 0, 0])  # YaRN's factor, which the stored keys carry already
            theirs = apply(probe, probe, cos, sin)[0]
        except (IndexError, TypeError, ValueError, RuntimeError) as error:  # IndexError: an axis of positions more
            raise UnsupportedError(f"{name} rotates in a way that cannot be followed: {error}") from error
        if not torch.allclose(scale * self(probe, positions[:, None], first), theirs, atol=1e-4):
            raise UnsupportedError(f"{name} orders the rotated halves otherwise than Llama does, which is accepted")


@contextmanager
def _watched(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Let every token attend to itself alone; the queries of each layer, `[rows, heads, columns, head_dim]`."""
    queries: dict[int, Tensor] = {}

    def attend(module: Any, query: Tensor, _: Tensor, value: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
        queries[module.layer_idx] = query
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(ALONE, attend)
    configs = attention_configs(model)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = ALONE
        yield queries
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def ranks(positions: Tensor) -> Tensor:
    """Place of each token among those that are there.

    Parameters
    ----------
    positions : Tensor
        `[..., columns]`, -1 for none.

    Returns
    -------
    Tensor
        Like `positions`: 0 for the lowest, and for none.
    """
    return (positions.argsort(-1).argsort(-1) - (positions < 0).sum(-1, keepdim=True)).clamp(min=0)


def query_ranks(queries: Tensor, positions: Tensor) -> Tensor:
    """Place that a query's own token has among those that are there.

    Parameters
    ----------
    queries : Tensor
        Positions `[batch, queries]`, -1 for padding.
    positions : Tensor
        `[batch, kv_heads, columns]`, -1 for none.

    Returns
    -------
    Tensor
        `[batch, kv_heads, queries]`.
    """
    sorted_positions = positions.long().sort(-1).values
    wanted = queries.long()[:, None].expand(-1, positions.shape[1], -1).contiguous()
    upto = torch.searchsorted(sorted_positions, wanted, right=True)
    return (upto - (positions < 0).sum(-1, keepdim=True) - 1).clamp(min=0)
