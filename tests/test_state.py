"""What a call brings and what is noted of it, in small: looks, scores of single tokens, masks, layers that attend."""

from __future__ import annotations

import pytest
import torch

import liquidfusion as lf
from liquidfusion import _core
from liquidfusion.compute.looks import Block, Rule, observe
from liquidfusion.run.step import Past, Step
from liquidfusion.state.ledger import Ledger
from tiny import build, cache_keyword, cached, padded, tiny


def test_looks_from_afar_count_for_what_was_stored() -> None:
    """The reach bounds looks within a chunk alone: a query late in it may be the first to need an old token."""
    reach, first, columns = 3, 10, 8
    held = [0, 7, *range(first, first + columns)]
    probabilities = torch.rand(1, 1, 2, columns, len(held))
    ages = torch.arange(columns - 1, -1, -1, dtype=torch.int32)[None]
    positions = torch.tensor(held, dtype=torch.int32)
    block = Block(positions[None, 2:], positions[None, None], ages, [columns], [first], columns, None, 2, 0)
    mass, peak = torch.zeros(2, 1, 1, len(held))
    mean = probabilities[0, 0].mean(0)
    observe(probabilities, block, Rule(1.0, 1.0, 0, reach, False), mass, peak)
    for i, position in enumerate(held):
        near = [q for q in range(columns) if position < first or first + q - position <= reach]
        torch.testing.assert_close(peak[0, 0, i], mean[near, i].max())
        torch.testing.assert_close(mass[0, 0, i], mean[:, i].sum())


def test_every_row_with_one_token_takes_its_scores() -> None:
    """In a call of several columns, rows that bring one token have it in its slot, and new scores as all others."""
    ledger = Ledger(_core.Spec("h2o", 8), (1, 4, 1, 8), torch.device("cpu"), 1)
    assert ledger.host.mass is not None
    assert ledger.host.peak is not None
    lengths = [1, 3, 1, 0]
    ranks = torch.tensor([[-1, -1, 0], [0, 1, 2], [-1, -1, 0], [-1, -1, -1]], dtype=torch.int32)
    ledger.begin(lengths)
    scores = torch.rand(2, 4, 1, 11)
    ledger.keep(0, ranks, lengths, scores)
    for own, given in zip((ledger.host.mass, ledger.host.peak), scores, strict=True):
        for row in (0, 2):
            assert torch.equal(own[0, row], given[row, :, :8]), f"row {row}"
        assert not own[0, 3].any(), "a row that rests keeps what it had"


def test_a_mask_that_disagrees_about_the_past_is_refused() -> None:
    """It hides a token that is held, or shows one that the row never had: another prompt's, or not understood."""
    past, new = Past(5, (5, 3)), torch.ones(2, 2, dtype=torch.int64)
    right = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
    assert Step.of({"input_ids": new, "attention_mask": right}, past).lengths == (2, 2)
    for row, column in ((0, 1), (1, 0), (1, 4)):
        wrong = right.clone()
        wrong[row, column] = 1 - wrong[row, column]
        with pytest.raises(lf.CacheError, match=r"attention_mask counts .* the cache has seen \[5, 3\]"):
            Step.of({"input_ids": new, "attention_mask": wrong}, past)


def test_a_layer_that_did_not_attend_is_noticed() -> None:
    model = build("llama")
    cache = lf.KVCache(model, "h2o", 24)
    model.model.layers = model.model.layers[:1]
    with pytest.raises(lf.UnsupportedError, match="ran 1 of 2 attention layers through the cache"):
        model(padded((10,))[0], **{cache_keyword(model): cache})


@pytest.mark.parametrize("strategy", ["streaming", "h2o"])
def test_an_empty_slot_is_not_attended(strategy: str) -> None:
    """Until the last slot is filled every logit is that of the model without a cache."""
    model, budget = tiny("llama"), 12
    cache = cached(model, strategy, budget, eviction_interval=1)
    ids = padded((budget,))[0]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        found = [model(ids[:, :6], **{cache_keyword(model): cache}).logits]
        found += [model(ids[:, i : i + 1], **{cache_keyword(model): cache}).logits for i in range(6, budget)]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)
