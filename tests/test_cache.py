"""What a bounded KVCache keeps: against a naive model twin, against a row alone, and each strategy's invariants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import liquidfusion as lf
from liquidfusion.geometry import Geometry
from liquidfusion.hf.formats import layer_formats, row_bytes
from liquidfusion.precision import Bits
from naive import NaiveCache
from reference import rules
from tiny import MODELS, cache_keyword, cached, clear_steps, feed, padded, prompt_then_greedy, tiny

STRATEGIES = tuple(info["name"] for info in lf.strategies())
BOUNDED = tuple(name for name in STRATEGIES if lf.KVCache(tiny("llama"), name, 64).spec.bounded)
BUDGET = 24
STEPS = 40
LENGTHS = (40, 27, 33)
# Row 1 (13 columns of padding) meets a call without any real token, then one with a single real token.
SPLITS = {"one chunk": (40,), "many chunks": (10, 4, 15, 1, 10)}


def kept(kv: lf.KVCache, layer: int, row: int) -> list[list[int]]:
    """Sorted positions of each kv head."""
    return [sorted(p for p in head if p >= 0) for head in kv.positions(layer)[row].tolist()]


def layers(model: PreTrainedModel) -> range:
    return range(model.config.num_hidden_layers)


CASES: list[tuple[str, str, dict[str, Any]]] = [("llama", strategy, {}) for strategy in STRATEGIES]
CASES += [(name, "liquid_fusion", {}) for name in MODELS if name != "llama"]
CASES += [
    ("llama", "liquid_fusion", {"sinks": "adaptive", "eviction_interval": 2}),
    ("qwen3", "h2o", {"eviction_interval": 3}),
    ("qwen2", "liquid_fusion", {"look_gap": 0, "averaged": False, "value_weighted": False}),
]
_TWINS_WORD = {"value_weighted": "weighted"}


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize(("name", "strategy", "options"), CASES)
def test_model_twin(name: str, strategy: str, options: dict[str, Any], splits: Sequence[int]) -> None:
    """The whole model beside the naive one: kept positions, their K/V and scores in every layer, and the logits.

    Here both compute their own probabilities, float32 and float64; where a choice of the twin's is closer than the
    difference, the comparison of that row ends, as both answers are right. It must not end early.
    """
    model = tiny(name)
    kv = cached(model, strategy, BUDGET, **options)
    given = {_TWINS_WORD.get(key, key): value for key, value in options.items() if key != "eviction_interval"}
    given["adaptive"] = given.pop("sinks", "pinned") == "adaptive"
    rule = rules(strategy, BUDGET, interval=kv.spec.interval, **given)
    ids, mask = padded(LENGTHS)
    naive = [NaiveCache(model, rule) for _ in LENGTHS]
    compared, start = [0] * len(LENGTHS), 0
    ended: set[int] = set()
    widths = [*splits, *[1] * STEPS]
    for width, (logits, known) in zip(widths, prompt_then_greedy(model, kv, ids, mask, splits, STEPS), strict=True):
        end = start + width
        for row, length in enumerate(LENGTHS):
            tokens = known[row, max(start, max(LENGTHS) - length) : end].tolist()
            if not tokens or row in ended:
                continue
            exact = naive[row].call(tokens)
            if naive[row].margin < 2e-5:
                ended.add(row)
                continue
            torch.testing.assert_close(logits[row], exact, rtol=1e-3, atol=1e-3)
            check_stored(kv, naive[row], row)
            compared[row] += 1
        start = end
    assert sum(compared) > 0.5 * len(LENGTHS) * len(widths), f"the twins were too close to call: {compared}"


def check_stored(kv: lf.KVCache, naive: NaiveCache, row: int) -> None:
    """Positions, and for each of them K, V and scores, of one row."""
    for layer, twins in enumerate(naive.twins):
        assert kept(kv, layer, row) == [twin.kept for twin in twins]
        keys, values = kv.keys_values(layer)
        for head, twin in enumerate(twins):
            held = kv.positions(layer)[row, head].tolist()
            slots = [held.index(position) for position in twin.kept]
            stored = naive.stored[layer][head]
            for own, which in ((keys, 0), (values, 1)):
                exact = torch.stack([stored[position][which] for position in twin.kept])
                torch.testing.assert_close(own[row, head, slots], exact, rtol=1e-3, atol=1e-3)
            if kv.spec.scored:
                mass, peak = kv.scores(layer)
                exact_mass = torch.tensor([twin.tokens[position].mass for position in twin.kept])
                exact_peak = torch.tensor([twin.tokens[position].peak for position in twin.kept])
                torch.testing.assert_close(mass[row, head, slots], exact_mass, rtol=2e-3, atol=1e-5)
                torch.testing.assert_close(peak[row, head, slots], exact_peak, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize(
    ("strategy", "options"),
    [*[(strategy, {}) for strategy in STRATEGIES], ("liquid_fusion", {"sinks": "adaptive"})],
)
def test_a_padded_row_is_the_row_alone(strategy: str, options: dict[str, Any], splits: Sequence[int]) -> None:
    """Same tokens and kept positions as the row without padding, fed the same split of its real tokens."""
    model = tiny("llama")
    ids, mask = padded(LENGTHS, seed=1)
    steps = STEPS
    kv = cached(model, strategy, BUDGET, **options)
    together = []
    for logits, known in prompt_then_greedy(model, kv, ids, mask, splits, steps):
        positions = [[kept(kv, layer, row) for layer in layers(model)] for row in range(len(LENGTHS))]
        together.append((logits, known, positions))
    for row, length in enumerate(LENGTHS):
        padding = max(LENGTHS) - length
        ends = [sum(splits[: i + 1]) for i in range(len(splits))]
        real = [max(0, end - max(padding, end - width)) for end, width in zip(ends, splits, strict=True)]
        calls = [i for i, columns in enumerate(real) if columns] + [len(splits) + i for i in range(steps)]
        single = cached(model, strategy, BUDGET, **options)
        own_ids, own_mask = ids[row : row + 1, padding:], mask[row : row + 1, padding:]
        alone = prompt_then_greedy(model, single, own_ids, own_mask, [columns for columns in real if columns], steps)
        for call, (logits, known) in zip(calls, alone, strict=True):
            batch_logits, batch_known, positions = together[call]
            assert known[0].tolist() == batch_known[row, padding:].tolist()
            torch.testing.assert_close(logits[0], batch_logits[row], rtol=1e-3, atol=1e-3)
            assert [kept(single, layer, 0) for layer in layers(model)] == positions[row]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padding_anywhere(strategy: str) -> None:
    """Padding between and after real tokens: positions count real tokens, and the row is the row alone."""
    model = tiny("llama")
    generator = torch.Generator().manual_seed(4)
    ids, _ = padded((60, 60, 60, 60), seed=2)
    mask = (torch.rand(ids.shape, generator=generator) < 0.7).long()
    mask[3] = 0
    mask[3, 20:22] = 1
    splits = (25, 5, 1, 1, 28)
    kv = lf.KVCache(model, strategy, BUDGET)
    for _ in feed(model, kv, ids, mask, splits):
        pass
    for row in range(len(ids)):
        single = lf.KVCache(model, strategy, BUDGET)
        real = [int(part.sum()) for part in mask[row].split(splits)]
        own = ids[row][mask[row].bool()][None]
        for _ in feed(model, single, own, torch.ones_like(own), [columns for columns in real if columns]):
            pass
        assert [kept(kv, layer, row) for layer in layers(model)] == [kept(single, layer, 0) for layer in layers(model)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batch_order_does_not_matter(strategy: str) -> None:
    """Rows in another order give the same tokens and positions, in that order."""
    model, order, steps = tiny("qwen2"), [2, 0, 1], 50
    ids, mask = padded(LENGTHS, seed=8)
    first, second = (lf.KVCache(model, strategy, BUDGET) for _ in range(2))
    options = {"max_new_tokens": steps, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    keyword = cache_keyword(model)
    one = model.generate(ids, attention_mask=mask, **options, **{keyword: first})
    two = model.generate(ids[order], attention_mask=mask[order], **options, **{keyword: second})
    certain = min(clear_steps(row) for row in torch.stack(one.logits, 1))
    assert certain == steps, f"choose another seed: after {certain} steps the tokens are a toss"
    assert one.sequences[order].tolist() == two.sequences.tolist()
    for layer in layers(model):
        assert [kept(first, layer, row) for row in order] == [kept(second, layer, row) for row in range(3)]


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_invariants(name: str, strategy: str, interval: int) -> None:
    """After every call: positions unique, all of the budget used, sinks and recent window there, K/V in their slots.

    In layer 0, K and V depend on the token and its position alone, so those of transformers' own cache must be found.
    """
    model = tiny(name)
    kv = cached(model, strategy, BUDGET, eviction_interval=interval)
    ids, mask = padded(LENGTHS, seed=5)
    splits, steps = (12, 1, 20, 7), STEPS
    budget = kv.spec.budget or 1 << 30
    # Victims are chosen two intervals ahead at most; of those that stay then, this many are the latest.
    sinks, recent, _, _ = kv.spec.split(budget - 2 * interval) if kv.spec.bounded else (0, budget, 0, 0)
    sinks = 0 if kv.spec.params.get("sinks") == "adaptive" else sinks
    seen, columns, snapshots = [0] * 3, 0, []
    known = ids
    for call, (_, fed) in enumerate(prompt_then_greedy(model, kv, ids, mask, splits, steps)):
        known = fed
        columns += splits[call] if call < len(splits) else 1
        seen = [max(0, columns - (max(LENGTHS) - length)) for length in LENGTHS]
        for layer in layers(model):
            positions = kv.positions(layer)
            assert positions.shape[2] == budget or not kv.spec.bounded
            for row in range(3):
                for head in kept(kv, layer, row):
                    assert len(set(head)) == len(head) == min(budget, seen[row])
                    assert head[: min(sinks, seen[row])] == list(range(min(sinks, seen[row])))
                    latest = min(recent, seen[row])
                    assert head[len(head) - latest :] == list(range(seen[row] - latest, seen[row]))
        snapshots.append((kv.positions(0), *(tensor.clone() for tensor in kv.keys_values(0))))
    assert kv.get_seq_length() == columns
    dropped = sum(max(0, tokens - budget) for tokens in seen)
    assert kv.evictions == dropped * model.config.num_key_value_heads * len(layers(model))
    for row, length in enumerate(LENGTHS):
        check_layer_0(model, known[row, max(LENGTHS) - length :], row, snapshots)


def check_layer_0(
    model: PreTrainedModel, tokens: Tensor, row: int, snapshots: list[tuple[Tensor, Tensor, Tensor]]
) -> None:
    """Every stored K/V of a row equals that of transformers' own cache at the slot's position."""
    full = DynamicCache()
    with torch.no_grad():
        model(tokens[None], **{cache_keyword(model): full})
    for positions, *stored in snapshots:
        for own, exact in zip(stored, (full.layers[0].keys, full.layers[0].values), strict=True):
            for head, held in enumerate(positions[row]):
                filled = held >= 0
                found = exact[0, head, held[filled].long()]
                torch.testing.assert_close(own[row, head, filled], found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", BOUNDED)
def test_beams_stay_within_the_budget(strategy: str) -> None:
    """Reordered rows take everything with them: the beam that wins holds the K/V of its own tokens."""
    model = tiny("llama")
    ids, mask = padded((30,), seed=6)
    kv = lf.KVCache(model, strategy, BUDGET)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=40, num_beams=3, num_return_sequences=3, do_sample=False,
        return_dict_in_generate=True, **{cache_keyword(model): kv},
    )  # fmt: skip
    full, matches = [], []
    for tokens in out.sequences:
        cache = DynamicCache()
        with torch.no_grad():
            model(tokens[None], **{cache_keyword(model): cache})
        full.append(cache.layers[0].keys[0])
    for row in range(3):
        positions = kv.positions(0)[row]
        assert (positions >= 0).all()
        # The order of the beams in the cache is not that of the answer, and the last token is not fed.
        matches.append(
            any(
                torch.allclose(
                    kv.keys_values(0)[0][row], torch.stack([keys[h, positions[h].long()] for h in range(2)]), atol=1e-4
                )
                for keys in full
            )
        )
    assert any(matches)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_reordered_row_goes_on_as_its_source(strategy: str) -> None:
    """Slots, scores, counters and queue of row 1 replace those of row 0, which then does what row 1 does."""
    model = tiny("llama")
    ids, mask = padded((40, 33), seed=4)
    kv = cached(model, strategy, BUDGET, eviction_interval=2)
    calls = prompt_then_greedy(model, kv, ids, mask, (30, 10), 5)
    for logits, _ in calls:  # noqa: B007 - the last are used below
        pass
    kv.reorder_cache(torch.tensor([1, 1]))
    mask = torch.nn.functional.pad(mask[[1, 1]], (0, 5), value=1)
    for step in range(24):
        token = logits[1].argmax().expand(2, 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        with torch.no_grad():
            logits = model(
                input_ids=token, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                **{cache_keyword(model): kv},
            ).logits[:, -1]  # fmt: skip
        torch.testing.assert_close(logits[0], logits[1])
        for layer in layers(model):
            held = kv.positions(layer)
            assert held[0].tolist() == held[1].tolist(), f"layer {layer}, step {step}"


@pytest.mark.filterwarnings("ignore:bits=")
@pytest.mark.parametrize("bits", [None, 16, 8, 4, (4, 2), (16, 4)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_takes_what_plans_reckon_with(strategy: str, bits: Any) -> None:
    model = tiny("qwen3")
    kv = cached(model, strategy, BUDGET, bits=bits)
    ids, mask = padded(LENGTHS)
    for _ in feed(model, kv, ids, mask, (40,)):
        pass
    geometry = Geometry.of(model)
    formats = layer_formats(model, geometry, Bits.of(bits), None)
    context = kv.positions(0).shape[2]
    assert kv.nbytes == len(LENGTHS) * row_bytes(geometry, formats, kv.spec, context, 4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bytes_are_what_the_formula_gives(strategy: str) -> None:
    """Slots x (2 x head size x element + 4 for the position + 8 for the scores), and 4 for each victim there can be."""
    model = tiny("qwen3")
    kv = lf.KVCache(model, strategy, BUDGET)
    assert kv.nbytes == 0
    ids, mask = padded(LENGTHS)
    for _ in feed(model, kv, ids, mask, (40,)):
        pass
    config = model.config
    slots = config.num_hidden_layers * 3 * config.num_key_value_heads * (kv.positions(0).shape[2])
    body = slots * (2 * config.head_dim * 4 + 4 + (8 if kv.spec.scored else 0))
    victims = 2 * kv.spec.interval if kv.spec.bounded else 0
    assert kv.nbytes == body + 4 * victims * config.num_hidden_layers * 3 * config.num_key_value_heads
    held = sum(tensor.nbytes for layer in layers(model) for tensor in kv.keys_values(layer))
    assert held == slots * 2 * config.head_dim * 4
