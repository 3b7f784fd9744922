"""From logits to tokens, for many rows at once: every row by its own settings, in one pass over `[rows, vocabulary]`.

The order is that of transformers' `generate`: logit bias, repetition penalty, frequency and presence penalties,
temperature, top-k, top-p, min-p. A draw needs one uniform number, a function of the request's seed and of how many
tokens it has drawn before, so a request gives the same tokens whatever runs beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from liquidfusion.compute import kernels
from liquidfusion.exceptions import ConfigError

MOST_LOGPROBS = 20
"""Alternatives per token that may be asked for."""
COLDEST = 1e-4
"""Least temperature but 0: below, logits divided by it could overflow."""
CANDIDATES = 1024
"""Tokens of a row that are sorted first on a CPU: more only where the nucleus is wider."""

_NUMBERS: dict[str, tuple[float, float, bool]] = {  # least, most, whether the least itself is out
    "temperature": (0.0, math.inf, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "repetition_penalty": (0.0, math.inf, True),
    "frequency_penalty": (-math.inf, math.inf, True),
    "presence_penalty": (-math.inf, math.inf, True),
}
_COLUMNS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen, and when it ends.

    Parameters
    ----------
    max_tokens : int
        Tokens at most.
    temperature : float
        Logits are divided by it; 0 takes the most likely token, and 0.0001 is the least above.
    top_k : int
        Only the so many most likely tokens, 0 for all.
    top_p : float
        Only the most likely tokens that together have this probability, in (0, 1].
    min_p : float
        Only tokens with this share of the most likely one's probability, in [0, 1].
    repetition_penalty : float
        Logits of tokens in the prompt or the answer are divided by it where positive and multiplied where negative.
    frequency_penalty, presence_penalty : float
        Taken off a token's logit for each time, and once, that it is in the answer.
    seed : int, optional
        Makes the draws repeatable; None draws a seed.
    logit_bias : mapping of int to float
        Added to the logits of tokens.
    stop_token_ids : tuple of int
        Tokens that end the answer, besides the model's own.
    stop : tuple of str
        Strings that end the answer.
    logprobs : int, optional
        With each token its log-probability and those of this many most likely tokens: of the logits as the model gives
        them, before anything above. At most 20.
    ignore_eos : bool
        Go on past the model's own end tokens.

    Raises
    ------
    ConfigError
        A value out of range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, 1)
        _whole("top_k", self.top_k, 0)
        for name, (least, most, open_low) in _NUMBERS.items():
            _number(name, getattr(self, name), least, most, open_low)
        if 0 < self.temperature < COLDEST:
            raise ConfigError(f"temperature={self.temperature!r}; 0, and {COLDEST} or more, is accepted")
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise ConfigError(f"ignore_eos={self.ignore_eos!r}; True and False are accepted")
        if not isinstance(self.logit_bias, Mapping):
            raise ConfigError(f"logit_bias={self.logit_bias!r}; a mapping from token ids to numbers is accepted")
        for token, bias in self.logit_bias.items():
            _whole("token id in logit_bias", token, 0)
            _number(f"logit_bias[{token}]", bias, -math.inf, math.inf, True)
        for name, kind in (("stop", str), ("stop_token_ids", int)):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise ConfigError(f"{name}={values!r}; a tuple is accepted")
            for value in values:
                if not isinstance(value, kind) or isinstance(value, bool) or value == "":
                    raise ConfigError(f"{name} has {value!r}; {'strings' if kind is str else 'token ids'} are accepted")
            object.__setattr__(self, name, tuple(values))

    @property
    def penalised(self) -> bool:
        """Whether tokens that came before count."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def filtered(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0


def _whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        upto = "or more" if most is None else f"to {most}"
        raise ConfigError(f"{name}={value!r}; a whole number, {least} {upto}, is accepted")


def _number(name: str, value: Any, least: float, most: float, open_low: bool) -> None:
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not right or value < least or value > most or (open_low and value == least):
        low = "" if least == -math.inf else f" {'above' if open_low else 'from'} {least:g}"
        high = "" if most == math.inf else f" up to {most:g}"
        raise ConfigError(f"{name}={value!r}; a finite number{low}{high} is accepted")


@dataclass(frozen=True)
class Drawn:
    """What one step drew, on the logits' device.

    `ids`: int64 `[lanes]`. For the lanes listed in `told`, in that order: `logprobs` of the token drawn `[told]`, the
    most likely tokens `top_ids` and theirs `top_logprobs` `[told, alternatives]`.
    """

    ids: Tensor
    told: tuple[int, ...] = ()
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


