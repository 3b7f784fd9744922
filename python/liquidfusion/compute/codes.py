"""Keys and values in 8, 4 or 2 bits a coordinate: how they are coded, and attention over codes.

A vector is rotated, so that its length spreads over all coordinates alike; each coordinate becomes one of 2^bits odd
integers, its level, at the distances that lose least where coordinates are normally distributed; and one scale brings
the levels back to the vector's length. Keys are centred before: `mu`, a function of the model alone, is what keys of a
head have in common. Nothing needs decoding to attend: queries are rotated once and outputs back once, scales stand
outside the products. Sums that a code depends on have one fixed order, so that a vector's code depends on nothing else.

Sources: rotations before few bits, QuaRot, https://arxiv.org/abs/2404.00456; optimal steps, J. Max, Quantizing for
minimum distortion, 1960; distinctness, KeyDiff, https://arxiv.org/abs/2504.15364.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from liquidfusion import _core
from liquidfusion.exceptions import ConfigError, TensorError

STEP = {8: 0.03076, 4: 0.3352, 2: 0.9957}
"""Distance of two levels by bits, in units of a vector's root mean square."""

SCALE_BYTES = 2
"""Bytes of a vector's scale."""

_LARGEST = 65504.0  # of a float16
_HOST = "cpu"  # where the Rust core computes


class Codes(NamedTuple):
    """Coded vectors.

    `codes`: uint8 `[batch, kv_heads, slots, width * bits / 8]`; of `parts = 8 / bits` coordinates in a byte the lowest
    bits hold coordinate `byte`, the next `byte + width / parts`, and so on. `scales`: float16 `[batch, kv_heads,
    slots]`. An empty slot is 0 in both.
    """

    codes: Tensor
    scales: Tensor


