"""What `Geometry.of` reads of a model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import liquidfusion as lf
from liquidfusion.geometry import Geometry, Kind
from tiny import ALL_MODELS, cache_keyword, tiny

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ALL_MODELS)
def test_the_shapes_are_those_that_layers_hand_to_a_cache(name: str) -> None:
    model = tiny(name)
    geometry = Geometry.of(model)
    theirs = transformers.DynamicCache()
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.int64), **{cache_keyword(model): theirs})
    assert [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in geometry.layers] == [
        (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in theirs.layers
    ]
    assert geometry.attention_layers == tuple(range(len(theirs.layers)))
    assert (geometry.vocabulary, geometry.positions) == (96, 4096)
    assert geometry == Geometry.of(model)


def test_windows_and_softcap_are_read_per_layer() -> None:
    geometry = Geometry.of(tiny("gemma2"))
    assert geometry.windows == (10, 0, 10)
    assert [layer.kind for layer in geometry.layers] == [Kind.WINDOW, Kind.FULL, Kind.WINDOW]
    assert geometry.softcap == 4.0
    assert Geometry.of(tiny("mistral with a window")).windows == (32, 32)
    assert Geometry.of(tiny("llama")).windows == (0, 0)


def _bert() -> PreTrainedModel:
    return transformers.BertLMHeadModel(
        transformers.BertConfig(**{**SMALL, "num_key_value_heads": None}, is_decoder=False)
    )


def _doge() -> PreTrainedModel:
    return transformers.DogeForCausalLM(transformers.DogeConfig(**SMALL))


def _gemma3_both_ways() -> PreTrainedModel:
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SMALL, head_dim=8, use_bidirectional_attention=True)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_bert, "BertLMHeadModel attends to later tokens too"),
        (_doge, "DogeForCausalLM adds a learnt term to its attention mask"),
        (_gemma3_both_ways, "Gemma3ForCausalLM attends to later tokens too"),
    ],
)
def test_what_is_not_understood_is_refused_with_the_reason(build: Any, reason: str) -> None:
    with pytest.raises(lf.UnsupportedError, match=f"^{reason}.*DynamicCache"):
        Geometry.of(build())
