"""What one call of the model brings: validated and worked out once, read by every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from liquidfusion.exceptions import CacheError, UnsupportedError
from liquidfusion.run.sampling import upload


@dataclass(frozen=True)
class Past:
    """What a cache has seen before a call.

    `columns`: columns of its inputs, padding included. `seen`: real tokens of each row; empty before the first call.
    `offsets`: position that the model gives each row's first token. `right`: whether a row's last prompt was padded on
    the right.
    """

    columns: int
    seen: Sequence[int]
    offsets: Sequence[int] = ()
    right: Sequence[bool] = ()


@dataclass(frozen=True)
class On:
    """A step's tensors on one device.

    `query_positions`: int32 `[batch, columns]`, -1 for padding. `new_positions`: the same, -1 also for a row's only
    token, which is in its slot already. `ages`: int32 `[batch, columns]`, real tokens that follow in the call, -1 for
    padding. `first`: int32 `[batch]`, position of each row's first new token.
    """

    query_positions: Tensor
    new_positions: Tensor
    ages: Tensor
    first: Tensor


@dataclass(frozen=True)
class Step:
    """One call of the model.

    `columns`: of its inputs. `lengths`: real new tokens of each row. `seen`: real tokens of each row before the call.
    `ranks`: int32 `[batch, columns]` on the CPU, the token's index among its row's new ones, -1 for padding.
    `padded`: whether some column is padding. `offsets`: position that the model gives each row's first
    token.
    """

    columns: int
    lengths: tuple[int, ...]
    seen: tuple[int, ...]
    ranks: Tensor
    padded: bool
    offsets: tuple[int, ...] = ()
    _on: dict[torch.device, On] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, inputs: Mapping[str, Any], past: Past) -> Step:
        """Read a call's arguments and check that it continues what the cache has seen.

        Raises
        ------
        CacheError
            It does not.
        UnsupportedError
            It asks for what a bounded cache cannot give.
        """
        if inputs.get("output_attentions"):
            raise UnsupportedError("output_attentions=True: attention weights of evicted tokens do not exist")
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise CacheError("the call has neither input_ids nor inputs_embeds")
        batch, columns = tokens.shape[:2]
        if not columns:
            raise CacheError(
                f"the call brings no new column after the {past.columns} that the cache has seen; "
                "for a new prompt call reset()"
            )
        if past.columns and batch != len(past.seen):
            raise CacheError(
                f"the call has {batch} rows, the cache holds {len(past.seen)}; call reset() for a new prompt"
            )
        seen = tuple(past.seen) if past.columns else (0,) * batch
        real = _real_columns(inputs.get("attention_mask"), batch, columns, Past(past.columns, seen))
        if real is None:
            lengths, ranks = (columns,) * batch, torch.arange(columns, dtype=torch.int32, device="cpu").repeat(batch, 1)
        else:
            lengths, ranks = tuple(real.sum(1).tolist()), (real.cumsum(1) - 1).masked_fill(~real, -1).int()
        step = cls(columns, lengths, seen, ranks.contiguous(), real is not None)
        return replace(step, offsets=_offsets(inputs.get("position_ids"), step, past))

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.lengths)

    @property
    def right(self) -> tuple[bool, ...]:
        """Whether each row is padded on the right."""
        return tuple((self.ranks[:, -1] < 0).logical_and(self.ranks.amax(1) >= 0).tolist())

    @property
    def decodes(self) -> bool:
        """Whether every row brings one token in one column."""
        return self.columns == 1 and min(self.lengths) == 1

    @cached_property
    def single(self) -> list[int]:
        """Rows with one real token: it overwrites the first slot of the row's queue before anyone attends."""
        return [row for row, length in enumerate(self.lengths) if length == 1]

    @cached_property
    def single_columns(self) -> Tensor:
        """Column of each such row's token, int64 `[rows]` on the CPU."""
        return self.ranks[self.single].argmax(1)

    def on(self, device: torch.device) -> On:
        """The step's tensors on a device; copied once a call, without waiting for what runs there."""
        if device not in self._on:
            self._on[device] = On(*(upload(tensor, tensor.dtype, device) for tensor in self._tensors))
        return self._on[device]

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first = torch.tensor(self.seen, dtype=torch.int32, device="cpu")
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device="cpu")[:, None]
        padding = self.ranks < 0
        positions = (self.ranks + first[:, None]).masked_fill(padding, -1)
        new = positions.clone()
        new[self.single] = -1
        return positions, new, (lengths - 1 - self.ranks).masked_fill(padding, -1), first


def _real_columns(mask: Any, batch: int, columns: int, past: Past) -> Tensor | None:
    """Which new columns hold real tokens, bool `[batch, columns]` on the CPU; None when all do."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        what = f"{mask.dim()}-dimensional" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(f"attention_mask is {what}; [batch, columns] is accepted")
    if tuple(mask.shape) != (batch, past.columns + columns):
        raise CacheError(
            f"attention_mask is {list(mask.shape)}, but the cache has seen {past.columns} columns and the call "
            f"brings {columns}: [{batch}, {past.columns + columns}] is accepted; for a new prompt call reset()"
        )
    mask = mask.ne(0).cpu()
    # Rows whose past disagrees belong to another prompt, or hide tokens that the cache holds.
    if past.columns and mask[:, : past.columns].sum(1).tolist() != list(past.seen):
        raise CacheError(
            f"attention_mask counts {mask[:, : past.columns].sum(1).tolist()} earlier tokens, the cache has seen "
            f"{list(past.seen)}; for a new prompt call reset()"
        )
    real = mask[:, past.columns :]
    return None if bool(real.all()) else real


def _offsets(position_ids: Any, step: Step, past: Past) -> tuple[int, ...]:
    """Position that the model gives each row's first token; a row's tokens follow one another from there.

    Raises
    ------
    CacheError
        They do not.
    """
    offsets = torch.tensor(past.offsets or [0] * step.batch, device="cpu")
    told = isinstance(position_ids, Tensor) and position_ids.dim() == 2
    if not told or (position_ids.device.type != "cpu" and step.columns == 1 and past.columns):
        return tuple(offsets.tolist())  # reading it back would stall the device at every step
    given, real = position_ids.cpu().expand(step.batch, -1), step.ranks >= 0
    seen = torch.tensor(step.seen, device="cpu")
    own = step.ranks.long() + seen[:, None]
    by_column = (torch.arange(step.columns, device="cpu") + past.columns).expand(step.batch, -1)
    for row in range(step.batch):
        # Some models count from 1, and an empty row begins where transformers likes.
        if not step.seen[row] and step.lengths[row] and not bool((given == by_column)[row][real[row]].all()):
            offsets[row] = max(0, int((given - own)[row][real[row]].min()))
    own += offsets[:, None]
    wrong = (given != own) & (given != by_column) & real
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        hint = "for a new prompt call reset()"
        if past.right and past.right[row]:
            hint = "its prompt was padded on the right: pad on the left (tokenizer.padding_side = 'left')"
        raise CacheError(
            f"position_ids[{row}, {column}] is {int(given[row, column])}, but the cache continues at "
            f"{int(own[row, column])}; {hint}"
        )
    return tuple(offsets.tolist())
