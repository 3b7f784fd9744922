"""What users touch: `reset`, `repr`, `use`, `uninstall`, and the errors for what cannot be served."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast, pipeline

import liquidfusion as lf
from liquidfusion.hf import hook
from tiny import VOCABULARY, build, cache_keyword, defaults, feed, padded, prompt_then_greedy

STRATEGIES = tuple(info["name"] for info in lf.strategies())
GREEDY = {"do_sample": False, "max_new_tokens": 30}


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    """A tiny Llama of the test's own, since these tests change what hangs on it."""
    return build("llama")


def generate(model: PreTrainedModel, ids: torch.Tensor, kv: Any = None, **options: Any) -> list[list[int]]:
    given = {} if kv is None else {cache_keyword(model): kv}
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **{**GREEDY, **options}, **given).tolist()


def positions(kv: lf.KVCache) -> list[Any]:
    return [kv.positions(layer).tolist() for layer in range(2)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reset_makes_it_new(model: PreTrainedModel, strategy: str) -> None:
    """The same prompt gives the same tokens, positions and counters; another batch size may follow."""
    ids, mask = padded((40, 31))
    kv = lf.KVCache(model, strategy, 24)
    first = generate(model, ids, kv, attention_mask=mask)
    kept, evictions, text = positions(kv), kv.evictions, repr(kv)
    kv.reset()
    assert (kv.get_seq_length(), kv.evictions) == (0, 0)
    assert generate(model, ids, kv, attention_mask=mask) == first
    assert (positions(kv), kv.evictions, repr(kv)) == (kept, evictions, text)
    kv.reset()
    again = generate(model, ids[:1], kv)
    assert again == generate(model, ids[:1], lf.KVCache(model, strategy, 24))


def test_repr_says_what_is_in_force(model: PreTrainedModel) -> None:
    kv = lf.KVCache(model, lf.Strategy("liquid_fusion", sink_size=2, sink_update_rate=0.25, peak_ratio=0.75), 40)
    new = repr(kv)
    for part in (
        "liquid_fusion",
        "budget=40",
        "sink_size=2",
        "sink_update_rate=0.25",
        "peak_ratio=0.75",
        "evictions=0",
    ):
        assert part in new
    generate(model, padded((50,))[0], kv)
    assert kv.evictions > 0
    assert f"evictions={kv.evictions}" in repr(kv)
    assert str(kv.nbytes) in repr(kv)
    assert "sink_size" not in repr(lf.KVCache(model, "h2o", 40)), "h2o has no sinks"


def test_evictions_count_what_is_gone(model: PreTrainedModel) -> None:
    """Tokens fed minus tokens held, over layers, rows and heads."""
    kv = lf.KVCache(model, "h2o", 24)
    ids, mask = padded((40, 31))
    generate(model, ids, kv, attention_mask=mask)
    fed = (40 + 29) + (31 + 29)  # the last new token is never fed
    assert kv.evictions == 2 * 2 * (fed - 2 * 24)


def test_reading_an_unused_cache(model: PreTrainedModel) -> None:
    kv = lf.KVCache(model, "h2o", 24)
    with pytest.raises(lf.CacheError, match="not been used"):
        kv.positions(0)
    assert kv.nbytes == 0
    generate(model, padded((10,))[0], kv)
    kv.positions(0).fill_(99)
    assert kv.positions(0).max() < 40, "positions() hands out a copy"


def test_the_percentage_refers_to_the_prompt(model: PreTrainedModel) -> None:
    assert lf.KVCache(model, "h2o", cache_size=20, prompt_tokens=101).spec.budget == 21
    assert lf.KVCache(model, "streaming", cache_size=4, prompt_tokens=100).spec.budget == 8, "sinks + 4 at least"
    with pytest.raises(lf.ConfigError, match="both"):
        lf.KVCache(model, "h2o", 24, cache_size=20, prompt_tokens=100)
    with pytest.raises(lf.ConfigError, match="prompt_tokens"):
        lf.KVCache(model, "h2o", cache_size=20)


@pytest.mark.parametrize(
    ("strategy", "budget", "options", "named"),
    [
        ("lru", 64, {}, "lru"),
        ("streaming", 7, {}, "7"),
        ("h2o", 0, {}, "0"),
        ("h2o", 64, {"heavy_ratio": 1.5}, "1.5"),
        ("liquid_fusion", 64, {"peak_ratio": -0.5}, "-0.5"),
        ("liquid_fusion", 64, {"sink_update_rate": float("nan")}, "NaN"),
        ("liquid_fusion", 64, {"eviction_interval": 9}, "9"),
        ("liquid_fusion", 64, {"sinks": "floating"}, "floating"),
    ],
)
def test_bad_parameters_are_named(
    model: PreTrainedModel, strategy: str, budget: int, options: dict[str, Any], named: str
) -> None:
    before = dict(model.__dict__)
    with pytest.raises(lf.ConfigError, match=named):
        lf.KVCache(model, lf.Strategy(strategy, **options), budget)
    assert model.__dict__ == before
    assert not hook.installed(model)


def test_full_accepts_a_budget_and_ignores_it(model: PreTrainedModel) -> None:
    kv = lf.KVCache(model, "full", 8)
    generate(model, padded((40,))[0], kv)
    assert kv.spec.budget is None
    assert (kv.positions(0) >= 0).sum(-1).tolist() == [[69, 69]]


def test_uninstall_leaves_no_trace(model: PreTrainedModel) -> None:
    ids = padded((30,))[0]
    attributes, forward, implementation = set(model.__dict__), model.forward, model.config._attn_implementation
    expected = generate(model, ids)
    kv = lf.KVCache(model, "liquid_fusion", 24)
    generate(model, ids, kv)
    assert model.config._attn_implementation == implementation, "switched only while a call runs"
    assert generate(model, ids) == expected, "calls without a KVCache are untouched"
    lf.uninstall(model)
    assert set(model.__dict__) == attributes
    assert model.forward == forward
    assert model.config._attn_implementation == implementation
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert generate(model, ids) == expected
    kv.reset()
    with pytest.raises(lf.CacheError):
        generate(model, ids, kv)
    lf.uninstall(model)  # twice is harmless


def test_uninstall_gives_back_a_forward_of_its_own(model: PreTrainedModel) -> None:
    """Someone wrapped `forward` before: that wrapper is what comes back."""
    original = model.forward
    calls = []

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    mine.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    model.forward = mine  # type: ignore[method-assign]
    kv = lf.KVCache(model, "h2o", 24)
    feed_all(model, kv, padded((10,)))
    assert calls
    lf.uninstall(model)
    assert model.forward is mine


@pytest.mark.parametrize("how", ["copied", "saved"])
@pytest.mark.parametrize("own", [False, True])
def test_a_copied_model_is_its_own(model: PreTrainedModel, tmp_path: Path, how: str, own: bool) -> None:
    """What copies a model that has KVCaches, as trainers do for a reference, gets one with weights of its own."""
    if own:
        model.forward = functools.partial(type(model).forward, model)
    ids = padded((30,))[0]
    expected = generate(model, ids, lf.KVCache(model, "h2o", 24))
    if how == "copied":
        other = copy.deepcopy(model)
    else:
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert generate(other, ids, lf.KVCache(other, "h2o", 24)) == expected
    for parameter in other.parameters():
        parameter.data.zero_()
    assert other(ids).logits.abs().max() == 0
    assert generate(model, ids, lf.KVCache(model, "h2o", 24)) == expected
    lf.uninstall(other)
    assert ("forward" in other.__dict__) == own
    assert other(ids).logits.abs().max() == 0


def feed_all(model: PreTrainedModel, kv: Any, prompt: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    return list(feed(model, kv, *prompt, (prompt[0].shape[1],)))


def test_several_caches_share_one_wrapper(model: PreTrainedModel) -> None:
    ids, mask = padded((30,))
    kvs = [lf.KVCache(model, "liquid_fusion", 24) for _ in range(3)]
    wrapped = model.forward
    single = lf.KVCache(model, "liquid_fusion", 24)
    alone = [logits for logits, _ in prompt_then_greedy(model, single, ids, mask, (30,), 9)]
    assert model.forward == wrapped
    # Interleaved, so that a state shared by mistake shows.
    for calls in zip(*(prompt_then_greedy(model, kv, ids, mask, (30,), 9) for kv in kvs), alone, strict=True):
        *ours, expected = calls
        for logits, _ in ours:
            assert torch.equal(logits, expected)


def test_a_failed_call_leaves_the_model_and_stops_the_cache(model: PreTrainedModel) -> None:
    """An error in the middle of the forward pass: the model is as before, the cache asks for reset()."""
    prompt, implementation = padded((30,)), model.config._attn_implementation
    kv = lf.KVCache(model, "liquid_fusion", 24)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("in layer 1")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        feed_all(model, kv, prompt)
    hook.remove()
    assert model.config._attn_implementation == implementation
    with pytest.raises(lf.CacheError, match=r"reset\(\)"):
        feed_all(model, kv, prompt)
    kv.reset()
    own, other = feed_all(model, kv, prompt), feed_all(model, lf.KVCache(model, "liquid_fusion", 24), prompt)
    assert torch.equal(own[0], other[0])


def test_nan_is_a_score_error(model: PreTrainedModel) -> None:
    kv = lf.KVCache(model, "h2o", 24)
    prompt = padded((30,))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(lf.ScoreError, match=r"(?i)nan"):
        feed_all(model, kv, prompt)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    inner = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", padding_side="left")


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def test_use_gives_every_pipeline_call_a_new_cache(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = padded((40, 25), seed=2)[0].clamp(min=2)
    texts = [words(ids[0].tolist()), words(ids[1, 15:].tolist())]
    bounded = generate(model, ids[:1], lf.KVCache(model, "streaming", 24))[0][40:]
    assert bounded != generate(model, ids[:1])[0][40:], "the bound must change the answer, or nothing is tested"
    seen: list[int] = []
    update = lf.KVCache.update

    def watched(kv: lf.KVCache, *args: Any, **kwargs: Any) -> Any:
        seen.append(kv.get_seq_length())
        return update(kv, *args, **kwargs)

    monkeypatch.setattr(lf.KVCache, "update", watched)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 30, "return_full_text": False}
    with lf.use(model, strategy="streaming", budget=24):
        first = pipe(texts[0], **options)[0]["generated_text"]
        second = pipe(texts[0], **options)[0]["generated_text"]
        batch = pipe(texts, batch_size=2, **options)
    spoken = words([token for token in bounded if token > 1])  # padding and unknown are not printed
    assert first.split() == second.split() == spoken.split()
    assert batch[0][0]["generated_text"].split() == first.split()
    assert seen.count(0) == 3 * 2, "three new caches, two layers each"
    count = len(seen)
    pipe(texts[0], **options)
    assert len(seen) == count, "no KVCache outside the context"


def test_use_restores_generate_and_keeps_what_is_given(model: PreTrainedModel) -> None:
    ids = padded((40,))[0]
    expected, original = generate(model, ids), model.generate
    own = lf.KVCache(model, "full")
    with lf.use(model, strategy="streaming", budget=24):
        assert generate(model, ids) != expected
        assert generate(model, ids, own) == expected, "a cache passed by the caller is used as it is"
        assert own.get_seq_length() == 69
    assert model.generate == original
    assert "generate" not in model.__dict__
    with pytest.raises(KeyError), lf.use(model, budget=24):
        raise KeyError
    assert "generate" not in model.__dict__
    assert generate(model, ids) == expected


def test_use_takes_a_percentage_of_each_prompt(model: PreTrainedModel) -> None:
    ids = padded((100,))[0]
    with lf.use(model, strategy="h2o", cache_size=20):
        for length in (100, 60):
            expected = generate(model, ids[:, :length], lf.KVCache(model, "h2o", length // 5))
            assert generate(model, ids[:, :length]) == expected


def test_use_refuses_on_entering(model: PreTrainedModel) -> None:
    with pytest.raises(lf.ConfigError, match="lru"), lf.use(model, strategy="lru", budget=24):
        pytest.fail("entered")
    with pytest.raises(lf.ConfigError), lf.use(model, strategy="streaming", budget=3):
        pytest.fail("entered")


@pytest.mark.parametrize("assistance", ["assistant model", "prompt lookup"])
def test_assisted_decoding_is_refused_before_any_work(model: PreTrainedModel, assistance: str) -> None:
    kv = lf.KVCache(model, "h2o", 24)
    options = {"prompt_lookup_num_tokens": 3} if assistance == "prompt lookup" else {"assistant_model": build("llama")}
    with pytest.raises(lf.UnsupportedError, match="assisted decoding"):
        generate(model, padded((30,))[0], kv, **options)
    assert kv.get_seq_length() == 0
    assert generate(model, padded((30,))[0], kv), "the refusal did not spoil the cache"


@pytest.mark.parametrize("length", [5, 30, 58, 59])
def test_a_stale_cache_with_a_new_prompt(model: PreTrainedModel, length: int) -> None:
    """A prompt no longer than what the cache has seen cannot continue it."""
    kv = lf.KVCache(model, "h2o", 24)
    ids = padded((30,))[0]
    generate(model, ids, kv)
    kept = positions(kv)
    with pytest.raises(lf.CacheError, match=r"reset\(\)"):
        generate(model, padded((length,), seed=9)[0], kv)
    assert positions(kv) == kept, "refused before any work"
    kv.reset()
    fresh = generate(model, ids, lf.KVCache(model, "h2o", 24))
    assert generate(model, ids, kv) == fresh


def test_a_second_turn_continues(model: PreTrainedModel) -> None:
    """The whole conversation so far plus new tokens is what `generate` is given in a chat."""
    ids = padded((60,))[0]
    kv = lf.KVCache(model, "liquid_fusion", 256)
    first = torch.tensor(generate(model, ids[:, :30], kv))
    turn = torch.cat([first, ids[:, 30:45]], 1)
    assert generate(model, turn, kv) == generate(model, turn)


def test_a_bare_loop_that_does_not_continue(model: PreTrainedModel) -> None:
    kv = lf.KVCache(model, "h2o", 24)
    feed_all(model, kv, padded((30,)))
    ids, keyword = torch.ones(1, 1, dtype=torch.int64), cache_keyword(model)
    with pytest.raises(lf.CacheError, match=r"position_ids\[0, 0\] is 7"):
        model(input_ids=ids, position_ids=torch.tensor([[7]]), **{keyword: kv})
    with pytest.raises(lf.CacheError, match="attention_mask"):
        model(input_ids=ids, attention_mask=torch.ones(1, 4), **{keyword: kv})
    with pytest.raises(lf.CacheError, match="2 rows"):
        model(input_ids=ids.expand(2, -1), **{keyword: kv})
    with pytest.raises(lf.UnsupportedError, match="output_attentions"):
        model(input_ids=ids, output_attentions=True, **{keyword: kv})
    with pytest.raises(lf.UnsupportedError, match="attention_mask"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 1, 31), **{keyword: kv})
    with torch.no_grad():
        model(input_ids=ids, position_ids=torch.tensor([[30]]), **{keyword: kv})
    assert kv.get_seq_length() == 31, "refused calls left the cache usable"


def test_the_cache_of_another_model(model: PreTrainedModel) -> None:
    other = build("llama")
    kv = lf.KVCache(other, "h2o", 24)
    with pytest.raises(lf.CacheError, match="the model it was built for"):
        feed_all(model, kv, padded((10,)))
    lf.KVCache(model, "h2o", 24)
    with pytest.raises(lf.CacheError, match="another"):
        feed_all(model, kv, padded((10,)))
    assert kv.get_seq_length() == 0


def test_the_decoder_inside_the_model_is_not_the_model(model: PreTrainedModel) -> None:
    """`model.model(...)` bypasses the wrapper: an error, not silence."""
    kv = lf.KVCache(model, "h2o", 24)
    with pytest.raises(lf.CacheError, match=r"model\(\.\.\.\)"):
        model.model(input_ids=padded((10,))[0], **{cache_keyword(model.model): kv})


def test_what_a_bounded_cache_cannot_do(model: PreTrainedModel) -> None:
    kv = lf.KVCache(model, "h2o", 24)
    for refused in (
        lambda: kv.crop(3),
        lambda: kv.batch_repeat_interleave(2),
        lambda: kv.batch_select_indices(torch.tensor([0])),
    ):
        with pytest.raises(lf.UnsupportedError):
            refused()


SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4}
UNSUPPORTED = {
    "Falcon": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(**SMALL, num_hidden_layers=1, alibi=False)
    ),
    "Bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    ),
    "Mpt": lambda: transformers.MptForCausalLM(
        transformers.MptConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=4)
    ),
    "T5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    ),
    "Bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
        )
    ),
    "Mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", UNSUPPORTED)
