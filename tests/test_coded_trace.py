"""Whole models over coded slots beside the naive twin, which checks each code and goes on from the product's codes."""

from __future__ import annotations

import random
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import liquidfusion as lf
from liquidfusion.compute.codes import Coding
from liquidfusion.state.sides import Coded
from naive import NaiveCache, Stored
from reference import rules
from test_codes import Twin as CodeTwin
from tiny import VOCABULARY, cached, padded, prompt_then_greedy

BOUNDED = ("streaming", "h2o", "liquid_fusion", "local", "tova", "snapkv", "random", "keydiff")
BITS = (16, 8, 4, (16, 8), (16, 4), (8, 4), (8, 2), (4, 2))
CONFIGURATIONS = 24
"""So many in the suite; `python tests/test_coded_trace.py 1000` runs more, one after the other."""


class Product:
    """Storing one row of a KVCache: each code is checked when it is made, and what the codes stand for is returned."""

    def __init__(self, kv: lf.KVCache, row: int) -> None:
        self.kv, self.row = kv, row
        self.checked = 0

    def expected(self, layer: int, head: int, key: Tensor) -> Tensor:
        side = self._side(layer, 0)
        if not isinstance(side, Coded):
            return key.to(side.held.dtype).float()
        how = side.coding
        twin, mu = CodeTwin(how.bits, how.head_dim), _mu(how, head)
        y = twin.rotated(key.double().numpy() - mu)
        if not y.any():
            return torch.from_numpy(mu)
        levels = 2 * np.clip(np.floor(twin.coordinates(y)), 0, 2**how.bits - 1) - (2**how.bits - 1)
        scale = float(np.float16(np.linalg.norm(y) / np.linalg.norm(levels)))
        return self._back(twin, scale * levels, mu)

    def stored(self, layer: int, head: int, position: int, key: Tensor, value: Tensor) -> Stored:
        held = self.kv.positions(layer)[self.row, head].tolist()
        if position not in held:  # chosen otherwise: the test's to judge
            return Stored(key, value, key, value)
        slot = held.index(position)
        (read_key, judged_key), (read_value, judged_value) = (
            self._one(layer, which, head, slot, exact) for which, exact in enumerate((key, value))
        )
        return Stored(read_key, read_value, judged_key, judged_value)

    def _one(self, layer: int, which: int, head: int, slot: int, exact: Tensor) -> tuple[Tensor, Tensor]:
        side = self._side(layer, which)
        self.checked += 1
        if not isinstance(side, Coded):
            number = side.held[self.row, head, slot].float()
            torch.testing.assert_close(number, exact, rtol=2**-8 + 1e-5, atol=1e-5)
            return number, number
        how = side.coding
        twin, mu = CodeTwin(how.bits, how.head_dim), _mu(how, head)
        packed, scale = side.codes.codes[self.row, head, slot].numpy(), side.codes.scales[self.row, head, slot].item()
        twin.check(exact.double().numpy() - mu, packed, scale)
        judged = self._back(twin, twin.decoded(packed, scale), mu)
        if side.first is None or slot >= side.first.shape[2]:
            return judged, judged
        turned = side.first[self.row, head, slot].double().numpy()
        np.testing.assert_allclose(turned, twin.rotated(exact.double().numpy() - mu), rtol=2**-8 + 1e-4, atol=1e-4)
        return self._back(twin, turned, mu), judged

    def _side(self, layer: int, which: int) -> Any:
        group, index = self.kv._groups[layer]
        slots = group.slots[index]
        assert slots is not None
        return (slots.keys, slots.values)[which]

    @staticmethod
    def _back(twin: CodeTwin, turned: np.ndarray[Any, Any], mu: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(twin.rotation[:, : twin.head_dim].T @ turned + mu)


def _mu(how: Coding, head: int) -> np.ndarray[Any, Any]:
    return np.zeros(how.head_dim) if how.mu is None else how.mu[head].double().numpy()


def drawn_model(draw: random.Random, family: str, bias: float) -> PreTrainedModel:
    """A random model; its keys are biased by `bias` where its keys can be."""
    kv_heads, head_dim = draw.choice([1, 2]), draw.choice([8, 16, 24, 32])
    heads = kv_heads * draw.choice([1, 2, 4])
    common = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": draw.choice([1, 2]),
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "initializer_range": 0.25,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    config = {
        "llama": lambda: transformers.LlamaConfig(**common, attention_bias=bias > 0),
        "qwen3": lambda: transformers.Qwen3Config(**common, attention_bias=bias > 0),
        "softcap": lambda: transformers.Gemma2Config(
            **common, attention_bias=bias > 0, query_pre_attn_scalar=head_dim, attn_logit_softcapping=3.0,
            layer_types=["full_attention"] * common["num_hidden_layers"],
        ),
        "learned sinks": lambda: transformers.GptOssConfig(
            **common, num_local_experts=2, num_experts_per_tok=2, attention_bias=True,
            layer_types=["full_attention"] * common["num_hidden_layers"],
        ),
    }[family]()  # fmt: skip
    options = {"attn_implementation": "eager"} if family in ("softcap", "learned sinks") else {}
    with torch.random.fork_rng():
        torch.manual_seed(draw.randrange(2**31))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("k_proj.bias"):
                torch.nn.init.normal_(parameter, std=bias)
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter, std=1.0)
    model.generation_config.pad_token_id = 0
    return model


