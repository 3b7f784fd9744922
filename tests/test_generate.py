"""What people do with `generate`, with a budget that evicts: beams, several answers, rows that end early, streamers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import liquidfusion as lf
from tiny import cache_keyword, padded, tiny

STRATEGIES = tuple(info["name"] for info in lf.strategies())
BUDGET = 20


def replay(model: PreTrainedModel, strategy: str, prompt: torch.Tensor, new: list[int]) -> float:
    """Log-probability of new tokens after a prompt, fed one by one to a cache of their own."""
    cache, total = lf.KVCache(model, strategy, BUDGET), 0.0
    with torch.no_grad():
        logits = model(prompt[None], **{cache_keyword(model): cache}).logits[0, -1]
        for token in new:
            total += float(logits.log_softmax(-1)[token])
            logits = model(torch.tensor([[token]]), **{cache_keyword(model): cache}).logits[0, -1]
    return total


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_beam_is_a_replay_of_its_own_tokens(name: str, strategy: str) -> None:
    """Whatever rows a beam came from, its score is that of its tokens alone, evictions included."""
    model = tiny(name)
    ids, mask = padded((30, 18))
    cache = lf.KVCache(model, strategy, BUDGET)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=25, num_beams=3, num_return_sequences=3, do_sample=False,
        return_dict_in_generate=True, output_scores=True, **{cache_keyword(model): cache},
    )  # fmt: skip
    assert len({tuple(row) for row in out.sequences.tolist()}) == 6
    for beam, (sequence, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
        prompt = sequence[:30][mask[beam // 3].bool()]
        expected = replay(model, strategy, prompt, sequence[30:].tolist()) / 25
        assert float(score) == pytest.approx(expected, abs=1e-3)


def test_several_answers_to_one_prompt() -> None:
    """Sampled sequences are rows of their own: each one's cache holds its own tokens."""
    model = tiny("llama")
    ids, mask = padded((30,))
    torch.manual_seed(1)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=25, num_return_sequences=4, do_sample=True, top_k=0,
        return_dict_in_generate=True, output_logits=True, **{cache_keyword(model): lf.KVCache(model, "h2o", BUDGET)},
    )  # fmt: skip
    assert len({tuple(row) for row in out.sequences.tolist()}) == 4
    logits = torch.stack(out.logits, 1).log_softmax(-1)
    for row, sequence in enumerate(out.sequences[:, 30:]):
        total = float(logits[row].gather(1, sequence[:, None]).sum())
        assert total == pytest.approx(replay(model, "h2o", ids[0], sequence.tolist()), abs=1e-2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_that_end_early(strategy: str) -> None:
    """A row that has met its end is fed padding from then on; the others go on as if it were not there."""
    model = tiny("llama")
    ids, mask = padded((30, 30, 22), seed=5)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}

    def run(rows: slice, **more: Any) -> list[list[int]]:
        given = {cache_keyword(model): lf.KVCache(model, strategy, BUDGET)}
        out = model.generate(ids[rows], attention_mask=mask[rows], **options, **more, **given)
        return out[:, 30:].tolist()

    free = run(slice(None))
    # Ends the first row early and is not said by the others until later, if at all.
    end = next(t for t in free[0] if all(t not in row[:20] for row in free[1:]))
    together = run(slice(None), eos_token_id=end)
    stop = free[0].index(end) + 1
    assert stop < 30
    assert together[0][:stop] == free[0][:stop]
    assert set(together[0][stop:]) <= {0}
    for row in (1, 2):
        alone = run(slice(row, row + 1), eos_token_id=end)[0]
        assert together[row][: len(alone)] == alone


class Listener(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.heard += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_streamers_hear_every_token(mode: Any) -> None:
    model, listener = tiny("llama"), Listener()
    ids, mask = padded((30,))
    with mode():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=20, do_sample=False, streamer=listener,
            **{cache_keyword(model): lf.KVCache(model, "liquid_fusion", BUDGET)},
        )  # fmt: skip
    assert listener.heard == out[0].tolist()
    assert listener.ended
