"""What attention adds to the ledger: looks at tokens, summed into mass and their strongest kept as peak.

A look is the probability that a query gives a token, averaged over the query heads that share the kv head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from liquidfusion import _core


@dataclass(frozen=True)
class Rule:
    """Which looks count, and how much.

    `mass_decay`, `peak_decay`: factor per query token by which scores fade. `look_gap`: a look counts from that many
    tokens away on. `peak_reach`: within a chunk, a look counts for the peak up to that many tokens away; None: from
    anywhere. `value_weighted`: whether looks are weighted by the length of the token's value over its key's.
    """

    mass_decay: float
    peak_decay: float
    look_gap: int
    peak_reach: int | None
    value_weighted: bool

    @classmethod
    def of(cls, spec: _core.Spec) -> Rule:
        """Of a resolved strategy."""
        return cls(spec.mass_decay, spec.peak_decay, spec.look_gap, spec.peak_reach, spec.value_weighted)


@dataclass(frozen=True)
class Block:
    """What a block of probabilities `[batch, kv_heads, group, queries, columns]` is about.

    `query_positions`: `[batch, queries]`, -1 for padding. `key_positions`: `[batch, kv_heads or 1, columns]`, -1 for an
    empty slot or padding. `ages`: int32 `[batch, queries]`, real tokens that follow the query in its call, -1 for
    padding. `elapsed`: real tokens per row by which what is there fades first. `first_new`: position per row from which
    on keys are the call's own. `longest`: most real tokens that a row has in the call. `weights`: float32
    `[batch, kv_heads, columns]` or None, a factor on looks. `stored`: columns of stored tokens, which come first.
    `rank`: the first query's number among the call's columns; None with padding, where a column says little about the
    distance from it.
    """

    query_positions: Tensor
    key_positions: Tensor
    ages: Tensor
    elapsed: Sequence[int]
    first_new: Sequence[int]
    longest: int
    weights: Tensor | None
    stored: int
    rank: int | None

    def part(self, columns: slice) -> Block:
        """Some of its columns."""
        weights = None if self.weights is None else self.weights[..., columns].contiguous()
        return replace(self, key_positions=self.key_positions[..., columns], weights=weights)

    def distance(self, columns: slice) -> Tensor:
        """Tokens from a key to a query, `[batch, kv_heads or 1, queries, columns]`."""
        return self.query_positions[:, None, :, None] - self.key_positions[:, :, None, columns]

    def nearer(self, tokens: int) -> int:
        """The first column of which a query may be fewer than so many tokens away."""
        if self.rank is None or self.rank + 1 < tokens:
            return 0
        return self.stored + self.rank + 1 - tokens


def observe(
    probabilities: Tensor, block: Block, rule: Rule, mass: Tensor, peak: Tensor, threads: int | None = None
) -> None:
    """Add a block of probabilities to mass and peak.

    Parameters
    ----------
    probabilities : Tensor
        float32 `[batch, kv_heads, group, queries, columns]`, contiguous; changed.
    block : Block
        Whose they are.
    rule : Rule
        Which of them count.
    mass, peak : Tensor
        float32 `[batch, kv_heads, at least columns]`, updated in place.
    threads : int or None
        Cap on the core's threads.
    """
    if rule.look_gap:
        near = slice(block.nearer(rule.look_gap), probabilities.shape[-1])
        probabilities[..., near].masked_fill_((block.distance(near) < rule.look_gap)[:, :, None], 0.0)
    reach = rule.peak_reach
    if reach is None or block.longest <= reach:
        accumulate(probabilities, block, rule, mass, peak, threads)
        return
    accumulate(probabilities, block, rule, mass, peak.clone(), threads)
    # The call's own columns beyond the reach of all these queries are left out, the stored ones are within it.
    first, end = block.nearer(reach + 1), probabilities.shape[-1]
    first_new = torch.tensor(block.first_new, device=block.key_positions.device)[:, None, None]
    parts = [slice(0, end)] if first <= block.stored else [slice(0, block.stored), slice(first, end)]
    for part in (part for part in parts if part.stop > part.start):
        looked, kept = probabilities[..., part].contiguous(), peak[..., part].contiguous()
        own = block.key_positions[..., part] >= first_new
        looked.masked_fill_(((block.distance(part) > reach) & own[:, :, None])[:, :, None], 0.0)
        accumulate(looked, block.part(part), rule, mass[..., part].clone(), kept, threads)
        peak[..., part] = kept


def accumulate(
    probabilities: Tensor, block: Block, rule: Rule, mass: Tensor, peak: Tensor, threads: int | None = None
) -> None:
    """Let mass and peak fade and add looks, all of them alike: the Rust core on the CPU, torch elsewhere.

    Parameters as for `observe`.
    """
    columns = probabilities.shape[-1]
    if probabilities.device.type != "cpu":
        accumulate_by_torch(probabilities, block, rule, mass, peak)
        return
    # Columns beyond are new tokens that no query has reached: nothing there can fade.
    first_mass, first_peak = mass[..., :columns].contiguous(), peak[..., :columns].contiguous()
    _core.accumulate(
        probabilities,
        block.ages,
        block.elapsed,
        first_mass,
        first_peak,
        rule.mass_decay,
        rule.peak_decay,
        weights=block.weights,
        threads=threads,
    )
    if columns < mass.shape[-1]:
        mass[..., :columns], peak[..., :columns] = first_mass, first_peak


def accumulate_by_torch(probabilities: Tensor, block: Block, rule: Rule, mass: Tensor, peak: Tensor) -> None:
    """Do the work of the core's `accumulate` in torch, on any device."""
    device, columns = probabilities.device, probabilities.shape[-1]
    age = block.ages.to(device, torch.float32)[:, None, :, None]
    passed = torch.tensor(block.elapsed, dtype=torch.float32, device=device)[:, None, None]
    mean = probabilities.float().mean(2).masked_fill(age < 0, 0.0)
    age = age.clamp(min=0)
    summed, highest = (mean * rule.mass_decay**age).sum(2), (mean * rule.peak_decay**age).amax(2)
    if block.weights is not None:
        summed, highest = summed * block.weights, highest * block.weights
    mass.mul_(rule.mass_decay**passed)
    mass[..., :columns] += summed
    peak.mul_(rule.peak_decay**passed)
    peak[..., :columns] = torch.maximum(peak[..., :columns], highest)


def look_weights(keys: Tensor, values: Tensor) -> Tensor:
    """What a look at a token can move: the length of its value over the length of its key.

    Parameters
    ----------
    keys, values : Tensor
        `[batch, kv_heads, columns, head_dim]`.

    Returns
    -------
    Tensor
        float32 `[batch, kv_heads, columns]`; 0 for a key of zeros, which an empty slot holds.
    """
    length, weight = (torch.linalg.vector_norm(x, dim=-1, dtype=_wide(x)).float() for x in (keys, values))
    return torch.div(weight, length).masked_fill(length == 0, 0.0)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype to add up in."""
    return torch.promote_types(x.dtype, torch.float32)
