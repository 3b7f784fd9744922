"""What transformers sees of one layer: it takes new keys and values, and hands them to whoever attends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from liquidfusion.exceptions import UnsupportedError
from liquidfusion.run.backend import running
from liquidfusion.state.group import Groups


@dataclass
class Seen:
    """Columns of a model's inputs that a cache has seen, padding included, and its batch rows; shared by its layers."""

    columns: int = 0
    batch: int = 0


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One attention layer of a KVCache.

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
        group, index = self._groups[self._index]
        slots = group.slots[index]
        return None if slots is None else slots.read()[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Values of the slots, likewise."""
        group, index = self._groups[self._index]
        slots = group.slots[index]
        return None if slots is None else slots.read()[1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: slots are made when the first tokens come."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take the new columns; the attention call that follows stores them.

        Raises
        ------
        CacheError
            The model was not called itself (a submodule was called, or the cache was uninstalled).
        """
        running().take(self._index)
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
