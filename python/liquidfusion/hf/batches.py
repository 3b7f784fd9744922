"""`model.generate_batch` inside `use`: what transformers' continuous batching returns, through an `Engine`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from liquidfusion.exceptions import ConfigError
from liquidfusion.hf.engine import Engine
from liquidfusion.options import Strategy
from liquidfusion.run.sampling import Sampling

MOST_ROWS = 64
"""Requests that run side by side at most, where the caller does not say."""

# What else a generation configuration may ask for that would change the tokens, with the values that do not.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "stop_strings": (None,),
}


def generate_batch(
    model: PreTrainedModel,
    strategy: str | Strategy,
    budget: int | None,
    options: Mapping[str, Any],
    inputs: Sequence[Sequence[int]],
    generation_config: GenerationConfig | None = None,
    *,
    max_new_tokens: int | None = None,
    record_timestamps: bool = False,
    **ignored: Any,  # noqa: ARG001 - of a paged cache and a progress bar
) -> dict[str, GenerationOutput]:
    """Answer prompts, many at once.

    Parameters
    ----------
    model, strategy, budget, options
        Of the `use` context.
    inputs : sequence of sequences of int
        Token ids of each prompt.
    generation_config : GenerationConfig, optional
        Default: the model's own.
    max_new_tokens : int, optional
        Instead of the configuration's.
    record_timestamps : bool
        Whether each token's time is told.

    Returns
    -------
    dict of str to GenerationOutput
        By request, in the order of the prompts, several answers to one prompt after one another.

    Raises
    ------
    ConfigError
        The configuration asks for what an engine does not do.
    """
    config = model.generation_config if generation_config is None else generation_config
    answers = config.num_return_sequences or 1
    number = len(inputs) * answers
    if not number:
        return {}
    sampling = _sampling(config, max_new_tokens)
    results: dict[str, GenerationOutput] = {}
    ends = config.eos_token_id
    with Engine(
        model, rows=max(answers, min(number, MOST_ROWS)), strategy=strategy, budget=budget, **options
    ) as engine:
        stop = () if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (int(ends),)
        waiting = []
        for prompt in inputs:
            # A draw of torch's own generator: torch.manual_seed repeats the answers.
            seed = int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))
            own = Sampling(**(sampling | {"seed": seed, "stop_token_ids": stop, "ignore_eos": True}))
            waiting.append((list(prompt), time.perf_counter(), engine.submit(prompt, own, n=answers)))
        for index, (prompt, created, requests) in enumerate(waiting):
            for answer, request in enumerate(requests):
                name = f"req_{index}" if answer == len(requests) - 1 else f"req_{index}__child#{answer}"
                ids, times = [], []
                for token in request:
                    ids.append(token.id)
                    times.append(time.perf_counter())
                failed = request.finish_reason == "error"
                results[name] = GenerationOutput(
                    name,
                    prompt_ids=prompt,
                    generated_tokens=ids,
                    error=str(request.error) if failed else None,
                    status=RequestStatus.FAILED if failed else RequestStatus.FINISHED,
                    created_time=created,
                    lifespan=(created, time.perf_counter()),
                    timestamps=times if record_timestamps else None,
                )
    return results


def _sampling(config: GenerationConfig, max_new_tokens: int | None) -> dict[str, Any]:
    """What `Sampling` takes to draw as a generation configuration says."""
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise ConfigError(f"{name}={value!r} is not supported by generate_batch inside liquidfusion.use")
    most = config.max_new_tokens if max_new_tokens is None else max_new_tokens
    given: dict[str, Any] = {"max_tokens": 20 if most is None else most}
    if config.repetition_penalty is not None:
        given["repetition_penalty"] = float(config.repetition_penalty)
    for sequence, bias in _biases(config.sequence_bias):
        if len(sequence) != 1:
            raise ConfigError(f"sequence_bias has {list(sequence)}; single tokens are accepted")
        given.setdefault("logit_bias", {})[sequence[0]] = bias
    if config.do_sample:
        given["temperature"] = 1.0 if config.temperature is None else float(config.temperature)
        given["top_k"] = 50 if config.top_k is None else config.top_k
        given["top_p"] = 1.0 if config.top_p is None else float(config.top_p)
        given["min_p"] = config.min_p or 0.0
    return given


def _biases(told: Any) -> list[tuple[tuple[int, ...], float]]:
    pairs = told.items() if isinstance(told, dict) else told or ()
    return [(tuple(sequence), float(bias)) for sequence, bias in pairs]
