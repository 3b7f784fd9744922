"""What the decode kernel does, row by row in plain torch, for tests of what runs around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liquidfusion.compute import looks


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    mass: Tensor | None,
    peak: Tensor | None,
    ring: Tensor,
    used: Tensor,
    seen: Tensor,
    *,
    active: Tensor | None = None,
    scale: float,
    mass_decay: float,
    peak_decay: float,
    value_weighted: bool,
    look_gap: int = 0,
    **_: Any,
) -> Tensor:
    """As `liquidfusion.compute.kernels.decode`."""
    out = torch.zeros_like(q)
    kv_heads = keys.shape[1]
    for row in range(len(q)):
        if active is not None and not active[row]:
            continue
        for head in range(kv_heads):
            slot = int(ring[row, head, int(used[row]) % ring.shape[2]])
            keys[row, head, slot], values[row, head, slot] = k[row, head], v[row, head]
            positions[row, head, slot] = seen[row]
            there = positions[row, head] >= 0
            queries = q[row].view(kv_heads, -1, q.shape[2])[head]
            scores = (queries @ keys[row, head].T * scale).float().masked_fill(~there, -torch.inf)
            p = scores.softmax(-1)
            out[row].view(kv_heads, -1, q.shape[2])[head] = p.to(v.dtype) @ values[row, head]
            if mass is None or peak is None:
                continue
            mass[row, head, slot] = peak[row, head, slot] = 0
            look = p.mean(0).masked_fill(seen[row] - positions[row, head] < look_gap, 0.0)
            if value_weighted:
                look = look * looks.look_weights(keys[row, head], values[row, head])
            mass[row, head] = mass[row, head] * mass_decay + look
            peak[row, head] = torch.maximum(peak[row, head] * peak_decay, look)
    return out
