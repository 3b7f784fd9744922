"""Feeding tokens to a model with a cache, and decoding from it, with the clock running."""

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from liquidfusion import cache_keyword
from liquidfusion.bench.caches import ranked
from liquidfusion.bench.machine import synchronize
from liquidfusion.bench.notices import notice
from liquidfusion.exceptions import LiquidFusionError


class Stream:
    """One batch of sequences being fed to a model, call by call, into one cache.

    Parameters
    ----------
    model
        A causal language model.
    cache
        A fresh cache.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache) -> None:
        self._model = model
        self._cache = {cache_keyword(model): cache}
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._mask: Tensor | None = None
        self._columns = 0
        self._known = None if ranked(cache) else known_positions(model.config)
        self._logits: Tensor | None = None

    @torch.inference_mode()
    def feed(self, ids: Tensor, mask: Tensor | None = None, *, last: bool = False) -> Tensor:
        """Feed the next columns and return their logits.

        Parameters
        ----------
        ids
            Token ids, int64 ``[batch, columns]``.
        mask
            1 for a real token and 0 for padding, ``[batch, columns]``; None: no padding.
        last
            Compute the logits of the last column only, where the model can.

        Returns
        -------
        Tensor
            Logits ``[batch, columns, vocabulary]``, or ``[batch, 1, vocabulary]`` with `last`.
        """
        extra: dict[str, Any] = {"logits_to_keep": 1} if last and self._keeps_logits else {}
        if mask is not None or self._mask is not None:
            batch, columns = ids.shape
            old = self._mask if self._mask is not None else ids.new_ones(batch, self._columns)
            self._mask = torch.cat((old, ids.new_ones(batch, columns) if mask is None else mask), 1)
            positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -columns:]
            extra |= {"attention_mask": self._mask, "position_ids": positions}
        self._columns += ids.shape[1]
        if self._known is not None and self._columns > self._known:
            self._tell_positions(self._known)
        logits: Tensor = self._model(ids, use_cache=True, **self._cache, **extra).logits
        return logits[:, -1:] if last else logits

    def _tell_positions(self, known: int) -> None:
        """Tell, once, of a text that runs past the model's positions."""
        tokens = self._columns if self._mask is None else int(self._mask.sum(1).max())
        if tokens > known:
            self._known = None
            notice(
                f"the text has {tokens:,} tokens or more, the model was made for {known:,} positions: what comes after "
                "says little about the cache (--positions auto counts ranks among the kept tokens instead)"
            )

    def feed_chunks(self, ids: Tensor, mask: Tensor | None = None, *, chunk: int | None = None) -> Tensor:
        """Feed a prompt, `chunk` columns a call (None: all at once), and return the last column's logits."""
        size = chunk or ids.shape[1]
        logits = None
        for start in range(0, ids.shape[1], size):
            part = slice(start, start + size)
            logits = self.feed(ids[:, part], None if mask is None else mask[:, part], last=True)
        if logits is None:
            raise ValueError("there is no token to feed")
        return logits

    @torch.inference_mode()
    def score(self, ids: Tensor) -> Tensor:
        """Feed the next columns and return how badly each was predicted by what came before.

        Parameters
        ----------
        ids
            Token ids, int64 ``[batch, columns]``.

        Returns
        -------
        Tensor
            Negative log-likelihoods, float32 ``[batch, columns]``; one column less in the first call, since nothing
            predicts the first token.
        """
        logits = self.feed(ids).float()
        losses = []
        if self._logits is not None:
            losses.append(F.cross_entropy(self._logits, ids[:, 0], reduction="none")[:, None])
        if ids.shape[1] > 1:
            losses.append(F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"))
        self._logits = logits[:, -1]
        return torch.cat(losses, 1) if losses else logits.new_empty(ids.shape[0], 0)


def known_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions that a model was made for; None: its configuration does not say."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


@dataclass(slots=True)
class Completion:
    """What one row of a batch wrote.

    Attributes
    ----------
    tokens
        The ids chosen, the end-of-text token excluded.
    text
        Their text, cut before a stop string.
    logprobs
        Natural-log probability of each token at temperature 1.
    top
        For each step the likeliest tokens and their log-probabilities.
    finish_reason
        ``"stop"`` (the model or a stop string ended it) or ``"length"``.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str = "length"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that a batch took: until the first token, and between each token and the next."""

    first: float
    steps: list[float]
    total: float


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return ids and mask, both int64 ``[batch, longest]``; the mask is None when nothing is padded."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    if all(len(row) == longest for row in rows):
        return ids, None
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text without any special token around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def prefix(tokenizer: Any) -> list[int]:
    """Return the ids that this tokenizer puts before every text: one beginning-of-text token, or none."""
    begin = getattr(tokenizer, "bos_token_id", None)
    return [begin] if begin is not None and tokenizer("a").input_ids[:1] == [begin] else []


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Return the ids that end a text for this model."""
    found: set[int] = set()
    settings = model.generation_config
    for value in (getattr(settings, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        found.update([value] if isinstance(value, int) else value or [])
    return found


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    cache: Cache,
    *,
    max_tokens: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    chunk: int | None = None,
    stop: Sequence[str] = (),
    top: int = 5,
    on_token: Callable[[], None] | None = None,
) -> tuple[list[Completion], Timing]:
    """Continue each prompt and time every token.

    Parameters
    ----------
    prompts
        Token ids of each row; shorter rows are padded on the left.
    cache
        A fresh cache for the whole batch.
    max_tokens
        Tokens to write at most, at least 1.
    temperature
        0 takes the likeliest token; above, tokens are drawn with `seed`.
    chunk
        Prompt tokens fed in one call; None feeds the whole prompt at once.
    stop
        Strings that end a text and are cut off it.
    top
        How many alternatives to record for each token.
    on_token
        Called after every step.
    """
    device = model.device
    ends = end_tokens(model, tokenizer)
    ids, mask = pad_left(prompts, _pad_token(tokenizer, ends), device)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    rows = [Completion() for _ in prompts]
    open_rows = set(range(len(rows)))
    stream = Stream(model, cache)
    clocks = []
    synchronize(device)
    start = time.perf_counter()
    logits = stream.feed_chunks(ids, mask, chunk=chunk)[:, -1]
    for _ in range(max_tokens):
        logprobs = logits.float().log_softmax(-1)
        chosen = choose(logprobs, temperature, generator)
        record = _record(logprobs, chosen, top)
        clocks.append(time.perf_counter())
        for index in sorted(open_rows):
            if _extend(rows[index], record[index], ends, tokenizer, stop):
                open_rows.discard(index)
        if on_token is not None:
            on_token()
        if not open_rows or len(clocks) == max_tokens:
            break
        logits = stream.feed(chosen[:, None], last=True)[:, -1]
    for row in rows:
        row.text = tokenizer.decode(row.tokens, skip_special_tokens=True)
        cut = min((at for at in map(row.text.find, stop) if at >= 0), default=None)
        row.text = row.text[:cut]
    steps = [after - before for before, after in pairwise(clocks)]
    return rows, Timing(clocks[0] - start, steps, clocks[-1] - start)


def _pad_token(tokenizer: Any, ends: set[int]) -> int:
    pad = getattr(tokenizer, "pad_token_id", None)
    return pad if isinstance(pad, int) else min(ends, default=0)


def choose(logprobs: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Return the next token of each row, int64 ``[batch]``.

    Raises
    ------
    LiquidFusionError
        The probabilities are not numbers, so none can be drawn.
    """
    if temperature == 0:
        return logprobs.argmax(-1)
    # drawn on the CPU, so that a seed means the same on every device
    weights = (logprobs / temperature).softmax(-1).cpu()
    if not bool(weights.isfinite().all()):
        raise LiquidFusionError(
            "the model's logits are not numbers, so no token can be drawn; 0 as temperature goes on"
        )
    return torch.multinomial(weights, 1, generator=generator)[:, 0].to(logprobs.device)


def _record(logprobs: Tensor, chosen: Tensor, top: int) -> list[tuple[int, float, list[tuple[int, float]]]]:
    """Return token, log-probability and alternatives of each row, in one transfer from the device."""
    best = logprobs.topk(min(top, logprobs.shape[-1]), -1)
    packed = torch.cat((logprobs.gather(1, chosen[:, None]), best.values), 1).tolist()
    tokens = torch.cat((chosen[:, None], best.indices), 1).tolist()
    return [
        (token[0], value[0], list(zip(token[1:], value[1:], strict=True)))
        for token, value in zip(tokens, packed, strict=True)
    ]


def _extend(
    row: Completion,
    step: tuple[int, float, list[tuple[int, float]]],
    ends: set[int],
    tokenizer: Any,
    stop: Sequence[str],
) -> bool:
    """Add a step to a row; return whether the row has ended."""
    token, logprob, top = step
    if token in ends:
        row.finish_reason = "stop"
        return True
    row.tokens.append(token)
    row.logprobs.append(logprob)
    row.top.append(top)
    if stop and any(text in tokenizer.decode(row.tokens[-16:]) for text in stop):
        row.finish_reason = "stop"
        return True
    return False
