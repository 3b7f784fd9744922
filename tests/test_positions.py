"""Positions relative to the cache: against transformers' own rotation of the tokens that are left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

import liquidfusion as lf
from liquidfusion.compute import softmax
from tiny import ALL_MODELS, VOCABULARY, cache_keyword, cached, clear_steps, feed, padded, prompt_then_greedy, tiny

LIMIT = 128
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}
ROTARY = tuple(name for name in ALL_MODELS if name not in ("opt", "gpt2"))


def llama(rope: str, layers: int = 2, **more: Any) -> PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LIMIT, initializer_range=0.25, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, tie_word_embeddings=False, rope_parameters={"rope_theta": 10000.0, **ROPES[rope]}, **more,
    )  # fmt: skip
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Queries and keys as they attend, call by call and layer by layer."""
    seen: list[tuple[Tensor, Tensor]] = []
    original = softmax.attend

    def watched(query: Tensor, keys: Tensor, *rest: Any) -> Tensor:
        seen.append((query, keys))
        return original(query, keys, *rest)

    monkeypatch.setattr(softmax, "attend", watched)
    return seen


@pytest.mark.parametrize("steps", [40, 300])
@pytest.mark.parametrize("rope", ROPES)
def test_rerotated_keys_equal_prune_then_rotate(rope: str, steps: int, attended: list[tuple[Tensor, Tensor]]) -> None:
    """Layer 0 depends on tokens alone: its kept keys, made anew and rotated by transformers to 0, 1, 2, ..."""
    model = llama(rope)
    ids, mask = padded((30, 21))
    kv = lf.KVCache(model, "liquid_fusion", 24, positions="cache")
    known = ids
    for _, known in prompt_then_greedy(model, kv, ids, mask, (20, 10), steps):  # noqa: B007 - the last is used below
        pass
    (query, keys), layer = attended[-2], model.model.layers[0]
    with torch.no_grad():
        hidden = layer.input_layernorm(model.model.embed_tokens(known))
        raw_keys = layer.self_attn.k_proj(hidden).view(2, -1, 2, 8).transpose(1, 2)
        raw_queries = layer.self_attn.q_proj(hidden[:, -1:]).view(2, 1, 4, 8).transpose(1, 2)
    for row, padding in enumerate((0, 9)):
        for head in range(2):
            held = kv.positions(0)[row, head]
            assert (held >= 0).all()
            order = held.argsort()
            pruned = raw_keys[row, head, held[order].long() + padding][None, None]
            cos, sin = model.model.rotary_emb(pruned[0], torch.arange(24)[None])
            newest = raw_queries[row : row + 1, 2 * head : 2 * head + 2]
            _, rotated = modeling_llama.apply_rotary_pos_emb(pruned, pruned, cos, sin)
            own, _ = modeling_llama.apply_rotary_pos_emb(newest, newest, cos[:, -1:], sin[:, -1:])
            torch.testing.assert_close(keys[row, head, order], rotated[0, 0], rtol=0, atol=1e-5)
            torch.testing.assert_close(query[row, 2 * head : 2 * head + 2], own[0], rtol=0, atol=1e-5)


