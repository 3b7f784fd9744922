"""With a budget that holds everything, every strategy gives what transformers' own cache gives, token for token."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import liquidfusion as lf
from tiny import MODELS, cache_keyword, clear_steps, feed, padded, tiny

STRATEGIES = tuple(info["name"] for info in lf.strategies())
LENGTHS = (23, 9, 40)
NEW = 128
BUDGET = max(LENGTHS) + NEW

Inputs = dict[str, Any]


def prompt() -> Inputs:
    ids, mask = padded(LENGTHS)
    return {"input_ids": ids, "attention_mask": mask}


def generate(name: str, cache_: lf.KVCache | None, **options: Any) -> Any:
    model = tiny(name)
    given = {} if cache_ is None else {cache_keyword(model): cache_}
    return model.generate(**prompt(), **given, **options, return_dict_in_generate=True, output_logits=True)


@cache
def expected(name: str, **options: Any) -> tuple[Tensor, tuple[int, ...]]:
    """New tokens of transformers' own cache, `[batch, steps]`, and how many of each row are certain."""
    out = generate(name, None, **options)
    logits = torch.stack(out.logits, 1)
    certain = tuple(clear_steps(row) for row in logits)
    assert sum(certain) > 0.5 * logits.shape[0] * logits.shape[1], "the reference itself is a coin toss"
    return out.sequences[:, max(LENGTHS) :], certain


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
def test_greedy(name: str, strategy: str) -> None:
    """A batch of three with different paddings, 128 new tokens."""
    options = {"max_new_tokens": NEW, "do_sample": False}
    kv = lf.KVCache(tiny(name), strategy, BUDGET)
    got = generate(name, kv, **options).sequences[:, max(LENGTHS) :]
    tokens, certain = expected(name, **options)
    for row, steps in enumerate(certain):
        assert got[row, :steps].tolist() == tokens[row, :steps].tolist()
    assert (kv.evictions == 0) == (name != "mistral with a window"), "only what no query attends to any more is dropped"


# All strategies on one model; on the others one that reads scores and one that does not.
PAIRS = [("llama", strategy) for strategy in STRATEGIES]
PAIRS += [(name, strategy) for name in MODELS if name != "llama" for strategy in ("liquid_fusion", "streaming")]


@pytest.mark.parametrize(
    ("name", "strategy", "size"),
    [(*pair, 7) for pair in PAIRS] + [("llama", strategy, size) for strategy in STRATEGIES for size in (1, 16)],
)
def test_prefill_in_chunks(name: str, strategy: str, size: int) -> None:
    """The prompt in chunks of 1, 7 or 16 columns; chunks of only padding, and of one real token, are among them."""
    options = {"max_new_tokens": 24, "do_sample": False}
    kv = lf.KVCache(tiny(name), strategy, BUDGET)
    got = generate(name, kv, **options, prefill_chunk_size=size).sequences[:, max(LENGTHS) :]
    tokens, certain = expected(name, **options)
    for row, steps in enumerate(certain):
        assert got[row, :steps].tolist() == tokens[row, :steps].tolist()


@pytest.mark.parametrize(("name", "strategy"), PAIRS)
def test_beams(name: str, strategy: str) -> None:
    """Beam search reorders rows at every step."""
    model = tiny(name)
    options = {"max_new_tokens": 24, "do_sample": False, "num_beams": 3, "num_return_sequences": 3}
    expected = model.generate(**prompt(), **options)
    got = model.generate(**prompt(), **options, **{cache_keyword(model): lf.KVCache(model, strategy, BUDGET)})
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize(("name", "strategy"), PAIRS)
def test_sampled(name: str, strategy: str) -> None:
    """Sampling with a seed."""
    model = tiny(name)
    options = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.8, "top_k": 20}
    torch.manual_seed(5)
    expected = model.generate(**prompt(), **options)
    torch.manual_seed(5)
    got = model.generate(**prompt(), **options, **{cache_keyword(model): lf.KVCache(model, strategy, BUDGET)})
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize(("name", "strategy"), PAIRS)
def test_logits_of_a_bare_loop(name: str, strategy: str) -> None:
    """`model(...)` without `generate`: every call's logits, whatever columns it brings."""
    model = tiny(name)
    ids, mask = padded((30, 30))
    splits = (11, 1, 1, 6, 1, 10)
    ours = list(feed(model, lf.KVCache(model, strategy, 64), ids, mask, splits))
    for own, other in zip(ours, feed(model, DynamicCache(), ids, mask, splits), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_a_loop_that_gives_only_ids() -> None:
    """Neither mask nor positions: transformers makes them from what the cache says it has seen."""
    model = tiny("llama")
    ids, _ = padded((20,))
    own, other = lf.KVCache(model, "liquid_fusion", 32), DynamicCache()
    with torch.no_grad():
        for start, end in ((0, 8), (8, 9), (9, 17), (17, 18), (18, 19)):
            chunk = ids[:, start:end]
            a = model(chunk, **{cache_keyword(model): own}).logits
            b = model(chunk, **{cache_keyword(model): other}).logits
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert own.get_seq_length() == 19
