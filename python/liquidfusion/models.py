"""Which models a KVCache can serve, decided from the configuration before any work."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel

from liquidfusion.exceptions import UnsupportedError

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def text_config(model: PreTrainedModel) -> Any:
    """Configuration of the decoder that the cache serves."""
    return model.config.get_text_config(decoder=True)


def windows(model: PreTrainedModel) -> list[int]:
    """Sliding window of every attention layer in tokens, 0 for none."""
    config = text_config(model)
    window = getattr(config, "sliding_window", None) or 0
    types = getattr(config, "layer_types", None)
    if types is None:
        return [window] * int(config.num_hidden_layers)
    return [window if kind == "sliding_attention" else 0 for kind in types]


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Where each attention layer's weights are, and so its slots; the model's own device where that is unknown."""
    devices = [model.device] * int(text_config(model).num_hidden_layers)
    for module in model.modules():
        # Quantised layers may keep everything in buffers.
        weight = next(chain(module.parameters(), module.buffers()), None)
        index = getattr(module, "layer_idx", None)
        if index is not None and weight is not None and weight.device.type != "meta":
            devices[index] = weight.device
    return devices


def check(model: PreTrainedModel) -> None:
    """Refuse a model whose attention does not go through transformers' attention interface.

    Raises
    ------
    UnsupportedError
        Names the architecture and what stands in the way.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"model is a {type(model).__name__}; a transformers causal language model is accepted")
    config, name = text_config(model), type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedError(f"{name} is an encoder-decoder model; decoder-only language models are accepted")
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedError(f"{name} has cross-attention; decoder-only language models are accepted")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedError(
            f"{name} uses multi-head latent attention (MLA), whose cache has no per-head keys to evict"
        )
    if getattr(config, "alibi", False) or not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedError(
            f"{name} computes attention outside transformers' attention interface (as Falcon, MPT and BLOOM do), "
            "so its keys and probabilities cannot be reached"
        )
    other = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if other:
        raise UnsupportedError(
            f"{name} has layers of type {sorted(other)}; only {sorted(_ATTENTION_LAYERS)} are accepted"
        )
    if not hasattr(config, "num_attention_heads"):
        raise UnsupportedError(f"{name} has no num_attention_heads in its configuration: it has no attention to bound")
