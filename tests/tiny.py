"""Tiny random models: float32, deterministic and offline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import liquidfusion as lf
from liquidfusion.options import PARAMETERS

VOCABULARY = 96

# Weights this wide make attention peaked and the best logits far apart, so greedy tokens are well defined.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}

# The window is wider than the small budgets of the tests and narrower than the large ones: both ways are taken.
_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_COMMON, num_key_value_heads=2),
    "mistral": lambda: transformers.MistralConfig(**_COMMON, num_key_value_heads=2, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**_COMMON, num_key_value_heads=4),
    "qwen3": lambda: transformers.Qwen3Config(**_COMMON, num_key_value_heads=1, head_dim=16),
    "phi3": lambda: transformers.Phi3Config(**_COMMON, num_key_value_heads=2),
    "mistral with a window": lambda: transformers.MistralConfig(**_COMMON, num_key_value_heads=2, sliding_window=32),
}

MODELS = tuple(_CONFIGS)

_LEARNED = {k: v for k, v in _COMMON.items() if k not in ("initializer_range", "intermediate_size")}
_GEMMA = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3, "sliding_window": 10}
_GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

_CONFIGS |= {
    "gemma2": lambda: transformers.Gemma2Config(
        **_GEMMA, layer_types=_GEMMA_LAYERS, query_pre_attn_scalar=8, attn_logit_softcapping=4.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GEMMA, layer_types=_GEMMA_LAYERS, query_pre_attn_scalar=8),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_COMMON),
    "opt": lambda: transformers.OPTConfig(
        **_LEARNED, ffn_dim=48, word_embed_proj_dim=32, init_std=0.25, dropout=0.0, do_layer_norm_before=True
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=4096, initializer_range=0.25,
        bos_token_id=1, eos_token_id=None,
    ),
}  # fmt: skip
ALL_MODELS = tuple(_CONFIGS)
"""Those of `MODELS`, and the architectures that need less testing each."""


def build(name: str) -> PreTrainedModel:
    """Random model of an architecture in `ALL_MODELS`, equal weights every time."""
    # Gemma 2 loses its softcap on any other attention of transformers' own.
    options = {"attn_implementation": "eager"} if name.startswith("gemma") else {}
    with torch.random.fork_rng():
        torch.manual_seed(ALL_MODELS.index(name))
        model = AutoModelForCausalLM.from_config(_CONFIGS[name](), dtype=torch.float32, **options).eval()
    model.generation_config.pad_token_id = 0
    return model


@cache
def tiny(name: str) -> PreTrainedModel:
    """The one shared model of an architecture; tests leave it as they found it."""
    return build(name)


@contextmanager
def defaults(default: torch.dtype | torch.device) -> Iterator[None]:
    """Another default dtype or device of torch's for new tensors."""
    if isinstance(default, torch.device):
        with default:
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def cache_keyword(model: PreTrainedModel) -> str:
    """Name under which `model.forward` and `generate` take a cache: it changed between transformers releases."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def cached(model: PreTrainedModel, strategy: str, budget: int | None = None, **options: Any) -> lf.KVCache:
    """A KVCache; of the strategies' parameters among `options` those count that this strategy listens to."""
    listens = next(info["parameters"] for info in lf.strategies() if info["name"] == strategy)
    own = {name: options.pop(name) for name in list(options) if name in PARAMETERS}
    return lf.KVCache(model, lf.Strategy(strategy, **{k: v for k, v in own.items() if k in listens}), budget, **options)


def padded(lengths: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random prompts of the given lengths as one left-padded batch: ids and mask, `[batch, columns]`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, max(lengths) - length :] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        mask[row, max(lengths) - length :] = 1
    return ids, mask


def clear_steps(logits: Tensor) -> int:
    """Steps before the two best of a row's logits `[steps, vocabulary]` come closer than 1e-4: tokens are certain."""
    best = logits.float().topk(2, -1).values
    unclear = (best[:, 0] - best[:, 1] < 1e-4).nonzero()
    return int(unclear[0]) if len(unclear) else len(logits)


def feed(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor, splits: Sequence[int]) -> Iterator[Tensor]:
    """A prompt in calls of `splits` columns; logits of each call's last column `[batch, vocabulary]`."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    start = 0
    for columns in splits:
        end = start + columns
        with torch.no_grad():
            output = model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                **{cache_keyword(model): cache},
            )
        yield output.logits[:, -1]
        start = end


def prompt_then_greedy(
    model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor, splits: Sequence[int], steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """A prompt in calls of `splits` columns, then greedy decoding: after each call its last logits and all the ids."""
    for logits in feed(model, cache, ids, mask, splits):
        yield logits, ids
    for _ in range(steps):
        ids = torch.cat([ids, logits.argmax(-1)[:, None]], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = mask.sum(1, keepdim=True) - 1
        with torch.no_grad():
            output = model(
                input_ids=ids[:, -1:], attention_mask=mask, position_ids=positions, **{cache_keyword(model): cache}
            )
        logits = output.logits[:, -1]
        yield logits, ids
