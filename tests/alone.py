"""One request alone, the plain way: a cache of its own, chunk after chunk, transformers' processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import liquidfusion as lf
from liquidfusion.run.drawing import uniform
from liquidfusion.run.sampling import Sampling
from tiny import cache_keyword


def scores_of(sampling: Sampling, prompt: Sequence[int], answer: Sequence[int], logits: Tensor) -> Tensor:
    """One row's scores by transformers' own processors in the order of `generate`; the two penalties by their words."""
    processors: list[Any] = []
    if sampling.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(k,): float(v) for k, v in sampling.logit_bias.items()}))
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    ids = torch.tensor([[*prompt, *answer]])
    scores = LogitsProcessorList(processors)(ids, logits[None].clone())[0]
    for token in set(answer):
        scores[token] -= sampling.frequency_penalty * answer.count(token) + sampling.presence_penalty
    if not sampling.temperature:
        return scores
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return LogitsProcessorList(warpers)(ids, scores[None])[0]


def choose(sampling: Sampling, prompt: Sequence[int], answer: Sequence[int], logits: Tensor, seed: int) -> int:
    """The next token of an answer: the one whose share of the distribution function holds the noise of its step."""
    scores = scores_of(sampling, prompt, answer, logits)
    if not sampling.temperature:
        return int(scores.argmax())
    noise = uniform(np.array([seed % 2**64], np.uint64), np.array([len(answer)], np.uint64))
    upto = scores.double().softmax(-1).cumsum(-1)
    return int((upto > float(noise[0]) * upto[-1]).nonzero()[0])


class Alone:
    """A request with a cache of its own.

    `tokens`: of its answer so far. `cache`: what it keeps.
    """

    def __init__(self, model: PreTrainedModel, chunk: int, sampling: Sampling, seed: int, **options: Any) -> None:
        self.model, self.chunk, self.sampling, self.seed = model, chunk, sampling, seed
        self.cache = lf.KVCache(model, **options)
        self.read = 0
        self.tokens: list[int] = []

    def run(self, prompt: Sequence[int], ends: Sequence[int] = ()) -> list[int]:
        """Read what is new of a prompt and answer it."""
        self.tokens = []
        while self.read < len(prompt):
            logits = self._feed(prompt[self.read : self.read + self.chunk])
        while True:
            self.tokens.append(choose(self.sampling, prompt, self.tokens, logits, self.seed))
            if self.tokens[-1] in ends or len(self.tokens) == self.sampling.max_tokens:
                return self.tokens
            logits = self._feed(self.tokens[-1:])

    def kept(self) -> list[Tensor]:
        """Positions that each layer keeps, sorted."""
        return [self.cache.positions(layer)[0].sort(-1).values for layer in range(len(self.cache))]

    def _feed(self, ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            position_ids = torch.arange(self.read, self.read + len(ids))[None]
            output = self.model(
                torch.tensor([list(ids)]), position_ids=position_ids, **{cache_keyword(self.model): self.cache}
            )
        self.read += len(ids)
        return output.logits[0, -1]
