"""The decoder's ring protocol in Triton's interpreter: it keeps what the generic path keeps."""

import gc
import weakref

import pytest
import torch

import liquidfusion as lf
from classes.families import cases
from classes.probe import load, prompt
from liquidfusion.compute import kernels
from tiny import build, cache_keyword, cached, defaults, tiny

pytestmark = [
    pytest.mark.skipif(
        not hasattr(kernels, "decode") or torch.cuda.is_available(), reason="needs Triton and its interpreter"
    ),
    # The interpreter computes both branches of a `where` with numpy.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def run(model, ids, mask, **options):
    """Tokens and sorted kept positions of each layer after a padded prompt and some decode steps."""
    cache = cached(model, "liquid_fusion", 24, **options)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **{cache_keyword(model): cache})
    kept = [cache.positions(layer).sort(-1).values for layer in range(len(cache))]
    return out, torch.stack(kept), cache


@pytest.mark.parametrize("interval", [1, 2])
def test_the_ring_reuses_the_slots_that_the_generic_path_reuses(monkeypatch, interval):
    model = tiny("qwen3")
    torch.manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    expected, kept, _ = run(model, ids, mask, eviction_interval=interval)
    monkeypatch.setattr(kernels, "available", lambda device: True)  # noqa: ARG005
    tokens, positions, cache = run(model, ids, mask, eviction_interval=interval)
    assert cache._graph is not None
    assert torch.equal(tokens, expected)
    assert torch.equal(positions, kept)
    # The device's own positions agree with the host's, which only follows.
    ledger = cache._groups.all[0].ledger
    for index in range(ledger.layers):
        beside = ledger.at(index, torch.device("cpu"))
        assert beside.positions.data_ptr() != ledger.host.positions[index].data_ptr()
        assert torch.equal(beside.positions, ledger.host.positions[index])


@pytest.mark.parametrize("positions", ["absolute", "cache"])
def test_the_generic_path_serves_what_the_decoder_cannot(monkeypatch, positions):
    """A row that rests in a step, and positions relative to the cache: tokens and slots are those without a decoder."""
    model = tiny("qwen3")
    ids, mask = torch.arange(3, 43).view(2, 20), torch.ones(2, 20, dtype=torch.int64)

    def steps():
        cache = cached(model, "liquid_fusion", 24, positions=positions)
        columns, found = mask, []
        for active in ([[1], [1]], [[1], [0]], [[0], [1]], [[1], [1]]):
            new = ids if not found else torch.tensor([[5], [7]])
            columns = mask if not found else torch.cat((columns, torch.tensor(active)), 1)
            with torch.no_grad():
                logits = model(new, attention_mask=columns, **{cache_keyword(model): cache}).logits[:, -1]
            found.append(logits[torch.tensor(active)[:, 0] > 0])
        return torch.cat(found), torch.stack([cache.positions(layer).sort(-1).values for layer in range(len(cache))])

    logits, kept = steps()
    monkeypatch.setattr(kernels, "available", lambda device: True)  # noqa: ARG005
    own, own_kept = steps()
    torch.testing.assert_close(own, logits)
    assert torch.equal(own_kept, kept)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("gemma2", 2),
        ("gpt_oss", 2),
        ("qwen3_next", 1),
        ("gemma3n_text", 2),
        ("falcon_h1", 1),
        ("deepseek_v3", 1),
        ("minicpm3", 1),
        ("llama4_text", 2),
        ("mimo_v2_flash", 2),
    ],
)
def test_layers_kept_in_several_ways_are_one_step(monkeypatch, name, groups):
    """Windows and chunks beside full attention, sinks, states, another's slots, latents: as without a graph."""
    case = next((case for case in cases() if case.name == name), None)
    if case is None:
        pytest.skip("this transformers has no such class")
    model, inputs = load(case), prompt((17, 26))
    results = []
    for replayed in (False, True):
        monkeypatch.setattr(kernels, "available", lambda device, replayed=replayed: replayed)  # noqa: ARG005
        cache = lf.KVCache(model, lf.Strategy("liquid_fusion", eviction_interval=2), 24)
        texts = []
        for _ in range(2):
            given = {"max_new_tokens": 8, "do_sample": False, cache_keyword(model): cache}
            texts.append(model.generate(**inputs, **given))
            kept = [cache.positions(layer).sort(-1).values for layer in cache._groups.places]
            evictions = cache.evictions
            assert (cache._graph is not None) == replayed
            cache.reset()
        assert torch.equal(*texts)
        assert len(cache._groups.all) == groups
        results.append((texts[0], kept, evictions))
    (tokens, kept, evictions), (expected, theirs, evicted) = results
    assert torch.equal(tokens, expected)
    assert all(map(torch.equal, kept, theirs))
    assert evictions == evicted


