"""What transformers sees of one layer: it takes new keys and values, and hands them to whoever attends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from liquidfusion.exceptions import CacheError, UnsupportedError
from liquidfusion.geometry import Geometry, Kind
from liquidfusion.run.backend import running
from liquidfusion.run.step import Step
from liquidfusion.state.group import Groups


@dataclass
class Seen:
    """What a cache has seen, shared by its layers.

    `columns`: of the model's inputs, padding included. `batch`: rows. `offsets`: position of each row's first token.
    `right`: whether a row's last prompt was padded on the right. `every_call`: whether the model's masks must be looked
    at in every call. `windows`: those that masks have asked for in the latest call that looked at any, as in `Backend`.
    """

    columns: int = 0
    batch: int = 0
    offsets: tuple[int, ...] = ()
    right: tuple[bool, ...] = ()
    every_call: bool = False
    windows: frozenset[tuple[int, bool]] = frozenset()

    def add(self, step: Step) -> None:
        """Count a call that has run."""
        self.columns += step.columns
        self.batch, self.offsets = step.batch, step.offsets
        if step.columns > 1:
            self.right = step.right

    def reorder(self, rows: Sequence[int]) -> None:
        """Replace row `i` by row `rows[i]`."""
        self.offsets = tuple(self.offsets[row] for row in rows) if self.offsets else ()
        self.right = tuple(self.right[row] for row in rows) if self.right else ()

    def reset(self) -> None:
        """Forget everything."""
        self.columns, self.offsets, self.right = 0, (), ()

    def described(self) -> dict[str, Any]:
        """What a session tells of it, in JSON's types."""
        offsets = {"offsets": list(self.offsets)} if any(self.offsets) else {}
        return {"columns": self.columns, **offsets, **({"every_call": True} if self.every_call else {})}

    def restore(self, description: Mapping[str, Any], batch: int) -> None:
        """Take over what a session tells."""
        self.columns, self.batch, self.offsets = description["columns"], batch, tuple(description.get("offsets", ()))
        self.every_call = bool(description.get("every_call"))


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a KVCache; one that has no slots of its own knows what was seen, and no more.

    Parameters
    ----------
    index : int
        Index of the decoder layer.
    groups : Groups
        Where its slots are.
    seen : Seen
        What the cache has seen.
    """

    is_compileable = False  # True would make `generate` compile on its own
    is_croppable = False  # evicted tokens cannot return
    is_sliding = False  # a window is honoured through positions

    def __init__(self, index: int, groups: Groups, seen: Seen) -> None:
        self._index, self._groups, self._seen = index, groups, seen

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether tokens are stored."""
        return self._seen.columns > 0

    @property
    def batch_size(self) -> int:
        """Batch rows; there is no such attribute before the first call, which transformers takes for -1."""
        if not self._seen.columns:
            raise AttributeError("batch_size")
        return self._seen.batch

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Keys of the slots, `[batch, kv_heads, slots, head_dim]`; None before the first call."""
        return self._read()[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Values of the slots, likewise."""
        return self._read()[1]

    def _read(self) -> tuple[Tensor | None, Tensor | None]:
        if self._index not in self._groups.places:
            return None, None
        group, index = self._groups[self._index]
        slots = group.slots[index]
        return (None, None) if slots is None else slots.read()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: slots are made when the first tokens come."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take the new columns; the attention call that follows stores them.

        Raises
        ------
        CacheError
            The model was not called itself (a submodule was called, or the cache was uninstalled).
        """
        running().hand(self._index, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included: transformers slices its inputs with it."""
        return self._seen.columns

    def get_max_length(self) -> int:
        """-1: any number of tokens may be fed."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of a dense mask that nobody builds: visibility comes from positions."""
        return self._seen.columns + query_length, 0

    def activate_past_recording(self) -> NoReturn:
        """Refuse assisted decoding, which rolls the cache back, before any work."""
        raise UnsupportedError(
            "assisted decoding rolls the cache back, and evicted tokens cannot return: use another cache"
        )

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse: evicted tokens cannot return."""
        raise UnsupportedError(
            f"crop({tokens_to_remove}) needs tokens that may be evicted; build a new KVCache instead"
        )

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Refuse: buffers never change shape."""
        raise UnsupportedError(f"batch_repeat_interleave({repeats}): a KVCache keeps its batch size")

    def batch_select_indices(self, indices: Any) -> NoReturn:
        """Refuse: buffers never change shape."""
        shown = indices.tolist() if isinstance(indices, Tensor) else indices
        raise UnsupportedError(f"batch_select_indices({shown}): a KVCache keeps its batch size")