@dataclass(frozen=True)
class _Lanes:
    """Which lanes of a call need which step; tensors of indices on the device, None for none.

    `used`: rows that draw. `worked`: lanes whose logits are changed or drawn from. The others count within `worked`:
    `biased` (lane, token, bias), `penalised`, `drawn`, and `filtered` within `drawn`.
    """

    used: list[int]
    worked: Tensor | None
    rows: Tensor | None
    biased: tuple[Tensor, Tensor, Tensor] | None
    penalised: Tensor | None
    penalised_rows: Tensor | None
    drawn: Tensor | None
    drawn_rows: list[int]
    filtered: Tensor | None
    told: tuple[int, ...]
    told_lanes: Tensor | None
    alternatives: int


class Sampler:
    """Draws tokens for the rows of a batch.

    Parameters
    ----------
    rows : int
        Rows that requests may take.
    vocabulary : int
        Logits per row.
    device : torch.device
        Where the logits are.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self._rows, self._vocabulary, self._device = rows, vocabulary, device
        self._settings: list[Sampling] = [Sampling()] * rows
        self._seeds: NDArray[np.uint64] = np.zeros(rows, np.uint64)
        self._steps: NDArray[np.uint64] = np.zeros(rows, np.uint64)
        self._table: Tensor | None = None
        self._counts: Tensor | None = None
        self._prompt: Tensor | None = None
        self._planned: dict[tuple[int, ...], _Lanes] = {}

    def set(self, row: int, sampling: Sampling, prompt: Sequence[int], seed: int) -> None:
        """Give a row to a request: its settings, the tokens of its prompt, and the seed of its draws."""
        self._settings[row] = sampling
        self._seeds[row], self._steps[row] = seed % 2**64, 0
        self._table = None
        self._planned.clear()
        if not sampling.penalised:
            return
        if self._counts is None or self._prompt is None:
            shape = (self._rows, self._vocabulary)
            with torch.inference_mode(False):
                self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
                self._prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
        self._counts[row].zero_()
        self._prompt[row].zero_()
        # Embeddings may hold more tokens than there are logits.
        ids = upload([token for token in set(prompt) if token < self._vocabulary], torch.int64, self._device)
        self._prompt[row].index_fill_(0, ids, True)

    def move(self, source: int, target: int) -> None:
        """Let a request go on in another row."""
        self._settings[target] = self._settings[source]
        self._seeds[target], self._steps[target] = self._seeds[source], self._steps[source]
        self._table = None
        self._planned.clear()
        for table in (self._counts, self._prompt):
            if table is not None:
                table[target].copy_(table[source])

    def __call__(self, logits: Tensor, rows: tuple[int, ...]) -> Drawn:
        """Draw one token per lane; the device is not waited for.

        Parameters
        ----------
        logits : Tensor
            `[lanes, vocabulary]`; not changed.
        rows : tuple of int
            The row that each lane stands for, each at most once; -1 for a lane that nobody uses.

        Returns
        -------
        Drawn
            On the device.
        """
        lanes = self._planned.get(rows)
        if lanes is None:
            lanes = self._planned[rows] = self._plan(rows)
        ids = logits.argmax(-1)
        if lanes.worked is not None:
            ids.index_copy_(0, lanes.worked, self._work(logits, lanes))
            if lanes.penalised is not None and lanes.penalised_rows is not None:
                assert self._counts is not None
                drawn = ids[lanes.worked][lanes.penalised]
                self._counts[lanes.penalised_rows, drawn] += 1
        self._steps[lanes.used] += np.uint64(1)
        return self._tell(logits, ids, lanes)

    def _work(self, logits: Tensor, lanes: _Lanes) -> Tensor:
        """Tokens of the lanes in `lanes.worked`."""
        assert lanes.worked is not None
        assert lanes.rows is not None
        scores = logits.index_select(0, lanes.worked)
        if lanes.biased is not None or lanes.penalised is not None or not kernels.available(scores.device):
            scores = _wide(scores)
        if lanes.biased is not None:
            lane, token, bias = lanes.biased
            scores[lane, token] += bias.to(scores.dtype)
        table = self._parameters().index_select(0, lanes.rows)
        if lanes.penalised is not None:
            self._penalise(scores, table, lanes)
        ids = scores.argmax(-1)
        if lanes.drawn is None:
            return ids
        noise = uniform(self._seeds[lanes.drawn_rows], self._steps[lanes.drawn_rows])
        chosen, settings = scores.index_select(0, lanes.drawn), table.index_select(0, lanes.drawn)
        drawn = draw(chosen, settings, upload(noise, torch.float64, self._device), lanes.filtered)
        return ids.index_copy_(0, lanes.drawn, drawn)

    def _penalise(self, scores: Tensor, table: Tensor, lanes: _Lanes) -> None:
        assert lanes.penalised is not None
        assert lanes.penalised_rows is not None
        assert self._counts is not None
        assert self._prompt is not None
        counts = self._counts.index_select(0, lanes.penalised_rows)
        before = (counts > 0).logical_or_(self._prompt.index_select(0, lanes.penalised_rows))
        settings = table.index_select(0, lanes.penalised).to(scores.dtype)
        repetition, frequency, presence = settings[:, 4:, None].unbind(1)
        own = scores.index_select(0, lanes.penalised)
        own = torch.where(before, torch.where(own < 0, own * repetition, own / repetition), own)
        own -= frequency * counts + presence * (counts > 0)
        scores.index_copy_(0, lanes.penalised, own)

    def _tell(self, logits: Tensor, ids: Tensor, lanes: _Lanes) -> Drawn:
        if lanes.told_lanes is None:
            return Drawn(ids)
        known = _wide(logits.index_select(0, lanes.told_lanes)).log_softmax(-1)
        own = known.gather(1, ids.index_select(0, lanes.told_lanes)[:, None])[:, 0]
        top = known.topk(min(lanes.alternatives, known.shape[1]), -1)
        return Drawn(ids, lanes.told, own, top.indices, top.values)

    def _parameters(self) -> Tensor:
        """Settings of every row, float64 `[rows, parameters]` on the device."""
        if self._table is None:
            rows = [[float(getattr(sampling, name)) for name in _COLUMNS] for sampling in self._settings]
            self._table = upload(rows, torch.float64, self._device)
        return self._table

    def _plan(self, rows: tuple[int, ...]) -> _Lanes:
        def on(values: Sequence[int]) -> Tensor | None:
            return upload(values, torch.int64, self._device) if values else None

        settings = [self._settings[row] if row >= 0 else Sampling() for row in rows]
        worked = [i for i, s in enumerate(settings) if s.temperature > 0 or s.logit_bias or s.penalised]
        own = [settings[lane] for lane in worked]
        penalised = [i for i, s in enumerate(own) if s.penalised]
        drawn = [i for i, s in enumerate(own) if s.temperature > 0]
        biases = [(i, token, bias) for i, s in enumerate(own) for token, bias in s.logit_bias.items()]
        biased = None
        if biases:
            lane, token, bias = zip(*biases, strict=True)
            biased = (
                upload(lane, torch.int64, self._device),
                upload(token, torch.int64, self._device),
                upload(bias, torch.float64, self._device),
            )
        told = tuple(i for i, s in enumerate(settings) if s.logprobs is not None)
        return _Lanes(
            used=[row for row in rows if row >= 0],
            worked=on(worked),
            rows=on([rows[lane] for lane in worked]),
            biased=biased,
            penalised=on(penalised),
            penalised_rows=on([rows[worked[i]] for i in penalised]),
            drawn=on(drawn),
            drawn_rows=[rows[worked[i]] for i in drawn],
            filtered=on([i for i, lane in enumerate(drawn) if own[lane].filtered]),
            told=told,
            told_lanes=on(told),
            alternatives=max((settings[i].logprobs or 0 for i in told), default=0),
        )


def draw(scores: Tensor, settings: Tensor, noise: Tensor, filtered: Tensor | None) -> Tensor:
    """One token per row by inverting the distribution function.

    Sums are in float64: in float32 their rounding, which depends on the batch, would move the borders of tokens.

    Parameters
    ----------
    scores : Tensor
        `[rows, vocabulary]`.
    settings : Tensor
        float64 `[rows, parameters]`: temperature, top-k, top-p, min-p first.
    noise : Tensor
        float64 `[rows]` in [0, 1).
    filtered : Tensor or None
        Rows that have a top-k, top-p or min-p.

    Returns
    -------
    Tensor
        int64 `[rows]`.
    """
    if kernels.available(scores.device):
        with torch.cuda.device_of(scores):  # type: ignore[no-untyped-call]
            return kernels.draw(scores, settings.float(), noise)
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


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a list or array on a device, without waiting for what runs there."""
    tensor = torch.as_tensor(values, dtype=dtype, device="cpu")
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _wide(logits: Tensor) -> Tensor:
    """In float32, or float64 where they are that already."""
    return logits if logits.dtype == torch.float64 else logits.float()
