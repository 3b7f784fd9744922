"""Kinds of layers and masks beyond plain attention: transformers' own answers while all fits, and what is refused."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import liquidfusion as lf
from classes.families import cases
from classes.probe import load, prompt
from classes.shrink import build as build_small
from classes.shrink import small as shrunk
from liquidfusion.geometry import Geometry, Kind
from liquidfusion.hf.function import _pattern
from tiny import build as tiny_build
from tiny import cache_keyword

pytestmark = pytest.mark.filterwarnings("ignore")

HYBRIDS = ("qwen3_next", "falcon_h1", "lfm2", "nemotron_h")


@cache
def small(name: str) -> PreTrainedModel:
    """The one shared small model of a family."""
    case = next((case for case in cases() if case.name == name), None)
    if case is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return load(case)


def run(model: PreTrainedModel, kv: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits `[rows, columns, vocabulary]` of a call."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, **inputs, **{cache_keyword(model): kv}).logits
    return logits


def close(own: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("name", HYBRIDS)
def test_states_are_part_of_copies_sessions_and_beams(name: str, tmp_path: Path) -> None:
    """Recurrent and convolution states go wherever slots go."""
    model = small(name)
    ids, step = prompt((18, 18, 18))["input_ids"], prompt((1, 1, 1), seed=1)["input_ids"]
    kv = lf.KVCache(model, "liquid_fusion", 12)
    fresh = run(model, kv, ids)
    run(model, kv, step)
    kv.save(tmp_path / "session")
    others = [copy.deepcopy(kv), lf.KVCache.load(tmp_path / "session", model)]
    order = torch.tensor([2, 0, 0])
    permuted = copy.deepcopy(kv)
    permuted.reorder_cache(order)
    expected = run(model, kv, step)
    for other in others:
        assert torch.equal(run(model, other, step), expected)
        assert other.nbytes == kv.nbytes
    close(run(model, permuted, step[order]), expected[order])
    kv.reset()
    assert torch.equal(run(model, kv, ids), fresh)
    kv.reset()
    close(run(model, kv, ids[:2]), fresh[:2])  # another number of rows


def test_a_layer_without_slots_is_named() -> None:
    model = small("qwen3_next")
    kv = lf.KVCache(model, "h2o", 12)
    run(model, kv, prompt((9,))["input_ids"])
    with pytest.raises(lf.CacheError, match=r"layer 0 has no slots .*\[3\]"):
        kv.positions(0)
    assert kv.positions(3).shape[2] == 12


def test_gradients_are_refused() -> None:
    """With labels before any work; otherwise where they would begin to flow. Without gradients a loss is fine."""
    model = small("llama")
    ids = prompt((12,))["input_ids"]
    for strategy in ("streaming", "liquid_fusion"):
        kv = lf.KVCache(model, strategy, 64)
        given = {cache_keyword(model): kv}
        with pytest.raises(lf.UnsupportedError, match=r"labels.*gradients"):
            model(input_ids=ids, labels=ids, **given)
        logits = model(input_ids=ids, **given).logits  # the refusal left the cache as it was
        with pytest.raises(lf.UnsupportedError, match="gradients"):
            logits.sum().backward()
        kv.reset()
        with torch.no_grad():
            assert float(model(input_ids=ids, labels=ids, **given).loss) > 0


@pytest.mark.parametrize("name", ["gemma3", "gemma4#images", "paligemma"])
@pytest.mark.parametrize("strategy", ["streaming", "liquid_fusion"])
def test_image_blocks_and_prefixes_see_all_of_themselves(name: str, strategy: str) -> None:
    """Tokens of an image, or of a prefix, attend to one another in both directions."""
    model = small(name)
    ids = prompt((16,))["input_ids"]
    kinds = torch.zeros_like(ids)
    kinds[:, 3:9] = 1
    told = {"token_type_ids": kinds} | ({"mm_token_type_ids": kinds} if name == "gemma4#images" else {})
    kv, theirs = lf.KVCache(model, strategy, 64), DynamicCache(config=model.config)
    both = [run(model, held, ids, **told) for held in (kv, theirs)]
    close(*both)
    plain = run(model, lf.KVCache(model, strategy, 64), ids, token_type_ids=torch.zeros_like(ids))
    assert (plain - both[0]).abs().max() > 1e-2, "else the blocks made no difference"
    for column in prompt((4,), seed=1)["input_ids"].T:
        later = {"token_type_ids": torch.zeros_like(column[:, None])}
        close(run(model, kv, column[:, None], **later), run(model, theirs, column[:, None], **later))
    bounded = lf.KVCache(model, strategy, 8)
    assert bool(run(model, bounded, ids, **told).isfinite().all())


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("attention_mask", torch.zeros(1, 1, 9, 9), "a mask of its own"),
        ("attention_mask", torch.ones(1, 1, 9, 9, dtype=torch.bool), "a mask of its own"),
        ("position_bias", torch.zeros(1, 4, 9, 9), "learnt bias"),
        ("indices", torch.zeros(1, 9, 4, dtype=torch.int64), "an index of its own"),
        ("attn_bias", torch.zeros(1, 4, 9, 9), r"keyword of its own \(attn_bias\)"),
        ("alibi_slopes", torch.ones(4), r"keyword of its own \(alibi_slopes\)"),
        ("cu_seq_lens_q", torch.tensor([0, 4, 9]), r"keyword of its own \(cu_seq_lens_q\)"),
        ("is_causal", False, "later tokens"),
    ],
)
def test_what_changes_attention_and_is_not_known_is_refused(keyword: str, value: Tensor, reason: str) -> None:
    model = tiny_build("llama")

    def change(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {keyword: value}

    model.model.layers[1].self_attn.register_forward_pre_hook(change, with_kwargs=True)
    with pytest.raises(lf.UnsupportedError, match=reason):
        run(model, lf.KVCache(model, "h2o", 24), torch.ones(1, 9, dtype=torch.int64))


def test_a_keyword_that_a_models_code_gives_to_attention_is_refused_at_construction() -> None:
    """What it does is not known, whatever it is called."""
    model = tiny_build("llama")
    own = type(model.model.layers[1].self_attn)

    class Scaled(own):  # type: ignore[valid-type, misc]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            states = hidden_states[:, None]
            return interface(self, states, states, states, None, dropout=0.0, scaling=1.0, zoom=2.0, **kwargs)

    model.model.layers[1].self_attn.__class__ = Scaled
    with pytest.raises(lf.UnsupportedError, match=r"keyword of its own \(zoom\)"):
        lf.KVCache(model, "h2o", 24)


def test_mask_functions_are_recognised_or_not() -> None:
    """What is recognised says the same as the mask that transformers makes of it."""

    def odd(*index: Any) -> Any:
        return index[3] % 2 == 0

    left = torch.zeros(1, dtype=torch.int64)
    for function, told in (
        (causal_mask_function, ((0, False), False)),
        (sliding_window_causal_mask_function(4), ((4, False), False)),
        (chunked_causal_mask_function(3, left), ((3, True), False)),
        (or_masks(causal_mask_function, odd), ((0, False), True)),
        (or_masks(sliding_window_causal_mask_function(4), odd), ((4, False), True)),
        (and_masks(causal_mask_function, sliding_window_overlay(4)), ((4, False), False)),
        (and_masks(or_masks(causal_mask_function, odd), sliding_window_overlay(4)), ((4, False), True)),
        (and_masks(sliding_window_bidirectional_overlay(4), causal_mask_function), (None, True)),
        (and_masks(sliding_window_overlay(4), sliding_window_causal_mask_function(9)), (None, True)),
        (and_masks(odd, causal_mask_function), (None, True)),
        (and_masks(causal_mask_function, odd), (None, True)),
        (or_masks(odd, causal_mask_function), (None, True)),
        (odd, (None, True)),
    ):
        pattern, rest = _pattern(function)
        assert (pattern, rest) == told
        if pattern is None or rest:
            continue
        size, chunked = pattern
        dense = sdpa_mask(1, 9, 9, mask_function=function, allow_is_causal_skip=False)[0, 0]
        q, k = torch.arange(9)[:, None], torch.arange(9)
        inside = k >= q // size * size if chunked else k > q - (size or 9)
        assert torch.equal(dense, (k <= q) & inside)


def test_a_mask_that_hides_what_is_stored_is_refused_in_decode_steps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of an unknown kind is looked at in every call; one that hides nothing is served."""
    model = small("llama")
    own = sys.modules[type(model).__module__].create_causal_mask
    ids = prompt((9,))["input_ids"]
    for hidden, raises in ((-1, False), (4, True)):
        masked = partial(own, and_mask_function=lambda b, h, q, kv, at=hidden: kv != at)  # noqa: ARG005
        monkeypatch.setattr(sys.modules[type(model).__module__], "create_causal_mask", masked)
        kv, theirs = lf.KVCache(model, "h2o", 24), DynamicCache(config=model.config)
        close(run(model, kv, ids), run(model, theirs, ids))
        if raises:
            with pytest.raises(lf.UnsupportedError, match="hides earlier tokens"):
                run(model, kv, ids[:, :1])
            continue
        close(run(model, kv, ids[:, :1]), run(model, theirs, ids[:, :1]))
        assert kv.copy()._seen.every_call  # and no graph replays its steps