@dataclass(frozen=True, eq=False)
class Coding:
    """How one layer's keys, or its values, are coded.

    Parameters
    ----------
    bits : int
        8, 4 or 2.
    head_dim : int
        Length of a vector.
    mu : Tensor or None
        float32 `[kv_heads, head_dim]`, subtracted before coding; None for values, and for keys that need no centring.
    threads : int or None
        Cap on the Rust core's threads.

    Raises
    ------
    ConfigError
        Other bits.
    TensorError
        A `mu` of another dtype or shape.
    """

    bits: int
    head_dim: int
    mu: Tensor | None = None
    threads: int | None = None
    _rotated: Tensor | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if self.bits not in STEP:
            raise ConfigError(f"bits must be one of {sorted(STEP)}, got {self.bits!r}")
        if self.mu is not None and (
            self.mu.dtype != torch.float32 or self.mu.dim() != 2 or self.mu.shape[1] != self.head_dim
        ):
            raise TensorError(
                f"mu must be float32 [kv_heads, {self.head_dim}], got {self.mu.dtype} {list(self.mu.shape)}"
            )
        if self.mu is not None:
            object.__setattr__(self, "_rotated", _mixed(_padded(self.mu)))

    @property
    def width(self) -> int:
        """Coordinates of a coded vector: `head_dim` up to the next multiple of 8."""
        return width(self.head_dim)

    @property
    def code_bytes(self) -> int:
        """Bytes of a vector's codes, without its scale."""
        return self.width * self.bits // 8

    @property
    def nbytes(self) -> int:
        """Bytes of a coded vector."""
        return self.code_bytes + SCALE_BYTES

    def empty(self, batch: int, kv_heads: int, slots: int, device: torch.device | str) -> Codes:
        """Codes of empty slots."""
        # They outlive the inference_mode block that made them.
        with torch.inference_mode(False):
            shape = (batch, kv_heads, slots)
            codes = torch.zeros((*shape, self.code_bytes), dtype=torch.uint8, device=device)
            return Codes(codes, torch.zeros(shape, dtype=torch.float16, device=device))

    def encode(self, states: Tensor) -> Codes:
        """Code vectors.

        Parameters
        ----------
        states : Tensor
            `[batch, kv_heads, columns, head_dim]`, any floating dtype.

        Returns
        -------
        Codes
            Bit for bit the same for a vector, whatever stands beside it and on whatever device. A vector that is not
            finite has a scale that is not.
        """
        states = states.detach().float()
        mu = self._mu(states.device)
        if states.device.type == _HOST:
            batch, kv_heads, columns, _ = states.shape
            out = self.empty(batch, kv_heads, columns, states.device)
            _core.encode(states.contiguous(), mu, self.bits, *out, threads=self.threads)
            return out
        return encode(states if mu is None else states - mu[:, None], self.bits)

    def turned(self, states: Tensor) -> Tensor:
        """Vectors `[batch, kv_heads, columns, head_dim]` before they are coded: centred and rotated, float32."""
        states = states.detach().float()
        mu = self._mu(states.device)
        return rotate(states if mu is None else states - mu[:, None])

    def turned_back(self, turned: Tensor) -> Tensor:
        """The vectors again, float32."""
        states = unrotate(turned.float(), self.head_dim)
        mu = self._mu(states.device)
        return states if mu is None else states + mu[:, None]

    def turned_logits(self, query: Tensor, turned: Tensor) -> Tensor:
        """As `logits`, of vectors that are turned and not coded."""
        query = query.detach().float()
        products = rotate(query) @ turned.float().transpose(2, 3)
        mu = self._mu(query.device)
        return products if mu is None else products.add_((query * mu[:, None]).sum(-1, keepdim=True))

    def levels(self, codes: Tensor) -> Tensor:
        """Levels, odd integers as float32 `[batch, kv_heads, slots, width]`, of codes."""
        return levels(codes, self.bits)

    def decode(self, coded: Codes, dtype: torch.dtype) -> Tensor:
        """What the codes stand for, `[batch, kv_heads, slots, head_dim]`, `mu` added and rotated back."""
        states = unrotate(self.levels(coded.codes) * coded.scales[..., None].float(), self.head_dim)
        mu = self._mu(states.device)
        return (states if mu is None else states + mu[:, None]).to(dtype)

    def logits(self, query: Tensor, coded: Codes) -> Tensor:
        """Products of queries with what the codes stand for.

        Parameters
        ----------
        query : Tensor
            `[batch, kv_heads, queries, head_dim]`: the query heads of a kv head are more queries.

        Returns
        -------
        Tensor
            float32 `[batch, kv_heads, queries, slots]`, not scaled. Empty slots hold nothing of use.
        """
        query = query.detach().float()
        products = self._products(rotate(query), coded)
        mu = self._mu(query.device)
        return products if mu is None else products.add_((query * mu[:, None]).sum(-1, keepdim=True))

    def outputs(self, probabilities: Tensor, coded: Codes) -> Tensor:
        """Sums of what the codes stand for.

        Parameters
        ----------
        probabilities : Tensor
            float32 `[batch, kv_heads, queries, slots]`.

        Returns
        -------
        Tensor
            float32 `[batch, kv_heads, queries, head_dim]`.
        """
        sums = unrotate(self._sums(probabilities, coded), self.head_dim)
        mu = self._mu(sums.device)
        return sums if mu is None else sums + probabilities.sum(-1, keepdim=True) * mu[:, None]

    def lengths(self, coded: Codes) -> Tensor:
        """Lengths of what the codes stand for, float32 `[batch, kv_heads, slots]`; of an empty slot that of `mu`.

        Before it is rotated back, which only a `head_dim` that is no multiple of 8 can tell: there a coded vector has
        a part of its length, noise alone, outside of the space that vectors come from.
        """
        squares = self._squares(coded)
        mu = self.rotated_mean(squares.device)
        if mu is not None:
            # |x + mu|^2 = |x|^2 + 2 x mu + |mu|^2, and no coordinate of x is needed.
            products = self._products(mu[:, None].expand(squares.shape[0], -1, -1, -1), coded)[:, :, 0]
            squares = squares + 2 * products + _fixed_sum(mu.square(), -1)
        return squares.clamp(min=0).sqrt()

    def distinctness(self, coded: Codes, held: Tensor) -> Tensor:
        """How far each key points from the mean direction of those held (`distinctness`), from codes and `lengths`.

        Parameters
        ----------
        held : Tensor
            bool `[batch, kv_heads, slots]`: which slots hold a token that may stay.

        Returns
        -------
        Tensor
            float32 `[batch, kv_heads, slots]`, 0 where nothing is held.
        """
        # Rotated, the cosines are what they were.
        length, mu = self.lengths(coded), self.rotated_mean(coded.codes.device)
        weight = torch.where(held & (length > 0), 1 / length, 0.0)
        mean = self._sums(weight[:, :, None], coded)
        if mu is not None:
            mean = mean + _fixed_sum(weight, -1)[..., None] * mu[:, None]
        norm = _fixed_sum(mean.square(), -1).sqrt()[..., 0]
        along = self._products(mean, coded)[:, :, 0]
        if mu is not None:
            along = along + _fixed_sum(mean * mu[:, None], -1)[..., 0]
        return torch.where(held & (norm > 0), -along * weight / norm, 0.0)

    def _mu(self, device: torch.device) -> Tensor | None:
        return None if self.mu is None else self.mu.to(device)

    def rotated_mean(self, device: torch.device) -> Tensor | None:
        """`mu` rotated, float32 `[kv_heads, width]`, or None."""
        return None if self._rotated is None else self._rotated.to(device)

    def _products(self, rotated: Tensor, coded: Codes) -> Tensor:
        if rotated.device.type == _HOST:
            out = rotated.new_empty((*rotated.shape[:3], coded.scales.shape[2]))
            codes, scales = coded.codes.contiguous(), coded.scales.contiguous()
            _core.code_logits(rotated.contiguous(), codes, scales, self.bits, out, threads=self.threads)
            return out
        with _exact(rotated):
            return (rotated @ self.levels(coded.codes).transpose(2, 3)) * coded.scales[:, :, None].float()

    def _sums(self, probabilities: Tensor, coded: Codes) -> Tensor:
        if probabilities.device.type == _HOST:
            out = probabilities.new_empty((*probabilities.shape[:3], self.width))
            codes, scales = coded.codes.contiguous(), coded.scales.contiguous()
            _core.code_outputs(probabilities.contiguous(), codes, scales, self.bits, out, threads=self.threads)
            return out
        with _exact(probabilities):
            return (probabilities * coded.scales[:, :, None].float()) @ self.levels(coded.codes)

    def _squares(self, coded: Codes) -> Tensor:
        if coded.codes.device.type == _HOST:
            out = torch.empty(coded.scales.shape, dtype=torch.float32)
            codes, scales = coded.codes.contiguous(), coded.scales.contiguous()
            _core.code_squares(codes, scales, self.bits, out, threads=self.threads)
            return out
        return self.levels(coded.codes).square().sum(-1) * coded.scales.float().square()


