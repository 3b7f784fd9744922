"""Every architecture x strategy x way to generate x chunking x padding: transformers' own tokens while all fits."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import liquidfusion as lf
from tiny import ALL_MODELS, build, cache_keyword, clear_steps, feed, padded, tiny

STRATEGIES = tuple(info["name"] for info in lf.strategies())
NEW = 7
LENGTHS = {"alone": (17, 17), "padded": (9, 17)}
CHUNKS = {"one chunk": None, "chunked": 5}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 2},
    "beam": {"do_sample": False, "num_beams": 2, "num_return_sequences": 2},
}
SLIDING = ("gemma2", "gemma3")
WINDOW = 10


def generate(model: PreTrainedModel, lengths: tuple[int, ...], kv: lf.KVCache | None, **options: Any) -> Any:
    ids, mask = padded(lengths, seed=3)
    given = {} if kv is None else {cache_keyword(model): kv}
    torch.manual_seed(5)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True,
        **options, **given,
    )  # fmt: skip


@cache
def expected(name: str, padding: str, way: str) -> tuple[Tensor, int]:
    """Sequences of transformers' own cache, and how many columns of them are certain."""
    model = tiny(name)
    out = generate(model, LENGTHS[padding], None, **WAYS[way])
    steps = NEW if way != "greedy" else min(clear_steps(row) for row in torch.stack(out.logits, 1))
    assert steps > NEW // 2, "the reference itself is a coin toss"
    return out.sequences, max(LENGTHS[padding]) + steps


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ALL_MODELS)
def test_all_that_fits(name: str, strategy: str) -> None:
    """A budget as long as the sequence, or as a layer's window, loses nothing."""
    model = tiny(name)
    for padding, lengths in LENGTHS.items():
        for way, options in WAYS.items():
            tokens, certain = expected(name, padding, way)
            for chunking, size in CHUNKS.items():
                kv = lf.KVCache(model, strategy, max(lengths) + NEW)
                got = generate(model, lengths, kv, **options, prefill_chunk_size=size).sequences
                assert got[:, :certain].tolist() == tokens[:, :certain].tolist(), f"{way}, {chunking}, {padding}"


@pytest.mark.parametrize("name", ALL_MODELS)
def test_a_small_budget_treats_each_row_as_if_alone(name: str) -> None:
    """Padding costs nothing and no row sees another, with eviction in every layer that is not a window."""
    model = tiny(name)
    lengths, options = (21, 30), {"max_new_tokens": 20, "do_sample": False}
    ids, mask = padded(lengths, seed=1)
    kv = lf.KVCache(model, "liquid_fusion", 12)
    together = model.generate(ids, attention_mask=mask, **options, **{cache_keyword(model): kv})
    assert kv.evictions > 0
    for row, length in enumerate(lengths):
        own = ids[row : row + 1, max(lengths) - length :]
        single = lf.KVCache(model, "liquid_fusion", 12)
        alone = model.generate(
            own, attention_mask=torch.ones_like(own), **options, output_logits=True, return_dict_in_generate=True,
            **{cache_keyword(model): single},
        )  # fmt: skip
        certain = clear_steps(torch.stack(alone.logits, 1)[0])
        assert certain > 10
        new = alone.sequences[0, length:].tolist()
        assert together[row, max(lengths) :].tolist()[:certain] == new[:certain]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SLIDING)
def test_sliding_layers_keep_their_window_and_no_more(name: str, strategy: str) -> None:
    """After every call the latest `WINDOW` positions in exactly as many slots; global layers hold their budget."""
    model = tiny(name)
    kv = lf.KVCache(model, strategy, 14)
    lengths = (16, 40)
    ids, mask = padded(lengths, seed=2)
    columns = 0
    for width, _ in zip((9, 1, 23, 1, 1, 5), feed(model, kv, ids, mask, (9, 1, 23, 1, 1, 5)), strict=True):
        columns += width
        for layer, kind in enumerate(model.config.layer_types):
            positions = kv.positions(layer)
            for row, length in enumerate(lengths):
                seen = max(0, columns - (max(lengths) - length))
                for head in positions[row]:
                    held = sorted(p for p in head.tolist() if p >= 0)
                    if kind == "sliding_attention":
                        assert len(head) == WINDOW
                        assert held == list(range(max(0, seen - WINDOW), seen))
                    else:
                        assert len(held) == min(seen, kv.spec.budget or seen)


def test_windows_alone_are_transformers_own_however_long_the_text() -> None:
    """Layers that only ever attend to a window lose nothing to a budget as wide: exact logits far past it."""
    model = tiny("mistral with a window")
    ids, mask = padded((90, 90))
    splits = (40, 1, 1, 30, *[1] * 18)
    kv = lf.KVCache(model, "streaming", 32)
    theirs = feed(model, transformers.DynamicCache(config=model.config), ids, mask, splits)
    for own, other in zip(feed(model, kv, ids, mask, splits), theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    assert kv.evictions > 0


def test_a_window_that_the_configuration_does_not_tell() -> None:
    """A layer that attends otherwise than its configuration says would read a window as if it were the whole text."""
    model = build("mistral with a window")
    kv = lf.KVCache(model, "h2o", 64)
    model.config.sliding_window = None
    with pytest.raises(lf.UnsupportedError, match="layer 0 attends to a window of 0"):
        list(feed(model, kv, *padded((10,)), (10,)))


def test_cross_attention_is_refused() -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True)
    with pytest.raises(lf.UnsupportedError, match=r"GPT2.*cross-attention"):
        lf.KVCache(transformers.GPT2LMHeadModel(config).eval(), "h2o", 24)


@pytest.mark.filterwarnings("ignore")
def test_transformers_own_continuous_batching_is_refused_before_any_work() -> None:
    """It would bring its own paged cache and leave ours aside without a word."""
    model = build("llama")
    before = set(model.__dict__)
    with pytest.raises(lf.UnsupportedError, match="continuous batching"), lf.use(model, budget=24):
        model.init_continuous_batching()
    assert set(model.__dict__) == before
    assert "init_continuous_batching" not in type(model).__dict__