def test_a_mask_that_a_layer_changes_in_place_is_refused() -> None:
    model = small("gemma3")
    ids = prompt((9,))["input_ids"]

    def change(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        kwargs["attention_mask"].logical_not_()

    layers = [module for module in model.modules() if "is_sliding" in vars(module) or "sliding_window" in vars(module)]
    handle = layers[0].register_forward_pre_hook(change, with_kwargs=True)
    try:
        with pytest.raises(lf.UnsupportedError, match="a mask of its own"):
            run(model, lf.KVCache(model, "h2o", 24), ids, token_type_ids=torch.ones_like(ids))
    finally:
        handle.remove()


@pytest.mark.parametrize(("name", "told"), [("qwen2#sliding", True), ("qwen2_moe", False)])
def test_windows_that_only_masks_tell_are_known(name: str, told: bool) -> None:
    """A step that is replayed has no masks."""
    case = next(case for case in cases() if case.name == name)
    kind = getattr(transformers, case.kind)
    windows = {"use_sliding_window": True, "sliding_window": 10, "layer_types": ["sliding_attention"] * 4}
    model = build_small(kind, shrunk(case.config, case.overrides | windows))
    geometry = Geometry.of(model)
    assert geometry.windows == (10,) * 4
    assert {layer.told for layer in geometry.layers} == {told}
    assert geometry.untold == (frozenset() if told else {(10, False)})


def test_a_row_without_a_token_does_not_spoil_the_others() -> None:
    """A batch of which one text is empty: the others are answered as they are alone."""
    model = small("llama")
    ids = prompt((14, 10))["input_ids"]
    mask = (ids > 0).long()
    mask[1] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    kv = lf.KVCache(model, "liquid_fusion", 64)
    together = model.generate(ids, attention_mask=mask, **options, **{cache_keyword(model): kv})
    alone = model.generate(ids[:1], attention_mask=mask[:1], **options)
    assert together.sequences[0].tolist() == alone.sequences[0].tolist()
    assert bool(torch.stack(together.logits)[:, 0].isfinite().all())


def test_right_padding_is_named() -> None:
    model = small("llama")
    ids = torch.full((2, 10), 25)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    kv = lf.KVCache(model, "h2o", 64)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    run(model, kv, ids, attention_mask=mask, position_ids=positions)
    longer = torch.nn.functional.pad(mask, (0, 1), value=1)
    with pytest.raises(lf.CacheError, match=r"position_ids\[1, 0\] is 2, .* continues at 7; .*padded on the right"):
        run(model, kv, ids[:, :1], attention_mask=longer, position_ids=torch.tensor([[10], [2]]))


@pytest.mark.parametrize("offset", [1, 5])
def test_positions_may_begin_anywhere(offset: int, tmp_path: Path) -> None:
    """A constant offset is the model's business; one that changes is another prompt."""
    model = small("llama")
    ids = prompt((12,))["input_ids"]
    kv, theirs = lf.KVCache(model, "h2o", 64), DynamicCache(config=model.config)
    given = {"position_ids": torch.arange(12)[None] + offset}
    close(run(model, kv, ids, **given), run(model, theirs, ids, **given))
    kv.save(tmp_path / "session")
    kv = lf.KVCache.load(tmp_path / "session", model)
    given = {"position_ids": torch.tensor([[12 + offset]])}
    close(run(model, kv, ids[:, :1], **given), run(model, theirs, ids[:, :1], **given))
    with pytest.raises(lf.CacheError, match=f"continues at {13 + offset}"):
        run(model, kv, ids[:, :1], position_ids=torch.tensor([[14 + offset]]))


@pytest.mark.parametrize("name", ["jetmoe", "gemma4_text#head_dims", "gemma4_text#kv_heads(26B,31B)", "mimo_v2_flash"])
def test_sizes_that_differ_between_layers_can_be_kept(name: str, tmp_path: Path) -> None:
    """Heads and sizes are those of the keys, whatever the configuration calls them."""
    model = small(name)
    ids = prompt((20,))["input_ids"]
    kv = lf.KVCache(model, "liquid_fusion", 12)
    run(model, kv, ids)
    for i, layer in enumerate(Geometry.of(model).layers):
        keys, values = kv.keys_values(i)
        assert (keys.shape[1], keys.shape[3], values.shape[3]) == (layer.kv_heads, layer.key_dim, layer.value_dim)
    kv.save(tmp_path / "session")
    others = [copy.deepcopy(kv), lf.KVCache.load(tmp_path / "session", model)]
    expected = run(model, kv, ids[:, :1])
    assert all(torch.equal(run(model, other, ids[:, :1]), expected) for other in others)


@pytest.mark.parametrize("name", ["gptj", "codegen", "smollm3", "deepseek_v3", "exaone4"])
def test_relative_positions_need_every_key_rotated_as_the_frequencies_say(name: str) -> None:
    # GPT-J and CodeGen of an older transformers do not use the attention interface.
    with pytest.raises(lf.UnsupportedError, match=r"positions relative to the cache|attention in code of its own"):
        lf.KVCache(small(name), "streaming", 12, positions="cache")


def test_latents_are_all_that_is_stored() -> None:
    """Multi-head latent attention: one latent and one rotary key per token and layer, for all heads."""
    model = small("deepseek_v3")
    rank, rope, layers, budget = 24, 8, len(Geometry.of(model).layers), 512
    kv = lf.KVCache(model, "liquid_fusion", budget)
    run(model, kv, prompt((30,))["input_ids"])
    keys, values = kv.keys_values(0)
    assert keys.shape == (1, 1, budget, rank + rope)
    assert values.shape == (1, 1, budget, rank)
    assert values.data_ptr() == keys.data_ptr()
    beside = budget * (4 + 8 + 4)
    assert layers * budget * (rank + rope) * 4 <= kv.nbytes <= 1.05 * layers * (budget * (rank + rope) * 4 + beside)
    for strategy in ("full", "h2o"):
        longer = lf.KVCache(model, strategy, 400)
        theirs = DynamicCache(config=model.config)
        for columns in (260, 1, 30, 1):  # an unbounded cache grows
            ids = prompt((columns,), seed=columns)["input_ids"]
            close(run(model, longer, ids), run(model, theirs, ids))


def test_latents_of_deepseek_v3_take_576_elements() -> None:
    """Its rank and its rotary key, in a small model: bytes per token and layer beside the latent's own."""
    case = next(case for case in cases() if case.name == "deepseek_v3")
    wide = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64}
    model = load(replace(case, overrides=case.overrides | wide)).to(torch.bfloat16)
    kv = lf.KVCache(model, "liquid_fusion", 512)
    run(model, kv, prompt((30,))["input_ids"])
    layers = len(Geometry.of(model).layers)
    ledger = 4 + 8  # a position, two scores
    assert kv.keys_values(0)[0].shape == (1, 1, 512, 576)
    assert kv.nbytes / (layers * 512) == pytest.approx(576 * 2 + ledger, rel=0.001)
    assert kv.nbytes / (layers * 512) <= 1.05 * 576 * 2


def test_attention_in_chunks_is_exact_however_long_the_text() -> None:
    """A layer that attends within chunks loses nothing to a budget as wide as one."""
    model = small("llama4_text#chunks")
    assert [layer.kind for layer in Geometry.of(model).layers] == [Kind.CHUNKED] * 4
    kv, theirs = lf.KVCache(model, "liquid_fusion", 16), DynamicCache(config=model.config)
    for columns in (7, 1, 23, 1, 1, 1, 12, *[1] * 14):
        ids = prompt((columns,), seed=columns)["input_ids"]
        close(run(model, kv, ids), run(model, theirs, ids))
    assert kv.evictions > 0


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text#shared_kv(E2B,E4B)"])
def test_layers_that_read_anothers_keys_have_no_slots(name: str) -> None:
    model = small(name)
    geometry = Geometry.of(model)
    assert [layer.source for layer in geometry.layers] == [0, 1, 0, 1]
    kv = lf.KVCache(model, "liquid_fusion", 12)
    run(model, kv, prompt((30,))["input_ids"])
    with pytest.raises(lf.CacheError, match="no slots of its own"):
        kv.positions(2)
    own = sum(kv.keys_values(i)[0].nbytes for i in (0, 1))
    assert kv.nbytes < 3 * own
