"""The classes to look at, and what the rules of `shrink.py` do not know about some of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MULTIMODAL = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")


@dataclass(frozen=True)
class Case:
    """One class with one configuration: `name` as in the table, `kind` the class."""

    name: str
    kind: str
    overrides: dict[str, Any]
    multimodal: bool

    @property
    def key(self) -> str:
        """Its name in the record."""
        return f"{self.name}/{self.kind}"

    @property
    def config(self) -> Any:
        """Class of its configuration; its modules are imported now and not before."""
        return (
            getattr(getattr(transformers, self.kind), "config_class", None) or CONFIG_MAPPING[self.name.split("#")[0]]
        )


def cases() -> Iterator[Case]:
    """Every language model class of the installed transformers, its variants after it."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    listed = [(name, kind, False) for name, kind in causal.items()]
    for mapping in MULTIMODAL:
        listed += [(n, k, True) for n, k in getattr(modeling_auto, mapping, {}).items() if (n, k, False) not in listed]
    seen = set()
    for name, kind, multimodal in listed:
        if (name, kind) in seen:
            continue
        seen.add((name, kind))
        yield Case(name, kind, OVERRIDES.get(name, {}), multimodal)
        for variant, overrides in VARIANTS.get(name, {}).items():
            yield Case(f"{name}#{variant}", kind, OVERRIDES.get(name, {}) | overrides, multimodal)


_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_HALF_SECTIONS = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]
    }
}  # fmt: skip
_BY_TYPE = {
    "full_attention": None,
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
_TYPES = ["sliding_attention", "full_attention"] * 2
_GEMMA4 = {
    "layer_types": _TYPES,
    "num_kv_shared_layers": 0,
    "per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}},
}
_GEMMA4_HEADS = {i: {"head_dim": 16, "num_key_value_heads": 1} for i in (1, 3)}

# Their linear attention takes seconds in plain torch.
_TWO = {
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _TWO,
    "kimi_linear": _TWO,
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 4, "mamba_d_head": 32},
    "blenderbot": {"encoder_layers": 4},
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass": {"text_config": {"rope_parameters": _BY_TYPE}},
    "cohere_compass_text": {"rope_parameters": _BY_TYPE},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "dory": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "n_input_layers": 1,
             "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6, "<|visual token 000000|>": 7}},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32},
    "gemma3n_text": {"layer_types": _TYPES, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "glm46v": {"text_config": _HALF_SECTIONS},
    "glm4v": {"text_config": _HALF_SECTIONS},
    "glm4v_moe": {"text_config": _HALF_SECTIONS},
    "glm_ocr": {"text_config": _SECTIONS},
    "glmga": {"text_config": _HALF_SECTIONS},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 32
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 4, "H_cycles": 2, "L_cycles": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "paddleocr_vl": {"text_config": _SECTIONS},
    "qwen2_5_omni_thinker": {"text_config": _SECTIONS, "vision_start_token_id": 7, "vision_end_token_id": 8},
    "qwen2_5_vl": {"text_config": _SECTIONS},
    "qwen2_vl": {"text_config": _SECTIONS},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
        "indexer_compress_ratio": 4, "hc_lowrank": 8, "ngram_vocab_size_base": 64, "split_ngram_parts": 4,
    },
    "reformer": {"is_decoder": True},
    "rwkv": {"attention_hidden_size": 64, "intermediate_size": 96},
    "xlm": {"emb_dim": 64, "n_words": 128},
    "xlnet": {"d_head": 16},
    "xlstm": {"embedding_dim": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128,
              "attention_head_dim": 32, "mamba_dt_rank": 8},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "intermediate_size": 96,
               "attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 32, "n_mamba_heads": 4,
               "hybrid_layer_ids": [1, 3]},
}  # fmt: skip

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "bert": {"is_decoder=False": {"is_decoder": False}},
    "gemma4": {"images": {"text_config": _GEMMA4 | {"use_bidirectional_attention": "vision"}}},
    "gemma3_text": {"wide_window": {"sliding_window": 200}, "both_ways": {"use_bidirectional_attention": True}},
    "gemma3n_text": {"no_shared": {"num_kv_shared_layers": 0}},
    "gemma4_text": {
        "head_dims": {"per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}}},
        "kv_heads(26B,31B)": {"per_layer_config": _GEMMA4_HEADS, "attention_k_eq_v": True},
        "shared_kv(E2B,E4B)": {"num_kv_shared_layers": 2},
    },
    "granitemoehybrid": {"attention_only(Granite 4 dense)": {"layer_types": ["full_attention"] * 4}},
    "llama": {"dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}},
    "llama4_text": {"chunks": {"layer_types": ["chunked_attention"] * 4}},
    "mistral": {"wide_window": {"sliding_window": 200}},
    "olmo3": {"wide_window": {"sliding_window": 200}},
    "phi3": {"longrope": {"rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256,
        "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    }}},
    "qwen2": {"sliding": {"use_sliding_window": True, "sliding_window": 10, "layer_types": _TYPES}},
}  # fmt: skip

INPUTS: dict[str, dict[str, Any]] = {
    "kosmos-2": {"image_embeds": (1, 4, 64), "image_embeds_position_mask": (0,)},
}
"""Shapes of what a class asks for besides token ids."""
