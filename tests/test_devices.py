"""Layers on several devices: scores kept beside slots elsewhere than the core's, and hooks that move layers about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import liquidfusion as lf
from liquidfusion.state import group
from tiny import build, cache_keyword, cached, padded, tiny

STRATEGIES = tuple(info["name"] for info in lf.strategies())


def answer(model: PreTrainedModel, strategy: str, **options: Any) -> tuple[list[Any], list[Any], int]:
    """Tokens, kept positions and evictions of a padded batch."""
    ids, mask = padded((40, 27, 33))
    cache = cached(model, strategy, 24, eviction_interval=2)
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=30, **options, **{cache_keyword(model): cache}
    )
    return out.tolist(), [cache.positions(layer).tolist() for layer in range(len(cache))], cache.evictions


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "full"])
def test_slots_beside_the_core_are_the_cores_own(
    monkeypatch: pytest.MonkeyPatch, strategy: str, chunk: int | None
) -> None:
    """A layer on another device has positions and scores of its own there; mirrored on the CPU, nothing may differ."""
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    expected = answer(tiny("llama"), strategy, **options)
    made = []

    def apart(*_: Any) -> bool:
        made.append(True)
        return False

    monkeypatch.setattr(group, "shares_memory", apart)
    assert answer(tiny("llama"), strategy, **options) == expected
    assert made


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("liquid_fusion", {"num_beams": 3}), ("h2o", {"num_beams": 3}), ("full", {"prefill_chunk_size": 250})],
)
def test_reordered_rows_and_new_slots_reach_the_copies(
    monkeypatch: pytest.MonkeyPatch, strategy: str, options: dict[str, int]
) -> None:
    """Beams take each other's scores, and an unbounded cache grows, between a chunk and the next."""

    def told() -> tuple[list[Any], list[Any]]:
        model = tiny("llama")
        ids, mask = padded((300, 280) if strategy == "full" else (40, 27))
        cache = cached(model, strategy, 24, **({} if strategy == "full" else {"eviction_interval": 2}))
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=30, **options, **{cache_keyword(model): cache}
        )
        return out.tolist(), [cache.positions(layer).tolist() for layer in range(len(cache))]

    expected = told()
    monkeypatch.setattr(group, "shares_memory", lambda *_: False)
    assert told() == expected


def test_reordered_rows_take_along_whose_scores_are_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one row's scores are newer beside its slots when it changes places."""
    model = tiny("llama")

    def scores() -> list[torch.Tensor]:
        cache = cached(model, "h2o", 24, eviction_interval=3)
        ids, mask = padded((40, 40))
        for token in (None, 5, 6):  # too few for a decision, which would bring the scores to the host
            if token is not None:
                ids, mask = torch.tensor([[token], [0]]), torch.cat((mask, torch.tensor([[1], [0]])), 1)
            with torch.no_grad():
                model(ids, attention_mask=mask, **{cache_keyword(model): cache})
        cache.reorder_cache(torch.tensor([1, 0]))
        return [kind for layer in range(2) for kind in cache.scores(layer)]

    expected = scores()
    monkeypatch.setattr(group, "shares_memory", lambda *_: False)
    for own, other in zip(scores(), expected, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.filterwarnings("ignore")
def test_device_map_with_hooks(tmp_path: Path) -> None:
    """Layers that are on the device only while they run, as `device_map="auto"` arranges when memory is short."""
    pytest.importorskip("accelerate")
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, device_map=places, offload_folder=tmp_path / "offload"
    ).eval()
    assert spread.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    spread.generation_config.pad_token_id = 0
    assert answer(spread, "liquid_fusion") == answer(model, "liquid_fusion")
    lf.uninstall(spread)
    assert spread.generate(padded((9,))[0], max_new_tokens=3).shape == (1, 12)