def width(head_dim: int) -> int:
    """Coordinates of a coded vector: `head_dim` up to the next multiple of 8, whose codes fill bytes at any bits."""
    return -(-head_dim // 8) * 8


@lru_cache
def signs(head_dim: int) -> tuple[float, ...]:
    """Which coordinates change their sign before they are mixed: `width` numbers 1.0 or -1.0.

    The highest bits of a linear congruential generator (Knuth's MMIX) that begins at 7.
    """
    state, found = 7, []
    for _ in range(width(head_dim)):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        found.append(-1.0 if state >> 63 else 1.0)
    return tuple(found)


def blocks(width: int) -> list[int]:
    """The powers of two that sum up to `width`, largest first: the sizes of the Hadamard matrices on the diagonal."""
    return [1 << bit for bit in reversed(range(width.bit_length())) if width >> bit & 1]


@lru_cache
def rotation(head_dim: int, device: torch.device) -> Tensor:
    """The rotation as a matrix, float32 `[width, head_dim]` on a device: `y = R x`, and back `x = R^T y`."""
    with torch.inference_mode(False), torch.no_grad():
        unit = torch.eye(width(head_dim), device="cpu")[:head_dim]
        return _mixed(unit).T.contiguous().to(device)


def rotate(states: Tensor) -> Tensor:
    """Rotate float32 vectors `[..., head_dim]` to `[..., width]` by a matrix product, as queries are."""
    with _exact(states):
        return states @ rotation(states.shape[-1], states.device).T


def unrotate(states: Tensor, head_dim: int) -> Tensor:
    """Rotate float32 vectors `[..., width]` back to `[..., head_dim]`."""
    with _exact(states):
        return states @ rotation(head_dim, states.device)


def encode(states: Tensor, bits: int) -> Codes:
    """Code centred float32 vectors `[..., head_dim]` in plain torch, operation by operation as the Rust core does."""
    y = _mixed(_padded(states))
    norm = _sum_of_squares(y).sqrt()
    rms = norm / _root(y.shape[-1])
    unit = torch.where(rms > 0, rms * STEP[bits], 1.0)
    top = 2**bits - 1
    chosen = (y / unit[..., None] + 2 ** (bits - 1)).floor().clamp(0, top)
    squares = (2 * chosen - top).square().sum(-1)  # integers: exact in any order
    scale = norm / squares.sqrt()
    scale = torch.where(norm.isfinite(), scale.clamp(max=_LARGEST), scale).half()
    chosen = torch.nan_to_num(chosen).to(torch.uint8)
    parts = chosen.reshape(*chosen.shape[:-1], 8 // bits, chosen.shape[-1] * bits // 8).unbind(-2)
    packed = parts[0].clone()
    for i, part in enumerate(parts[1:], 1):
        packed |= part << (bits * i)
    return Codes(packed, scale)


def levels(codes: Tensor, bits: int) -> Tensor:
    """Levels, odd integers as float32 `[..., width]`, of packed codes `[..., bytes]`."""
    mask = 2**bits - 1
    parts = [(codes >> (bits * i)) & mask for i in range(8 // bits)]
    return torch.cat(parts, -1).float().mul_(2).sub_(mask)


def distinctness(keys: Tensor, held: Tensor) -> Tensor:
    """How far each key points from the mean direction of those held: minus the cosine with the sum of unit keys.

    Parameters
    ----------
    keys : Tensor
        `[batch, kv_heads, slots, head_dim]`, as the model makes them.
    held : Tensor
        bool `[batch, kv_heads, slots]`: which slots hold a token that may stay.

    Returns
    -------
    Tensor
        float32 `[batch, kv_heads, slots]`, 0 where nothing is held. Summed in one fixed order of slots, whatever the
        batch and the threads.
    """
    unit = torch.where(held[..., None], keys.float(), 0.0)
    unit = unit / _fixed_sum(unit.square(), -1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    mean = _fixed_sum(unit, 2)
    norm = _fixed_sum(mean.square(), -1).sqrt()
    along = _fixed_sum(unit * mean, -1)
    return torch.where(norm > 0, -along / norm, 0.0)[..., 0].where(held, 0.0)


def _mixed(states: Tensor) -> Tensor:
    """The rotation without a matrix product, whose sums depend on how many vectors there are: `[..., width]`."""
    y = states * torch.tensor(signs(states.shape[-1]), device=states.device)
    done = []
    for part in torch.split(y, blocks(states.shape[-1]), -1):
        size, half = part.shape[-1], 1
        while half < size:
            low, high = part.reshape(*part.shape[:-1], size // (2 * half), 2, half).unbind(-2)
            part = torch.stack((low + high, low - high), -2).flatten(-3)
            half *= 2
        done.append(part * _inverse_root(size))
    return torch.cat(done, -1)


def _padded(states: Tensor) -> Tensor:
    missing = width(states.shape[-1]) - states.shape[-1]
    return torch.nn.functional.pad(states, (0, missing)) if missing else states


@lru_cache
def _root(size: int) -> float:
    return torch.tensor(float(size), device="cpu").sqrt().item()  # rounded as the Rust core does


@lru_cache
def _inverse_root(size: int) -> float:
    return (1 / torch.tensor(float(size), device="cpu").sqrt()).item()


def _sum_of_squares(y: Tensor) -> Tensor:
    total = torch.zeros(y.shape[:-1], device=y.device)
    for part in torch.split(y.square(), blocks(y.shape[-1]), -1):
        total = total + _fixed_sum(part, -1)[..., 0]
    return total


def _fixed_sum(terms: Tensor, dim: int) -> Tensor:
    """Sum by halves, `dim` kept with size 1: torch's own order depends on the shape and on the threads."""
    while (size := terms.shape[dim]) > 1:
        half = size // 2
        low, high = terms.narrow(dim, 0, half), terms.narrow(dim, half, half)
        odd = [terms.narrow(dim, size - 1, 1)] if size % 2 else []
        terms = torch.cat((low + high, *odd), dim) if odd else low + high
    return terms


def _exact(states: Tensor) -> AbstractContextManager[object]:
    """Outside of an autocast region: products of float32 stay so."""
    kind = states.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
