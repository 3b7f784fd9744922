"""How calls of a model reach its caches: contexts, other people's wrappers, compilers, copies and replicas."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

import liquidfusion as lf
from tiny import build, cache_keyword, padded

BUDGET = 12
IDS, MASK = padded((30,))


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    model = build("llama")
    yield model
    lf.uninstall(model)


def tokens(model: PreTrainedModel, kv: Any = None, **options: Any) -> list[int]:
    given = {} if kv is None else {cache_keyword(model): kv}
    out = model.generate(IDS, attention_mask=MASK, max_new_tokens=15, do_sample=False, **options, **given)
    return out[0, 30:].tolist()


def bounded(budget: int = BUDGET) -> list[int]:
    """What a model of the same weights answers with a KVCache."""
    alone = build("llama")
    return tokens(alone, lf.KVCache(alone, "streaming", budget))


def test_contexts_nest(model: PreTrainedModel) -> None:
    lf.KVCache(model, "streaming", BUDGET)
    plain, before = tokens(model), (type(model), model.generate, dict(model.__dict__))
    with lf.use(model, "streaming", budget=BUDGET):
        with lf.use(model, "streaming", 20):
            assert tokens(model) == bounded(20)
        assert tokens(model) == bounded()
    assert tokens(model) == plain
    assert (type(model), model.generate, dict(model.__dict__)) == before
    assert len({tuple(x) for x in (plain, bounded(), bounded(20))}) == 3, "else nothing is tested"


def test_contexts_overlap(model: PreTrainedModel) -> None:
    plain = tokens(model)
    first, second = lf.use(model, "streaming", BUDGET), lf.use(model, "streaming", 20)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert tokens(model) == bounded(20)
    second.__exit__(None, None, None)
    assert tokens(model) == plain


def test_a_context_ends_when_it_raises_and_leaves_caches_alone(model: PreTrainedModel) -> None:
    kv = lf.KVCache(model, "streaming", BUDGET)
    with pytest.raises(ZeroDivisionError), lf.use(model, "streaming", 20):
        raise ZeroDivisionError
    assert tokens(model, kv) == bounded()


def test_a_context_takes_what_a_cache_takes(model: PreTrainedModel) -> None:
    with lf.use(model, lf.Strategy("streaming", sink_size=2), BUDGET):
        inside = tokens(model)
    assert inside == tokens(model, lf.KVCache(model, lf.Strategy("streaming", sink_size=2), BUDGET))
    with pytest.raises(lf.ConfigError, match="peak_ratio"), lf.use(model, "liquid_fusion", BUDGET, peak_ratio=0.5):
        pytest.fail("entered")


@pytest.mark.parametrize("own", [False, True])
def test_a_context_wraps_a_generate_of_the_models_own(model: PreTrainedModel, own: bool) -> None:
    if own:
        model.generate = functools.partial(type(model).generate, model)  # type: ignore[assignment]
    mine = model.__dict__.get("generate")
    with lf.use(model, "streaming", BUDGET):
        assert tokens(model) == bounded()
    assert model.__dict__.get("generate") is mine


def test_generation_without_a_cache_inside_a_context(model: PreTrainedModel) -> None:
    plain = tokens(model)
    with lf.use(model, "streaming", budget=BUDGET):
        assert tokens(model, use_cache=False) == plain
        assert tokens(model, generation_config=GenerationConfig(use_cache=False, pad_token_id=0)) == plain
        with pytest.raises(lf.ConfigError, match="cache_implementation='static'"):
            tokens(model, cache_implementation="static")
        with pytest.raises(lf.ConfigError, match="cache_implementation='static'"):
            tokens(model, generation_config=GenerationConfig(cache_implementation="static", pad_token_id=0))
        assert tokens(model) == bounded()


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerates_mixed_precision(model: PreTrainedModel, when: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    if when == "after":
        lf.KVCache(model, "streaming", BUDGET)
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    theirs = prepared.forward
    kv = lf.KVCache(prepared, "streaming", BUDGET)
    answer = tokens(prepared, kv)
    assert kv.get_seq_length() == 44
    assert kv.keys_values(0)[0].dtype == torch.bfloat16
    with lf.use(prepared, "streaming", BUDGET):
        assert tokens(prepared) == answer
    assert prepared.forward == theirs
    lf.uninstall(model)
    assert prepared(IDS).logits.dtype == torch.float32


@pytest.mark.parametrize("order", ["ours first", "theirs first"])
def test_wrappers_of_others_stay(model: PreTrainedModel, order: str) -> None:
    calls = []
    if order == "ours first":
        lf.KVCache(model, "streaming", BUDGET)
    inner = model.forward

    @functools.wraps(inner)
    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = mine  # type: ignore[method-assign]
    assert tokens(model, lf.KVCache(model, "streaming", BUDGET)) == bounded()
    assert len(calls) == 15
    lf.uninstall(model)
    assert model.forward is mine
    plain = tokens(build("llama"))
    assert tokens(model) == plain
    assert len(calls) == 30
    del model.forward
    assert tokens(model) == plain
    assert len(calls) == 30


@pytest.mark.parametrize("how", ["forward before", "forward after", "module", "in place"])
def test_compiled_models(model: PreTrainedModel, how: str) -> None:
    def compiled(function: Any) -> Any:
        return torch.compile(function, backend="eager")

    called: Any = model
    if how == "forward before":
        model.forward = compiled(model.forward)  # type: ignore[method-assign]
    kv = lf.KVCache(model, "streaming", BUDGET)
    if how == "forward after":
        model.forward = compiled(model.forward)  # type: ignore[method-assign]
    elif how == "module":
        called = compiled(model)
    elif how == "in place":
        model.compile(backend="eager")
    alone = build("llama")
    expected = lf.KVCache(alone, "streaming", BUDGET)
    with torch.no_grad():
        for columns in (slice(0, 20), slice(20, 21), slice(21, 30)):
            got = called(input_ids=IDS[:, columns], **{cache_keyword(model): kv}).logits
            own = alone(input_ids=IDS[:, columns], **{cache_keyword(alone): expected}).logits
            torch.testing.assert_close(got, own)
        torch.testing.assert_close(called(IDS).logits, alone(IDS).logits)
    assert torch.equal(kv.positions(1), expected.positions(1))
    torch.compiler.reset()


def test_export(model: PreTrainedModel) -> None:
    lf.KVCache(model, "streaming", BUDGET)
    exported = torch.export.export(model, (IDS,), {"use_cache": False})
    with torch.no_grad():
        found = exported.module()(IDS, use_cache=False).logits
        torch.testing.assert_close(found, model(IDS, use_cache=False).logits)


def replica(model: PreTrainedModel) -> Any:
    made: Any = model._replicate_for_data_parallel()  # type: ignore[operator]
    made._modules = {name: copy.deepcopy(module) for name, module in model._modules.items()}
    return made


@pytest.mark.parametrize("how", [replica, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("inside", [False, True])
def test_copies_answer_with_their_own_weights(
    model: PreTrainedModel, how: Callable[[PreTrainedModel], Any], inside: bool
) -> None:
    kv = lf.KVCache(model, "streaming", BUDGET)
    with lf.use(model, "streaming", 20) if inside else torch.no_grad():
        other = how(model)
        if how is copy.copy:
            other._modules = {name: copy.deepcopy(module) for name, module in model._modules.items()}
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert other(IDS).logits.abs().max() == 0
        with pytest.raises(lf.CacheError, match=r"another|model it was built for"):
            other(IDS, **{cache_keyword(model): kv})
        assert tokens(model, lf.KVCache(model, "streaming", BUDGET)) == bounded()
    own = lf.KVCache(other, "streaming", BUDGET)
    assert other(IDS, **{cache_keyword(other): own}).logits.abs().max() == 0
    lf.uninstall(other)
    assert tokens(model, kv) == bounded()


def test_forward_called_by_its_name(model: PreTrainedModel) -> None:
    """As adapters do that hold the model inside."""
    kv, other = lf.KVCache(model, "streaming", BUDGET), lf.KVCache(model, "streaming", BUDGET)
    with torch.no_grad():
        found = model.forward(IDS, **{cache_keyword(model): kv}).logits
        assert torch.equal(found, model(IDS, **{cache_keyword(model): other}).logits)


def test_positional_arguments(model: PreTrainedModel) -> None:
    kv, other = lf.KVCache(model, "streaming", BUDGET), lf.KVCache(model, "streaming", BUDGET)
    with torch.no_grad():
        found: Tensor = model(IDS, MASK, **{cache_keyword(model): kv}).logits
        assert torch.equal(found, model(input_ids=IDS, **{cache_keyword(model): other}).logits)


def test_the_class_is_as_before(model: PreTrainedModel) -> None:
    kind = type(model)
    lf.KVCache(model, "streaming", BUDGET)
    assert isinstance(model, kind)
    assert type(model).__name__ == kind.__name__
    assert type(model).__module__ == kind.__module__
    lf.uninstall(model)
    assert type(model) is kind
