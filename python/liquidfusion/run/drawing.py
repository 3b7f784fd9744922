"""Penalties, filters and draws on `[rows, vocabulary]`: by the kernels where they run, else in torch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from liquidfusion.compute import kernels

CANDIDATES = 1024
"""Tokens of a row that are sorted first on a CPU: more only where the nucleus is wider."""


def penalise(scores: Tensor, seen: Tensor, settings: Tensor) -> Tensor:
    """Scores after the penalties for tokens that came before.

    Parameters
    ----------
    scores : Tensor
        `[rows, vocabulary]`, overwritten.
    seen : Tensor
        int32 like `scores`: twice how often a token is in the answer, and one more if it is in the prompt.
    settings : Tensor
        float64 `[rows, parameters]`: repetition, frequency and presence penalty last.
    """
    repetition, frequency, presence = settings.to(scores.dtype)[:, 4:, None].unbind(1)
    times = seen >> 1
    scores = torch.where(seen > 0, torch.where(scores < 0, scores * repetition, scores / repetition), scores)
    return scores.sub_(frequency * times + presence * (times > 0))


def draw(
    scores: Tensor, settings: Tensor, noise: Tensor, filtered: Tensor | None, lanes: Tensor | None = None
) -> Tensor:
    """One token for each of some lanes by inverting the distribution function.

    Sums are in float64: in float32 their rounding, which depends on the batch, would move the borders of tokens.

    Parameters
    ----------
    scores : Tensor
        `[lanes, vocabulary]`.
    settings : Tensor
        float64 `[draws, parameters]`: temperature, top-k, top-p, min-p first.
    noise : Tensor
        float64 `[draws]` in [0, 1).
    filtered : Tensor or None
        Draws that have a top-k, top-p or min-p.
    lanes : Tensor or None
        int64 `[draws]`: whose scores; None: all.

    Returns
    -------
    Tensor
        int64 `[draws]`.
    """
    lanes = torch.arange(len(scores), device=scores.device) if lanes is None else lanes
    if kernels.available(scores.device):
        with torch.cuda.device_of(scores):  # type: ignore[no-untyped-call]
            return kernels.draw(scores, settings.float(), noise, lanes)
    scores = wide(scores.index_select(0, lanes))
    settings = settings.to(scores.dtype)
    scores = scores / settings[:, :1]
    weights = (scores - scores.amax(-1, keepdim=True)).exp_()
    if filtered is not None:
        some = weights.index_select(0, filtered)
        some.masked_fill_(some < threshold(some, settings.index_select(0, filtered)), 0.0)
        weights.index_copy_(0, filtered, some)
    total = weights.cumsum(-1, dtype=torch.float64)
    ids = torch.searchsorted(total, (noise * total[:, -1])[:, None], right=True)[:, 0]
    return ids.clamp_(max=scores.shape[1] - 1)


def threshold(weights: Tensor, settings: Tensor) -> Tensor:
    """The least weight that top-k, top-p and min-p let through; equal ones stay or go together.

    Parameters
    ----------
    weights : Tensor
        `[rows, vocabulary]`, the largest of a row 1.
    settings : Tensor
        `[rows, parameters]`: temperature, top-k, top-p, min-p first.

    Returns
    -------
    Tensor
        Like `weights`, `[rows, 1]`.
    """
    if weights.device.type == "cpu" and weights.shape[1] > CANDIDATES:
        found, enough = _nucleus(weights, weights.topk(CANDIDATES, -1).values, settings)
        if enough:
            return found
    return _nucleus(weights, weights.sort(-1, descending=True).values, settings)[0]


def _nucleus(weights: Tensor, largest: Tensor, settings: Tensor) -> tuple[Tensor, bool]:
    """`threshold` from a row's largest weights, sorted, and (on a CPU) whether they were enough to know it."""
    top_k, top_p, min_p = settings[:, 1:2].long(), settings[:, 2:3].double(), settings[:, 3:4]
    number, limited = largest.shape[1], top_k > 0
    kth = largest.gather(1, (top_k - 1).clamp(0, number - 1)).masked_fill_(~limited, 0.0)
    kept = largest.masked_fill(largest < kth, 0.0)
    upto = kept.cumsum(-1, dtype=torch.float64)
    total = torch.where(limited, upto[:, -1:], weights.sum(-1, keepdim=True, dtype=torch.float64))
    inside = (upto - kept) < top_p * total
    last = largest.masked_fill(~inside, torch.inf).amin(-1, keepdim=True).masked_fill_(top_p >= 1, 0.0)
    enough = True
    if number < weights.shape[1] and weights.device.type == "cpu":
        by_k = limited & (largest[:, -1:] < kth)
        by_p = ~limited & ~inside[:, -1:]
        by_min = ~limited & (top_p >= 1)
        enough = bool((by_k | by_p | by_min).all())
    return torch.maximum(torch.maximum(kth, last), min_p.to(weights.dtype)), enough


def uniform(seeds: NDArray[np.uint64], steps: NDArray[np.uint64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each pair of seed and step (SplitMix64's mixer, twice)."""
    mixed = _mix(_mix(seeds + np.uint64(0x9E3779B97F4A7C15)) + steps * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def wide(logits: Tensor) -> Tensor:
    """In float32, or float64 where they are that already."""
    return logits if logits.dtype == torch.float64 else logits.float()
