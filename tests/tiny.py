"""Tiny random models: float32, deterministic and offline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

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

_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_COMMON, num_key_value_heads=2),
    "mistral": lambda: transformers.MistralConfig(**_COMMON, num_key_value_heads=2, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**_COMMON, num_key_value_heads=4),
    "qwen3": lambda: transformers.Qwen3Config(**_COMMON, num_key_value_heads=1, head_dim=16),
    "phi3": lambda: transformers.Phi3Config(**_COMMON, num_key_value_heads=2),
}

MODELS = tuple(_CONFIGS)


def build(name: str) -> PreTrainedModel:
    """Random model of an architecture in `MODELS`, equal weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(MODELS.index(name))
        model = AutoModelForCausalLM.from_config(_CONFIGS[name](), dtype=torch.float32).eval()
    model.generation_config.pad_token_id = 0
    return model


@cache
def tiny(name: str) -> PreTrainedModel:
    """The one shared model of an architecture; tests leave it as they found it."""
    return build(name)


def cache_keyword(model: PreTrainedModel) -> str:
    """Name under which `model.forward` and `generate` take a cache: it changed between transformers releases."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
