"""A small model of any class: its default configuration with every size cut down, and random weights."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
LAYERS = 4
LARGEST = 120_000_000
"""Parameters of a model that counts as small."""

# Sizes by the name of the entry, the first pattern that fits; None keeps the default.
_SIZES: tuple[tuple[str, Any], ...] = (
    (r"(text_|audio_|speech_)?vocab_size(_per_layer_input)?|codebook_size|speech_vocab_size", VOCABULARY),
    (r"ngram_vocab_size|n_vocab|vocab_size_per_layer_input|unpadded_vocab_size", VOCABULARY),
    (r"hidden_size_per_layer_input|per_layer_.*dim", 8),
    (r"(decoder_)?(word_embed_proj_dim|hidden_size|hidden_dim|d_model|n_embd|n_embed|embed_dim|dim|width)", 64),
    (r"(output_dim|out_dim|out_hidden_size|projection_dim|lm_hidden_size|text_hidden_size|proj_dim)", 64),
    (r"(mm_hidden_size|projector_hidden_size|input_dim|audio_hidden_size|vision_hidden_size)", 64),
    (r"moe_intermediate_size|shared_expert_intermediate_size|expert_ffn_hidden_size|moe_.*intermediate.*", 32),
    (r".*intermediate_size.*|(.*_)?ffn_dim|d_ff|n_inner|ffn_hidden_size|ffn_hidden_dim|dim_ff|mlp_hidden_size", 96),
    (r"num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|depth|num_blocks|n_layer|layers", LAYERS),
    (r"layers_block_type|depths", None),
    (r"num_attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads|attention_heads|num_head", 4),
    (r"(global_|full_|swa_)?(attention_)?head_dim|head_size|kv_channels|d_kv|v_head_dim|qk_nope_head_dim|d_head", 16),
    (r"qk_head_dim", 24),
    (r"qk_rope_head_dim", 8),
    (r"(kv|q|o)_lora_rank", 24),
    (r"index_head_dim", 16),
    (r"index_n_heads|index_num_heads", 2),
    (r"index_topk|index_top_k", 8),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts|num_moe_experts)", 4),
    (r"num_experts_per_tok|moe_top_?k|top_k_experts|moe_k|experts_per_token|num_experts_per_token|topk", 2),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|num_zero_experts|zero_expert_num", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|first_dense_layers", 1),
    (r"mamba_d_state|ssm_state_size|state_size|mamba_state_dim", 16),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads|num_mamba_heads", 4),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 32),
    (r"mamba_d_ssm", 128),
    (r"mamba_n_groups|n_groups|mamba_ngroups", 1),
    (r"mamba_chunk_size|chunk_size", 8),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"linear_(key|value)_head_dim", 16),
    (r"lru_width", 64),
    (r"time_step_rank|mamba_dt_rank|dt_rank", 8),
    (r"sliding_window|attention_window_size|sliding_window_size|window_size_left", 10),
    (r"attention_chunk_size", 12),
    (r"image_size|img_size|input_size", 32),
    (r"patch_size", 8),
    (r"max_position_embeddings|n_positions|max_sequence_length|max_seq_len|n_ctx|max_source_positions|"
     r"max_target_positions|max_seq_length", 512),
    (r"adapter_.*rank|lora_rank|.*_rank", 8),
)  # fmt: skip

_TOKENS = re.compile(r".*(_token_id|_token_index|_token_idx|_id|_index)$")


def small(kind: type[PreTrainedConfig], overrides: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A small configuration of a class.

    Parameters
    ----------
    kind : type
        The configuration's class.
    overrides : dict, optional
        Entries to set afterwards; a dict for a part of it.
    """
    entries = _shrunk(kind().to_dict())
    if entries.get("is_decoder") is False and not entries.get("is_encoder_decoder"):
        entries["is_decoder"] = True  # encoders whose class can also be a decoder
    _override(entries, overrides or {})
    return kind.from_dict(entries)


def build(
    kind: type[PreTrainedModel], config: PreTrainedConfig, implementation: str | None = "eager"
) -> PreTrainedModel:
    """A model in evaluation mode whose weights are wide enough for its best tokens to vary, equal every time.

    Raises
    ------
    ValueError
        It has more than `LARGEST` parameters.
    """
    if implementation is not None:
        config._attn_implementation = implementation
    with torch.device("meta"):
        count = sum(weight.numel() for weight in kind(copy.deepcopy(config)).parameters())
    if count > LARGEST:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(0)
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and weight.is_floating_point():
                scale = 1.0 if "embed" in name else 1.2 / weight.shape[-1] ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            elif weight.is_floating_point():  # what begins as zeros or ones would hide what it does
                weight.add_(torch.randn(weight.shape, generator=generator) * (1.0 if "sink" in name else 0.2))
    return model.float()


def _shrunk(entries: dict[str, Any]) -> dict[str, Any]:
    """Entries of a configuration and of every part of it, smaller."""
    layers = next((entries[name] for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
                   if isinstance(entries.get(name), int)), None)  # fmt: skip
    chosen = _chosen(entries, layers)
    heads = next((entries[n] for n in ("num_attention_heads", "n_head", "num_heads") if entries.get(n)), 0)
    small: dict[str, Any] = {}
    for key, value in entries.items():
        name = str(key)
        if name == "per_layer_config" and isinstance(value, dict):
            kept = chosen or range(layers or 0)
            small[name] = {new: _shrunk(value[old]) for new, old in enumerate(kept) if old in value}
        elif name == "head_dim" and value and value == entries.get("qk_rope_head_dim"):
            small[name] = 8
        elif isinstance(value, dict):
            small[name] = _rope(value) if name.startswith("rope") else _shrunk(value)
        elif isinstance(value, list | tuple) and chosen and len(value) == layers:
            small[name] = [value[i] for i in chosen]
        elif isinstance(value, list) and name == "mrope_section":
            small[name] = [2, 3, 3]
        elif name in ("num_key_value_heads", "num_global_key_value_heads", "swa_num_key_value_heads") and value:
            small[name] = 4 if value == heads else 2
        elif isinstance(value, bool) or value is None or isinstance(value, str | float):
            small[name] = value
        elif isinstance(value, int):
            small[name] = _size(name, value)
        else:
            small[name] = value
    return small


def _size(name: str, value: int) -> int:
    if _TOKENS.fullmatch(name):
        return value if value < VOCABULARY else 3 + value % 13  # special tokens, apart from one another
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            return value if size is None else min(value, size)
    return value


def _rope(entries: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [2, 3, 3] if name == "mrope_section" else _rope(value) if isinstance(value, dict) else value
        for name, value in entries.items()
    }


def _chosen(entries: dict[str, Any], layers: int | None) -> list[int] | None:
    """Layers that stay: the first of every kind, then the first ones."""
    if not layers or layers <= LAYERS:
        return None
    kinds = entries.get("layer_types") or entries.get("layers_block_type") or []
    if len(kinds) != layers:
        return list(range(LAYERS))
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[:LAYERS]
    rest = [i for i in range(layers) if i not in first]
    return sorted(first + rest[: LAYERS - len(first)])


def _override(entries: dict[str, Any], overrides: dict[str, Any]) -> None:
    for name, value in overrides.items():
        if isinstance(value, dict) and isinstance(entries.get(name), dict):
            _override(entries[name], value)
        else:
            entries[name] = value