class StateSlotLayer(LinearAttentionLayer, SlotLayer):  # type: ignore[no-untyped-call]
    """One layer that attends and keeps a recurrent or convolution state as well: the state is transformers' own.

    Parameters
    ----------
    states : int
        States of each kind that it keeps.
    index, groups, seen
        As for `SlotLayer`.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, states: int, index: int, groups: Groups, seen: Seen) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=states)
        SlotLayer.__init__(self, index, groups, seen)

    def activate_past_recording(self) -> NoReturn:
        """Refuse assisted decoding, as layers without a state do."""
        SlotLayer.activate_past_recording(self)

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse, likewise."""
        SlotLayer.crop(self, tokens_to_remove)

    def get_max_length(self) -> int:
        """-1: any number of tokens may be fed."""
        return -1


class StateLayer(LinearAttentionLayer):
    """One layer that keeps a state and does not attend: transformers' own, which cannot be rolled back here either."""

    is_compileable = False
    is_croppable = False

    def activate_past_recording(self) -> NoReturn:
        """Refuse assisted decoding: the layers that attend cannot be rolled back."""
        raise UnsupportedError(
            "assisted decoding rolls the cache back, and evicted tokens cannot return: use another cache"
        )


def cache_layers(model: PreTrainedModel, geometry: Geometry, groups: Groups, seen: Seen) -> list[Any]:
    """What a cache of the model keeps for each layer: slots, a state of transformers' own, or both.

    Raises
    ------
    UnsupportedError
        A layer keeps a state in a way of its own.
    """
    theirs: list[Any] = (
        DynamicCache(config=model.config).layers if any(layer.state for layer in geometry.layers) else []
    )
    layers: list[Any] = []
    for index, layer in enumerate(geometry.layers):
        if not layer.state:
            layers.append(SlotLayer(index, groups, seen))
            continue
        kind = type(theirs[index]).update_conv_state
        if kind is not LinearAttentionLayer.update_conv_state:
            raise UnsupportedError(
                f"{geometry.architecture} keeps the state of layer {index} in a {type(theirs[index]).__name__} of its "
                "own, which a KVCache does not know; call the model with transformers' own cache (DynamicCache) instead"
            )
        states = theirs[index].number_of_states
        attends = layer.kind != Kind.NONE
        layers.append(StateSlotLayer(states, index, groups, seen) if attends else StateLayer(number_of_states=states))
    return layers


class States:
    """The recurrent and convolution states of a cache's layers.

    Parameters
    ----------
    layers : iterable
        All layers of the cache.
    """

    def __init__(self, layers: Iterable[Any]) -> None:
        self._layers = {i: x for i, x in enumerate(layers) if isinstance(x, LinearAttentionCacheLayerMixin)}

    def tensors(self) -> dict[str, Tensor]:
        """Those that exist, by name: `conv.<layer>.<number>` and `recurrent.<layer>.<number>`, batch rows first."""
        return {
            f"{kind}.{index}.{number}": state
            for index, layer in self._layers.items()
            for kind, states in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states))
            for number, state in states.items()
            if state is not None
        }

    def all(self) -> list[Tensor]:
        """Those that exist."""
        return list(self.tensors().values())

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(state.nbytes for state in self.tensors().values())

    def reset(self) -> None:
        """Make every layer as new; memory is kept, where graphs may point."""
        for layer in self._layers.values():
            LinearAttentionLayer.reset(layer)

    def expect(self, step: Step, columns: int, geometry: Geometry) -> None:
        """Get ready for a call after `columns` others; before a prompt, forget memory made for other batch rows.

        Raises
        ------
        UnsupportedError
            The model's own code would begin its states anew.
        """
        if columns and step.columns > 1 and not geometry.carries:
            raise UnsupportedError(
                f"{geometry.architecture} begins its recurrent states anew in a call of {step.columns} columns: give a "
                "prompt in one call, and later tokens one by one"
            )
        if not columns and any(state.shape[0] != step.batch for state in self.tensors().values()):
            for layer in self._layers.values():
                LinearAttentionLayer.__init__(layer, number_of_states=layer.number_of_states)

    def reorder(self, rows: Tensor) -> None:
        """Replace batch row `i` by row `rows[i]`, in place."""
        for state in self.tensors().values():
            state.copy_(state.index_select(0, rows.to(state.device)))

    def restore(self, tensors: dict[str, Tensor], devices: list[torch.device], rows: int) -> None:
        """Take over the states of another cache, and remove them from `tensors`.

        Raises
        ------
        CacheError
            One is for another number of batch rows or of another kind of layer.
        """
        for name in [name for name in tensors if name.startswith(("conv.", "recurrent."))]:
            kind, layer, number = name.split(".")
            state = tensors.pop(name)
            own = self._layers.get(int(layer))
            if own is None or int(number) >= own.number_of_states or not state.dim() or state.shape[0] != rows:
                raise CacheError(f"{name} {list(state.shape)} is no state of this model with {rows} rows")
            update = own.update_conv_state if kind == "conv" else own.update_recurrent_state
            with torch.inference_mode(False):
                update(state.to(devices[int(layer)]), int(number))