def test_reset_and_a_second_prompt_start_over(monkeypatch):
    model = tiny("qwen3")
    torch.manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, 20))
    mask = torch.ones_like(ids)
    monkeypatch.setattr(kernels, "available", lambda device: True)  # noqa: ARG005
    first, kept, cache = run(model, ids, mask)
    cache.reset()
    again = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **{cache_keyword(model): cache})
    assert torch.equal(again, first)
    assert torch.equal(torch.stack([cache.positions(i).sort(-1).values for i in range(len(cache))]), kept)


def test_the_process_has_defaults_of_its_own(monkeypatch):
    model = tiny("qwen3")
    ids = torch.arange(3, 43).view(2, 20)
    monkeypatch.setattr(kernels, "available", lambda device: True)  # noqa: ARG005

    def run():
        cache = lf.KVCache(model, "liquid_fusion", 24)
        tokens = ids
        for _ in range(12):
            columns = tokens[:, cache.get_seq_length() :]
            logits = model(columns, **{cache_keyword(model): cache}).logits
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
        assert cache._graph is not None
        return tokens, torch.stack([cache.positions(layer) for layer in range(len(cache))])

    with torch.no_grad():
        expected = run()
        with defaults(torch.bfloat16), defaults(torch.device("meta")):
            found = run()
    assert all(map(torch.equal, found, expected))


def test_keys_of_another_dtype_are_refused(monkeypatch):
    model = tiny("qwen3")
    monkeypatch.setattr(kernels, "available", lambda device: True)  # noqa: ARG005
    cache = lf.KVCache(model, "liquid_fusion", 24)
    given = {cache_keyword(model): cache}
    with torch.no_grad():
        model(torch.full((1, 30), 5), **given)
        model(torch.full((1, 1), 5), **given)
        assert cache._graph is not None
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(lf.CacheError, match=r"layer 0 makes torch\.bfloat16 keys, the cache holds torch\.float32"),
        ):
            model(torch.full((1, 1), 5), **given)


def test_a_cache_does_not_keep_its_model(monkeypatch):
    model = build("qwen3")
    monkeypatch.setattr(kernels, "available", lambda device: True)  # noqa: ARG005
    cache = lf.KVCache(model, "liquid_fusion", 24)
    with torch.no_grad():
        for columns in (20, 1, 1):
            model(torch.full((1, columns), 5), **{cache_keyword(model): cache})
    assert cache._graph is not None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert cache.get_seq_length() == 22


CODED = [("liquid_fusion", bits) for bits in (8, 4, (8, 4), (4, 2), (16, 4))] + [("streaming", 4), ("keydiff", (4, 2))]


@pytest.mark.parametrize(("strategy", "bits"), CODED)
def test_coded_slots_are_kept_as_on_the_generic_path(monkeypatch, bits, strategy):
    model = tiny("qwen3")
    torch.manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0

    def keep():
        cache = cached(model, strategy, 24, eviction_interval=2, distinct_ratio=0.3, bits=bits)
        given = {cache_keyword(model): cache}
        out = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **given)
        return out, torch.stack([cache.positions(layer).sort(-1).values for layer in range(len(cache))]), cache

    expected, kept, _ = keep()
    monkeypatch.setattr(kernels, "available", lambda device: True)  # noqa: ARG005
    tokens, positions, cache = keep()
    assert cache._graph is not None or bits == (16, 4)  # 16 bits are another dtype than this model's
    assert torch.equal(tokens, expected)
    # The kernel rotates in another order than the core: what is rounded to 16 bits may differ in its last one.
    assert (positions == kept).float().mean() > 0.95
