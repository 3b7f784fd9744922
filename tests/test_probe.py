"""The probe against what transformers' own cache holds, and what centring is for."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from liquidfusion.compute.codes import Coding
from liquidfusion.compute.rotary import Rotary
from liquidfusion.geometry import Geometry
from liquidfusion.hf import probe as module
from liquidfusion.hf.probe import Probe, forget, probe, text
from liquidfusion.precision import Bits
from tiny import ALL_MODELS, VOCABULARY, build, cache_keyword, tiny

FOUR = Bits(4, 4)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A tiny model needs no long text."""
    monkeypatch.setattr(module, "TOKENS", 200)


def stored_keys(model, ids):
    """Keys of every layer `[kv_heads, tokens, head_dim]`, by transformers' own attention and cache."""
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, use_cache=True, **{cache_keyword(model): cache})
    return [layer.keys[0] for layer in cache.layers]


def read(model, bits=FOUR, rotary=None):
    forget(model)
    return probe(model, Geometry.of(model), bits, rotary)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_mu_is_the_mean_of_the_keys(name):
    model = tiny(name)
    found = read(model)
    keys = stored_keys(model, torch.tensor([text(VOCABULARY, 200)]))
    assert sorted(found.layers) == list(range(len(keys)))
    for index, expected in enumerate(keys):
        assert found.layers[index].mu.dtype == torch.float32
        torch.testing.assert_close(found.layers[index].mu, expected[:, 4:].mean(1), rtol=1e-4, atol=1e-4)
    assert found.cost >= 0


def test_mu_of_keys_that_are_not_rotated():
    model = tiny("llama")
    geometry = Geometry.of(model)
    rotary = Rotary(model, geometry)  # which looks at the model's keys itself
    seen = []
    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *call: seen.append(call[2]))
    found = read(model, rotary=rotary)
    hook.remove()
    expected = seen[0][0].view(200, 2, -1).transpose(0, 1)[:, 4:].mean(1)
    torch.testing.assert_close(found.layers[1].mu, expected, rtol=1e-4, atol=1e-4)
    # Rotated by the probe where they attend, so that layers see what they do without it.
    absolute = read(model)
    assert found.layers[1].error == pytest.approx(absolute.layers[1].error, rel=0.5)
    assert not torch.allclose(found.layers[1].mu, absolute.layers[1].mu, atol=1e-2)


def test_the_model_stays_as_it_was_and_is_read_once():
    model = build("llama")
    model.train()
    model.model.norm.eval()
    before, ids = model.config._attn_implementation, torch.tensor([[5, 6, 7]])
    logits = model(ids).logits
    calls = []
    hook = model.model.register_forward_hook(lambda *_: calls.append(1))
    first = read(model)
    assert probe(model, Geometry.of(model), FOUR) is first
    assert len(calls) == 1
    other = probe(model, Geometry.of(model), Bits(4, 2))
    assert len(calls) == 2
    assert other.cost > first.cost
    hook.remove()
    assert model.config._attn_implementation == before
    assert model.training
    assert not model.model.norm.training
    assert torch.equal(model(ids).logits, logits)
    assert all(p.grad is None for p in model.parameters())


def test_deterministic_in_any_surroundings():
    model = build("qwen2")
    first = read(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        torch.manual_seed(3)
        again = read(model)
    for index, layer in first.layers.items():
        assert torch.equal(layer.mu, again.layers[index].mu)
        assert not again.layers[index].mu.is_inference()
        assert layer.error == again.layers[index].error
    assert first.cost == again.cost


def test_a_forward_that_fails_leaves_nothing_behind():
    model = build("llama")
    before = model.config._attn_implementation

    def fail(*_):
        raise RuntimeError("no")

    hook = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        read(model)
    hook.remove()
    assert model.config._attn_implementation == before
    with pytest.raises(LookupError):
        module._running.get()
    assert isinstance(read(model), Probe)


def biased(strength):
    """A model whose keys have a large part in common, as Qwen2's do."""
    model = build("qwen2")
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            bias = layer.self_attn.k_proj.bias
            noise = torch.randn(bias.shape, generator=torch.Generator().manual_seed(index))
            # Rotary turns away what keys have in common, but for its slowest frequency: the last pair of coordinates.
            bias.copy_(strength * noise.sign() * torch.tensor([0, 0, 0, 1.0] * 2).repeat(len(bias) // 8))
    return model


def test_centring_is_what_biased_keys_need():
    model = biased(40.0)
    found = read(model)
    keys = stored_keys(model, torch.tensor([text(VOCABULARY, 200)]))
    for index, layer in found.layers.items():
        spread = keys[index] - keys[index].mean(1, keepdim=True)

        def noise(mu, key=keys[index], spread=spread):
            coding = Coding(4, key.shape[-1], mu)
            return float((coding.decode(coding.encode(key[None]), torch.float32)[0] - key).norm() / spread.norm())

        assert noise(layer.mu) < 0.15
        assert noise(layer.mu) < 0.5 * noise(None)


def test_layers_that_few_bits_spoil_get_more():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(30)
    found = read(model)
    assert found.layers[1].error > module.SPOILT
    assert found.raised == (1,)
    assert (found.bits(0), found.bits(1)) == (FOUR, Bits(8, 4))
    eight = read(model, Bits(8, 8))
    assert eight.raised == ()
    assert eight.layers[1].error < found.layers[1].error
    assert eight.cost < found.cost


def test_the_cost_grows_as_bits_shrink():
    model = tiny("mistral")
    costs = [read(model, bits).cost for bits in (Bits(16, 8), Bits(8, 8), Bits(8, 4), FOUR, Bits(4, 2))]
    assert costs == sorted(costs)
    assert costs[0] < 1e-3 < costs[-1]


@pytest.mark.parametrize("vocabulary", [4, 96, 50_257, 262_144])
def test_the_text_avoids_the_ends_of_the_vocabulary(vocabulary):
    tokens = text(vocabulary, 1000)
    margin = vocabulary // 32
    assert margin <= min(tokens)
    assert max(tokens) < vocabulary - margin
    assert tokens == text(vocabulary, 1000)
    assert len(set(tokens)) > min(500, vocabulary // 2)


def test_a_model_of_few_positions():
    model = build("gpt2")
    model.config.n_positions = model.config.max_position_embeddings = 50
    found = read(model)
    assert found.layers[0].mu.shape == (4, 8)