def test_unsupported_architectures(architecture: str) -> None:
    """Named, with the reason, and left alone."""
    model = UNSUPPORTED[architecture]().eval()
    before = set(model.__dict__)
    with pytest.raises(lf.UnsupportedError, match=f"(?i){architecture}"):
        lf.KVCache(model, "h2o", 24)
    with pytest.raises(lf.UnsupportedError, match=f"(?i){architecture}"), lf.use(model, budget=24):
        pytest.fail("entered")
    assert set(model.__dict__) == before


def test_what_is_no_model_at_all() -> None:
    with pytest.raises(lf.UnsupportedError, match="Linear"):
        lf.KVCache(torch.nn.Linear(2, 2), "h2o", 24)  # type: ignore[arg-type]


def test_dropout_is_refused(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.train()
    with pytest.raises(lf.UnsupportedError, match=r"model\.eval\(\)"):
        feed_all(model, lf.KVCache(model, "h2o", 24), padded((10,)))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")], ids=str)
@pytest.mark.parametrize("positions", ["absolute", "cache"])
def test_the_process_has_defaults_of_its_own(
    model: PreTrainedModel, default: torch.dtype | torch.device, positions: str
) -> None:
    """`torch.set_default_dtype` and `torch.set_default_device` change nothing of what is computed and kept."""
    ids, mask = padded((40, 27, 33))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        kv = lf.KVCache(model, "liquid_fusion", 24, positions=positions)
        logits = [one for one, _ in prompt_then_greedy(model, kv, ids, mask, (10, 4, 15, 1, 10), 20)]
        return torch.stack(logits), torch.stack([kv.positions(layer) for layer in range(2)])

    expected = run()
    with defaults(default):
        found = run()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("strategy", ["full", "streaming", "liquid_fusion"])
def test_autocast(model: PreTrainedModel, strategy: str) -> None:
    """Slots hold what the cast layers make, and the logits are as near to those of float32 as with transformers' cache.

    Rotary positions leave queries and keys in float32 there, the values are in bfloat16.
    """
    ids, mask = padded((40, 40))

    def run(kv: Any, cast: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            return torch.cat([logits.float() for logits in feed(model, kv, ids, mask, (30, *[1] * 10))])

    exact = run(DynamicCache(), False)
    kv = lf.KVCache(model, strategy, 96)
    error = (run(kv, True) - exact).norm() / exact.norm()
    theirs = (run(DynamicCache(), True) - exact).norm() / exact.norm()
    assert 0 < error < 2 * theirs
    assert kv.keys_values(0)[0].dtype == kv.keys_values(0)[1].dtype == torch.bfloat16
    with pytest.raises(lf.CacheError, match=r"layer 0 makes torch\.float32 keys, the cache holds torch\.bfloat16"):
        model(ids[:, :1], **{cache_keyword(model): kv})


def test_made_in_inference_mode_used_outside(model: PreTrainedModel) -> None:
    """Buffers allocated inside `inference_mode` would refuse to be written outside."""
    ids, mask = padded((30,))
    kv = lf.KVCache(model, "liquid_fusion", 24)
    calls = prompt_then_greedy(model, kv, ids, mask, (20, 10), 3)
    with torch.inference_mode():
        next(calls)
    assert len(list(calls)) == 4
    assert not kv.keys_values(0)[0].is_inference()
    assert not kv.keys_values(0)[0].requires_grad


def test_gradients_do_not_pile_up(model: PreTrainedModel) -> None:
    """A loop without `no_grad` must not keep every step's graph alive through the slots."""
    kv = lf.KVCache(model, "liquid_fusion", 24)
    ids, keyword = padded((40,))[0], cache_keyword(model)
    model(ids[:, :30], **{keyword: kv})
    model(ids[:, 30:31], **{keyword: kv})
    for layer in range(2):
        assert all(tensor.grad_fn is None and not tensor.requires_grad for tensor in kv.keys_values(layer))


def test_threads_take_turns(model: PreTrainedModel) -> None:
    """Several conversations in threads, with and without a KVCache, on one model: each goes as if it were alone."""

    def talk(number: int) -> list[list[int]]:
        kv = lf.KVCache(model, "liquid_fusion", 24) if number % 2 else DynamicCache()
        return generate(model, padded((40,), seed=number)[0], kv)

    expected = [talk(number) for number in range(6)]
    lf.uninstall(model)
    before, interval = model.config._attn_implementation, sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(talk, (1, 3, 5))) == expected[1::2]  # these race to install, too
            assert list(pool.map(talk, range(6))) == expected
    finally:
        sys.setswitchinterval(interval)
    assert model.config._attn_implementation == before


def test_a_wrapped_model_compiles_whole(model: PreTrainedModel) -> None:
    lf.KVCache(model, budget=24)
    ids = padded((12,))[0]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_dynamic_cache_still_works_beside(model: PreTrainedModel) -> None:
    ids = padded((30,))[0]
    expected = generate(model, ids, DynamicCache())
    lf.KVCache(model, "h2o", 24)
    assert generate(model, ids, DynamicCache()) == expected