def test_a_part_of_the_head_is_rotated(attended: list[tuple[Tensor, Tensor]]) -> None:
    """GPT-NeoX: the rest of each key stays as it is."""
    model = tiny("gpt_neox")
    kv = lf.KVCache(model, "streaming", 16, positions="cache")
    ids, mask = padded((40, 40))
    list(feed(model, kv, ids, mask, (39, 1)))
    keys, raw = attended[-2][1], kv.keys_values(0)[0]
    order = kv.positions(0).argsort(-1).argsort(-1)
    cos, sin = model.gpt_neox.rotary_emb(raw, torch.arange(16)[None])
    assert cos.shape[-1] < raw.shape[-1]
    for row in range(2):
        for head in range(raw.shape[1]):
            stored = raw[row, head][None, None]
            at = order[row, head]
            _, rotated = modeling_gpt_neox.apply_rotary_pos_emb(stored, stored, cos[:, at], sin[:, at])
            torch.testing.assert_close(keys[row, head], rotated[0, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("splits", [(40,), (20, 1, 12, 7)])
@pytest.mark.parametrize("rope", ROPES)
def test_one_layer_is_the_model_on_the_tokens_that_are_left(rope: str, splits: tuple[int, ...]) -> None:
    """With one layer nothing else remains of an evicted token: transformers gives the logits of the kept ones."""
    model = llama(rope, layers=1)
    ids, mask = padded((40,))
    kv = lf.KVCache(model, "streaming", 24, positions="cache")
    held: list[int] = []
    widths = [*splits, *[1] * 200]
    for width, (logits, known) in zip(widths, prompt_then_greedy(model, kv, ids, mask, splits, 200), strict=True):
        seen = kv.get_seq_length()
        after = sorted(p for p in kv.positions(0)[0, 0].tolist() if p >= 0)
        # A chunk attends to what was there before it; a decode step to what is there now.
        visible = after if width == 1 else [*held, *range(seen - width, seen)]
        with torch.no_grad():
            expected = model(known[:, visible], use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits[0], expected, rtol=1e-3, atol=1e-3)
        held = after
    assert seen > LIMIT


@pytest.mark.parametrize("positions", ["cache", "auto"])
@pytest.mark.parametrize("name", ROTARY)
def test_below_the_budget_nothing_changes(name: str, positions: str) -> None:
    """Ranks are positions while every token is kept: transformers' own tokens, padded and in chunks."""
    model = tiny(name)
    ids, mask = padded((17, 9))
    options = {"max_new_tokens": 20, "do_sample": False, "attention_mask": mask}
    out = model.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
    certain = [clear_steps(row) for row in torch.stack(out.logits, 1)]
    for size in (None, 5):
        kv = lf.KVCache(model, "liquid_fusion", 40, positions=positions)
        got = model.generate(ids, **options, prefill_chunk_size=size, **{cache_keyword(model): kv})
        for row, steps in enumerate(certain):
            assert got[row, : 17 + steps].tolist() == out.sequences[row, : 17 + steps].tolist()


@pytest.mark.parametrize("strategy", ["streaming", "liquid_fusion"])
def test_auto_is_absolute_up_to_the_limit_and_relative_past_it(
    strategy: str, attended: list[tuple[Tensor, Tensor]]
) -> None:
    """Up to the model's last position as `absolute`; afterwards keys stand at their ranks. Each row for itself."""
    model = llama("default")
    ids, mask = padded((60, 20))
    # How distinct keys are is told of keys as they are stored, which are not rotated under `auto`.
    kvs = [cached(model, strategy, 24, positions=where, distinct_ratio=0.0) for where in ("auto", "absolute")]
    for kv in kvs:
        attended.clear()
        logits = [step.clone() for step, _ in prompt_then_greedy(model, kv, ids, mask, (60,), 100)]
        if kv is kvs[0]:
            own, (_, keys) = logits, attended[-2]
    # Row 0 has 60 tokens after the prompt, row 1 has 20: 68 steps later row 0 is at the limit, row 1 never.
    for step, (one, other) in enumerate(zip(own, logits, strict=True)):
        if step <= LIMIT - 60:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        else:
            assert not torch.allclose(one[0], other[0], atol=1e-3)
            break
    raw = kvs[0].keys_values(0)[0]
    for row, places in ((0, kvs[0].positions(0)[0].argsort(-1).argsort(-1)), (1, kvs[0].positions(0)[1])):
        for head in range(2):
            cos, sin = model.model.rotary_emb(raw, places[head][None].long())
            stored = raw[row : row + 1, head][None]
            _, rotated = modeling_llama.apply_rotary_pos_emb(stored, stored, cos, sin)
            torch.testing.assert_close(keys[row, head], rotated[0, 0], rtol=0, atol=1e-5)


def test_a_row_without_a_new_token_and_rows_of_one() -> None:
    """Calls that mix padding, one token and many treat each row as if alone."""
    model = llama("llama3")
    ids, mask = padded((30, 12))
    splits = (10, 8, 1, 11)
    kv = lf.KVCache(model, "h2o", 16, positions="cache")
    together = list(feed(model, kv, ids, mask, splits))
    single = lf.KVCache(model, "h2o", 16, positions="cache")
    alone = list(feed(model, single, ids[1:, 18:], mask[1:, 18:], (1, 11)))
    torch.testing.assert_close(together[-1][1], alone[-1][0], rtol=1e-3, atol=1e-3)


def test_a_session_keeps_its_positions(tmp_path: Any) -> None:
    model = llama("yarn")
    kv = lf.KVCache(model, "liquid_fusion", 24, positions="cache")
    ids, mask = padded((40,))
    *_, (logits, known) = prompt_then_greedy(model, kv, ids, mask, (40,), 110)
    kv.save(tmp_path / "talk")
    token = logits.argmax(-1)[:, None]
    with torch.no_grad():
        expected = model(token, **{cache_keyword(model): kv.copy()}).logits
        got = model(token, **{cache_keyword(model): lf.KVCache.load(tmp_path / "talk", model)}).logits
    assert torch.equal(got, expected)
    assert known.shape[1] > LIMIT


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_learned_positions_are_refused(name: str) -> None:
    with pytest.raises(lf.UnsupportedError, match=r"rotary positions; .*(OPT|GPT2)"):
        lf.KVCache(tiny(name), "h2o", 24, positions="cache")


def test_queries_that_change_with_their_position_in_other_ways_are_refused() -> None:
    """Ministral 3 makes them longer beyond the positions that it learnt first."""
    rope = {"rope_theta": 10000.0, **ROPES["yarn"], "llama_4_scaling_beta": 0.5}
    config = transformers.Ministral3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=LIMIT, rope_parameters=rope,
    )  # fmt: skip
    model = transformers.Ministral3ForCausalLM(config).eval()
    with pytest.raises(lf.UnsupportedError, match="does not rotate the queries of layer 0"):
        lf.KVCache(model, "streaming", 24, positions="auto")


def test_what_positions_may_be() -> None:
    with pytest.raises(lf.ConfigError, match=r"'relative'.*'absolute', 'cache', 'auto'"):
        lf.KVCache(tiny("llama"), "h2o", 24, positions="relative")
    with pytest.raises(lf.ConfigError, match="knows 128 positions"):
        lf.KVCache(llama("default"), "h2o", 200, positions="cache")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    )  # fmt: skip
    with pytest.raises(lf.UnsupportedError, match="'dynamic'"):
        lf.KVCache(transformers.LlamaForCausalLM(config).eval(), "h2o", 24, positions="cache")
    config = transformers.CohereConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(lf.UnsupportedError, match=r"Cohere.*halves"):
        lf.KVCache(transformers.CohereForCausalLM(config).eval(), "h2o", 24, positions="cache")