def drawn_options(draw: random.Random) -> dict[str, Any]:
    """Parameters of a strategy in the product's words; each strategy takes those that it listens to."""
    return {
        "eviction_interval": draw.choice([1, 2]),
        "sink_size": draw.choice([0, 2, 4]),
        "sinks": draw.choice(["pinned", "pinned", "adaptive"]),
        "distinct_ratio": draw.choice([0.0, 0.3, 0.6]),
        "peak_ratio": draw.choice([0.0, 0.4]),
        "look_gap": draw.choice([0, 2, 8]),
        "averaged": draw.choice([True, False]),
        "value_weighted": draw.choice([True, False]),
    }


_TWINS_WORD = {"value_weighted": "weighted", "eviction_interval": "interval"}


def twins_rules(kv: lf.KVCache, strategy: str, options: dict[str, Any]) -> Any:
    listens = next(info["parameters"] for info in lf.strategies() if info["name"] == strategy)
    given = {_TWINS_WORD.get(name, name): value for name, value in options.items() if name in listens}
    if "sinks" in given:
        given["adaptive"] = given.pop("sinks") == "adaptive"
    return rules(strategy, kv.spec.budget, **{**given, "interval": kv.spec.interval})


def compare(seed: int, family: str | None = None, bits: Any = None, bias: float | None = None) -> tuple[int, int]:
    """Run one drawn configuration; returns calls compared of those made.

    A row's comparison ends where a choice of the twin's is closer than float32 is to float64: both are right there.
    """
    draw = random.Random(seed)
    family = draw.choice(["llama", "qwen3", "softcap", "learned sinks"]) if family is None else family
    bias = draw.choice([0.0, 0.0, 2.0]) if bias is None else bias
    model = drawn_model(draw, family, bias)
    strategy, bits = draw.choice(BOUNDED), draw.choice(BITS) if bits is None else bits
    budget, options = draw.randrange(24, 41), drawn_options(draw)
    kv = cached(model, strategy, budget, bits=bits, **options)
    lengths = [draw.randrange(4, 60) for _ in range(draw.choice([1, 2]))]
    splits, left = [], max(lengths)
    while left:
        splits.append(draw.randrange(1, left + 1))
        left -= splits[-1]
    steps = draw.randrange(4, 16)
    ids, mask = padded(lengths, seed)
    naive = [NaiveCache(model, twins_rules(kv, strategy, options), Product(kv, row)) for row in range(len(lengths))]
    ended: set[int] = set()
    start = made = compared = 0
    widths = [*splits, *[1] * steps]
    for width, (logits, known) in zip(widths, prompt_then_greedy(model, kv, ids, mask, splits, steps), strict=True):
        end = start + width
        for row, length in enumerate(lengths):
            tokens = known[row, max(start, max(lengths) - length) : end].tolist()
            if not tokens:
                continue
            made += 1
            if row in ended:
                continue
            exact = naive[row].call(tokens)
            if naive[row].margin < 2e-5:
                ended.add(row)
                continue
            torch.testing.assert_close(logits[row].double(), exact.double(), rtol=2e-3, atol=2e-3)
            check_kept(kv, naive[row], row)
            compared += 1
        start = end
    assert all(one.memory.checked for one in naive)
    return compared, made


def check_kept(kv: lf.KVCache, naive: NaiveCache, row: int) -> None:
    """Which positions are kept, and their scores but for sinks', whose looks weigh what 16 bits make of them."""
    for layer, twins in enumerate(naive.twins):
        group, index = kv._groups[layer]
        first = group.formats[index].first
        for head, twin in enumerate(twins):
            held = kv.positions(layer)[row, head].tolist()
            assert sorted(position for position in held if position >= 0) == twin.kept
            if not kv.spec.scored:
                continue
            judged = [position for position in twin.kept if held.index(position) >= first]
            slots = [held.index(position) for position in judged]
            for own, name in zip(kv.scores(layer), ("mass", "peak"), strict=True):
                exact = torch.tensor([getattr(twin.tokens[position], name) for position in judged])
                torch.testing.assert_close(own[row, head, slots], exact, rtol=3e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:bits=")  # random weights forgive little
def test_drawn_configurations() -> None:
    """Any strategy, any bits, any split of padded rows."""
    compared, made = np.sum([compare(seed) for seed in range(CONFIGURATIONS)], 0)
    assert compared > 0.7 * made, "the twins were too close to call"


@pytest.mark.filterwarnings("ignore:bits=")
@pytest.mark.parametrize("family", ["softcap", "learned sinks"])
def test_strongly_biased_keys(family: str) -> None:
    """A centre far larger than what differs between keys: logits are capped, and sinks compete, with the centre in."""
    compared, made = np.sum([compare(seed, family, bits=4, bias=10.0) for seed in range(4)], 0)
    assert compared > 0.5 * made


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "bits=")
    drawn = [compare(seed) for seed in range(int(sys.argv[1]))]
    print(
        f"{len(drawn)} configurations, {sum(x for x, _ in drawn)} of {sum(x for _, x in drawn)} calls compared: equal"
    )
