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
from liquidfusion.run.drawing import draw, penalise, uniform, wide

MOST_LOGPROBS = 20
"""Alternatives per token that may be asked for."""
COLDEST = 1e-4
"""Least temperature but 0: below, logits divided by it could overflow."""

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
class _Draws:
    """Lanes that are drawn from, as indices of the logits that are at hand, with what each is drawn by.

    `rows`: whose seeds. `settings`: float64 `[draws, parameters]`. `filtered`: draws with a top-k, top-p or min-p.
    Tensors are on the device, None for none.
    """

    lanes: Tensor
    rows: NDArray[np.int64]
    settings: Tensor
    filtered: Tensor | None


@dataclass(frozen=True)
class _Changed:
    """Lanes whose logits are changed first.

    `biased`: index among these lanes, token and bias. `penalised`: indices among these lanes. `rows`: whose tokens
    count. `draws`: those that are drawn from, as indices among these lanes.
    """

    lanes: Tensor
    rows: Tensor
    settings: Tensor
    biased: tuple[Tensor, Tensor, Tensor] | None
    penalised: Tensor | None
    draws: _Draws | None


@dataclass(frozen=True)
class _Lanes:
    """Which lanes of a call need what: rows that draw, lanes drawn as they are, changed ones, and told ones."""

    used: NDArray[np.int64]
    draws: _Draws | None
    changed: _Changed | None
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
        self._seeds: NDArray[np.uint64] = np.zeros(rows, np.uint64)
        self._steps: NDArray[np.uint64] = np.zeros(rows, np.uint64)
        # One more row stands for lanes that nobody uses.
        self._settings = np.tile(_row_of(Sampling()), (rows + 1, 1))
        self._told: NDArray[np.int64] = np.full(rows + 1, -1, np.int64)
        self._biases: dict[int, Mapping[int, float]] = {}
        self._seen: Tensor | None = None
        self._planned: dict[tuple[int, ...], _Lanes] = {}

    def set(self, row: int, sampling: Sampling, prompt: Sequence[int], seed: int) -> None:
        """Give a row to a request: its settings, the tokens of its prompt, and the seed of its draws."""
        self._settings[row] = _row_of(sampling)
        self._told[row] = -1 if sampling.logprobs is None else sampling.logprobs
        self._biases[row] = sampling.logit_bias
        self._seeds[row], self._steps[row] = seed % 2**64, 0
        self._planned.clear()
        if not sampling.penalised:
            return
        if self._seen is None:
            with torch.inference_mode(False):
                self._seen = torch.zeros((self._rows, self._vocabulary), dtype=torch.int32, device=self._device)
        self._seen[row].zero_()
        # Embeddings may hold more tokens than there are logits.
        ids = upload([token for token in set(prompt) if token < self._vocabulary], torch.int64, self._device)
        self._seen[row].index_fill_(0, ids, 1)

    def move(self, source: int, target: int) -> None:
        """Let a request go on in another row."""
        for table in (self._settings, self._told, self._seeds, self._steps):
            table[target] = table[source]
        self._biases[target] = self._biases.get(source, {})
        self._planned.clear()
        if self._seen is not None:
            self._seen[target].copy_(self._seen[source])

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
            lanes = self._planned[rows] = self._plan(np.array(rows, np.int64))
        ids = logits.argmax(-1)
        if lanes.draws is not None:
            ids.index_copy_(0, lanes.draws.lanes, self._drawn(logits, lanes.draws))
        if (changed := lanes.changed) is not None:
            scores = self._change(logits, changed)
            own = scores.argmax(-1)
            if changed.draws is not None:
                own.index_copy_(0, changed.draws.lanes, self._drawn(scores, changed.draws))
            ids.index_copy_(0, changed.lanes, own)
            if changed.penalised is not None:
                assert self._seen is not None
                self._seen[changed.rows[changed.penalised], own[changed.penalised]] += 2
        self._steps[lanes.used] += np.uint64(1)
        return self._tell(logits, ids, lanes)

    def _drawn(self, scores: Tensor, draws: _Draws) -> Tensor:
        noise = uniform(self._seeds[draws.rows], self._steps[draws.rows])
        return draw(scores, draws.settings, upload(noise, torch.float64, self._device), draws.filtered, draws.lanes)

    def _change(self, logits: Tensor, changed: _Changed) -> Tensor:
        """Logits of some lanes after biases and penalties, in float32 or wider."""
        lanes = changed.lanes
        if changed.biased is not None:
            logits = wide(logits.index_select(0, lanes))
            lane, token, bias = changed.biased
            logits[lane, token] += bias.to(logits.dtype)
            lanes = torch.arange(len(lanes), device=self._device)
        if changed.penalised is None:
            return logits
        assert self._seen is not None
        if kernels.available(logits.device):
            # Without a penalty it is a copy.
            with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
                return kernels.penalise(logits, lanes, self._seen, changed.rows, changed.settings.float())
        return penalise(wide(logits.index_select(0, lanes)), self._seen.index_select(0, changed.rows), changed.settings)

    def _tell(self, logits: Tensor, ids: Tensor, lanes: _Lanes) -> Drawn:
        if lanes.told_lanes is None:
            return Drawn(ids)
        everyone = len(lanes.told) == len(logits)
        told = logits if everyone else logits.index_select(0, lanes.told_lanes)
        if kernels.available(logits.device):
            with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
                total = kernels.log_sum(logits, lanes.told_lanes)[:, None]
        else:
            total = wide(told).logsumexp(-1, keepdim=True)
        own = told.gather(1, ids.index_select(0, lanes.told_lanes)[:, None]) - total
        top = told.topk(min(lanes.alternatives, told.shape[1]), -1)
        return Drawn(ids, lanes.told, own[:, 0], top.indices, top.values - total)

    def _plan(self, rows: NDArray[np.int64]) -> _Lanes:
        settings, biased = self._settings[rows], [bool(self._biases.get(int(row))) for row in rows]
        drawn, filtered, penalised = _drawn(settings), _filtered(settings), _penalised(settings)
        changed = penalised | np.array(biased, np.bool_)
        told = np.flatnonzero(self._told[rows] >= 0)
        return _Lanes(
            used=rows[rows >= 0],
            draws=self._plan_draws(rows, np.arange(len(rows)), drawn & ~changed, filtered),
            changed=self._plan_changed(rows, np.flatnonzero(changed), penalised, drawn, filtered),
            told=tuple(told.tolist()),
            told_lanes=self._on(told),
            alternatives=int(self._told[rows].max(initial=0)),
        )

    def _plan_draws(
        self, rows: NDArray[np.int64], lanes: NDArray[np.int64], drawn: NDArray[np.bool_], filtered: NDArray[np.bool_]
    ) -> _Draws | None:
        """`drawn`, `filtered`: of all lanes; `lanes`: those of the logits that are drawn from."""
        here = np.flatnonzero(drawn[lanes])
        if not len(here):
            return None
        own = rows[lanes[here]]
        return _Draws(
            upload(here, torch.int64, self._device),
            own,
            upload(self._settings[own], torch.float64, self._device),
            self._on(np.flatnonzero(filtered[lanes[here]])),
        )

    def _plan_changed(
        self,
        rows: NDArray[np.int64],
        lanes: NDArray[np.int64],
        penalised: NDArray[np.bool_],
        drawn: NDArray[np.bool_],
        filtered: NDArray[np.bool_],
    ) -> _Changed | None:
        if not len(lanes):
            return None
        own = rows[lanes]
        biases = [(i, *pair) for i, row in enumerate(own.tolist()) for pair in self._biases.get(row, {}).items()]
        kinds = (torch.int64, torch.int64, torch.float64)
        columns = [upload(x, dtype, self._device) for x, dtype in zip(zip(*biases, strict=True), kinds, strict=False)]
        return _Changed(
            lanes=upload(lanes, torch.int64, self._device),
            rows=upload(own, torch.int64, self._device),
            settings=upload(self._settings[own], torch.float64, self._device),
            biased=(columns[0], columns[1], columns[2]) if columns else None,
            penalised=self._on(np.flatnonzero(penalised[lanes])),
            draws=self._plan_draws(rows, lanes, drawn, filtered),
        )

    def _on(self, indices: NDArray[np.int64]) -> Tensor | None:
        return upload(indices, torch.int64, self._device) if len(indices) else None


def _row_of(sampling: Sampling) -> NDArray[np.float64]:
    return np.array([getattr(sampling, name) for name in _COLUMNS], np.float64)


def _drawn(settings: NDArray[np.float64]) -> NDArray[np.bool_]:
    drawn: NDArray[np.bool_] = settings[:, 0] > 0
    return drawn


def _filtered(settings: NDArray[np.float64]) -> NDArray[np.bool_]:
    filtered: NDArray[np.bool_] = (settings[:, 1] > 0) | (settings[:, 2] < 1) | (settings[:, 3] > 0)
    return filtered


def _penalised(settings: NDArray[np.float64]) -> NDArray[np.bool_]:
    penalised: NDArray[np.bool_] = (settings[:, 4:] != (1.0, 0.0, 0.0)).any(1)
    return penalised


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a list or array on a device, without waiting for what runs there."""
    tensor = torch.as_tensor(values, dtype=dtype, device="cpu")
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
