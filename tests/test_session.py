"""Saving, loading and copying: going on equals not having stopped, and a file that is not right is refused."""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import liquidfusion as lf
from liquidfusion.compute import kernels
from liquidfusion.geometry import Geometry
from liquidfusion.state import session
from tiny import build, cache_keyword, cached, padded, tiny

STRATEGIES = tuple(info["name"] for info in lf.strategies())
MUTATIONS = int(os.environ.get("LIQUIDFUSION_TEST_MUTATIONS", "300"))
LENGTHS = (40, 27)


def start(model: PreTrainedModel, kv: lf.KVCache, steps: int = 12) -> tuple[Tensor, Tensor]:
    """Tokens and mask after a padded prompt and some decode steps."""
    ids, mask = padded(LENGTHS)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, **{cache_keyword(model): kv})
    return out, torch.nn.functional.pad(mask, (0, steps), value=1)


def go_on(model: PreTrainedModel, kv: lf.KVCache, ids: Tensor, mask: Tensor, chunk: int = 0) -> list[Any]:
    """Tokens of a further turn, what is kept after it, and how much was evicted."""
    if chunk:
        ids = torch.cat([ids, padded((chunk, chunk), seed=7)[0]], 1)
        mask = torch.nn.functional.pad(mask, (0, chunk), value=1)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, **{cache_keyword(model): kv})
    kept = [kv.positions(layer).tolist() for layer in range(len(kv))]
    return [out.tolist(), kept, kv.evictions, kv.get_seq_length()]


@pytest.mark.parametrize("how", ["file", "copy"])
@pytest.mark.parametrize("name", ["llama", "mistral with a window", "gemma3"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_going_on_equals_not_having_stopped(tmp_path: Path, name: str, strategy: str, how: str) -> None:
    model = tiny(name)
    kv = cached(model, strategy, 24, eviction_interval=2)
    ids, mask = start(model, kv)
    if how == "file":
        kv.save(tmp_path / "talk.safetensors")
        assert [path.name for path in tmp_path.iterdir()] == ["talk.safetensors"], "no temporary file stays"
        others = [lf.KVCache.load(tmp_path / "talk.safetensors", model) for _ in range(2)]
    else:
        others = [kv.copy(), copy.deepcopy(kv)]
    for other in others:
        assert other.spec == kv.spec
        assert repr(other) == repr(kv)
    expected = go_on(model, kv, ids, mask)
    assert go_on(model, others[0], ids, mask) == expected
    forked = go_on(model, others[1], ids, mask, chunk=9)
    assert forked[0] != expected[0], "a fork goes its own way"


@pytest.mark.parametrize("how", ["file", "copy"])
def test_reset_forgets_what_was_evicted_before(tmp_path: Path, how: str) -> None:
    """A cache taken over from elsewhere counts its evictions; emptied, it starts over as any other."""
    model = tiny("llama")
    kv = cached(model, "h2o", 24)
    start(model, kv)
    kv.save(tmp_path / "talk.safetensors")
    other = kv.copy() if how == "copy" else lf.KVCache.load(tmp_path / "talk.safetensors", model)
    assert other.evictions == kv.evictions > 0
    other.reset()
    assert other.evictions == 0
    start(model, other)
    assert other.evictions == kv.evictions


@pytest.mark.skipif(not hasattr(kernels, "decode") or torch.cuda.is_available(), reason="needs Triton's interpreter")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("how", ["file", "copy"])
def test_right_after_decode_steps_that_the_host_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(kernels, "available", lambda device: True)  # noqa: ARG005
    model = tiny("qwen3")
    kv = cached(model, "liquid_fusion", 24, eviction_interval=2)
    ids, mask = start(model, kv, 6)
    assert kv._graph is not None
    assert kv._graph.running
    kv.save(tmp_path / "talk")
    other = lf.KVCache.load(tmp_path / "talk", model) if how == "file" else kv.copy()
    tokens = [
        model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **{cache_keyword(model): cache})
        for cache in (kv, other)
    ]
    assert torch.equal(*tokens)
    for layer in range(2):
        assert torch.equal(kv.positions(layer).sort(-1).values, other.positions(layer).sort(-1).values)


def test_a_copy_shares_nothing() -> None:
    model = tiny("llama")
    kv = lf.KVCache(model, "liquid_fusion", 24)
    ids, mask = start(model, kv)
    other, before = kv.copy(), [tensor.clone() for tensor in (*kv.keys_values(0), *kv.scores(0), kv.positions(0))]
    go_on(model, other, ids, mask, chunk=5)
    for old, new in zip(before, (*kv.keys_values(0), *kv.scores(0), kv.positions(0)), strict=True):
        assert torch.equal(old, new)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("session") / "talk.safetensors"
    kv = lf.KVCache(tiny("llama"), "liquid_fusion", 24)
    start(tiny("llama"), kv)
    kv.save(path)
    return path


def rewritten(saved: Path, path: Path, change: Any, seal: bool = True) -> Path:
    """The session with `change(description, tensors)` applied, its digest made to fit again."""
    tensors = load_file(saved)
    with open(saved, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    description = json.loads(header["__metadata__"]["liquidfusion"])
    change(description, tensors)
    if seal:
        told = {k: v for k, v in description.items() if k not in ("version", "digest")}
        description["digest"] = session.State(told, tensors).digest()
    save_file(tensors, path, metadata={"liquidfusion": json.dumps(description)})
    return path


def put(name: str, index: Any, value: Any) -> Any:
    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name][index] = value

    return change


def tell(**values: Any) -> Any:
    return lambda description, _: description.update(values)


# Each with a digest that fits, as one who forges a file would make it.
FORGED = {
    "a position twice": (put("positions.0", (0, 0, 0, 0), 50), "twice|holds position"),
    "a position not seen": (put("positions.0", (0, 0, 0, 0), 999), "999"),
    "a slot that is not there": (put("queues.0", (0, 0, 0, 0), 24), "slot 24"),
    "a slot twice": (put("queues.0", (0, 0, 0), torch.tensor([3, 3] + [-1] * 22, dtype=torch.int32)), "twice"),
    "NaN": (put("mass.0", (0, 0, 0, 0), torch.nan), "mass.0"),
    "a negative score": (put("peak.0", (1, 1, 0, 3), -1.0), "peak.0"),
    "another shape": (lambda _, t: t.update({"keys.1": t["keys.1"][:, :, :9].clone()}), "keys.1"),
    "another dtype": (lambda _, t: t.update({"values.0": t["values.0"].half()}), "values.0"),
    "integers": (lambda _, t: t.update({"keys.0": t["keys.0"].int()}), "keys.0 is torch.int32.*floating point"),
    "a tensor missing": (lambda _, t: t.pop("mass.0"), "mass.0 is missing"),
    "a tensor too many": (lambda _, t: t.update({"keys.7": t["keys.1"].clone()}), "keys.7"),
    "more tokens than columns": (tell(seen=[52, 1000]), "seen"),
    "fewer tokens than stored": (tell(seen=[10, 38]), "."),
    "no rows": (tell(seen=[]), "seen"),
    "columns of another kind": (tell(columns="many"), "columns"),
    "negative evictions": (tell(evictions=-1), "evictions"),
    "another version": (tell(version=2), "version 1"),
    "an unknown strategy": (tell(spec={"strategy": "lru", "budget": 24}), "lru"),
    "an unknown parameter": (tell(spec={"strategy": "h2o", "budget": 24, "speed": 3}), "speed"),
    "a budget of another size": (tell(spec={"strategy": "liquid_fusion", "budget": 32}), "."),
    "a budget out of range": (tell(spec={"strategy": "liquid_fusion", "budget": -4}), "."),
    "no model": (tell(model=None), "model"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_files_are_refused(saved: Path, tmp_path: Path, case: str) -> None:
    change, message = FORGED[case]
    path = rewritten(saved, tmp_path / "forged", change)
    with pytest.raises(lf.CacheError, match=message):
        lf.KVCache.load(path, tiny("llama"))


def test_tampered_truncated_and_foreign_files_are_refused(saved: Path, tmp_path: Path) -> None:
    model, whole = tiny("llama"), saved.read_bytes()
    path = tmp_path / "file"
    changed = rewritten(saved, tmp_path / "changed", put("keys.0", (0, 0, 0, 0), 1.0), seal=False)
    with pytest.raises(lf.CacheError, match="was changed"):
        lf.KVCache.load(changed, model)
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(lf.CacheError, match="truncated"):
            lf.KVCache.load(path, model)
    path.write_bytes(b"a text" * 100)
    with pytest.raises(lf.CacheError, match="not in safetensors' format"):
        lf.KVCache.load(path, model)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(lf.CacheError, match="no session"):
        lf.KVCache.load(path, model)
    with pytest.raises(FileNotFoundError):
        lf.KVCache.load(tmp_path / "nothing", model)


def test_another_model_is_refused(saved: Path) -> None:
    for name, what in (("qwen2", "architecture"), ("mistral with a window", "architecture")):
        with pytest.raises(lf.CacheError, match=what):
            lf.KVCache.load(saved, tiny(name))
    with pytest.raises(lf.CacheError, match="dtype='float32'"):
        lf.KVCache.load(saved, build("llama").double())


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lf.KVCache.copy])
def test_copies_of_an_unused_cache_are_apart(how: Callable[[lf.KVCache], lf.KVCache]) -> None:
    kv = cached(tiny("llama"), "h2o", 24, positions="cache", eviction_interval=3)
    other = how(kv)
    assert repr(other) == repr(kv)
    assert other._positions == "cache"
    ids, mask = start(tiny("llama"), other)
    assert kv.get_seq_length() == 0
    assert start(tiny("llama"), kv)[0].tolist() == ids.tolist()
    assert go_on(tiny("llama"), kv, ids, mask) == go_on(tiny("llama"), other, ids, mask)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    kv = lf.KVCache(tiny("llama"), "h2o", 24)
    with pytest.raises(lf.CacheError, match="not been used"):
        kv.save(tmp_path / "x")
    start(tiny("llama"), kv)
    with pytest.raises(FileNotFoundError):
        kv.save(tmp_path / "no folder" / "x")
    kv.save(tmp_path / "x")
    with pytest.raises(lf.ConfigError, match="budget"):
        lf.KVCache.load(tmp_path / "x", tiny("llama"), budget=12)
    kv._broken = "ZeroDivisionError: in layer 1"
    with pytest.raises(lf.CacheError, match="half-way"):
        kv.save(tmp_path / "x")


def test_mutated_files_are_refused_or_equal(saved: Path, tmp_path: Path) -> None:
    """Bits flipped, bytes overwritten, removed, inserted or moved: a clear refusal, or the very same state."""
    model, whole = tiny("llama"), np.frombuffer(saved.read_bytes(), np.uint8)
    expected = session.read(saved, Geometry.of(model))
    header = int(whole[:8].view("<u8")[0]) + 8
    rng, equal = np.random.default_rng(0), 0
    path = tmp_path / "mutated"
    for _ in range(MUTATIONS):
        data = whole.copy()
        # Half of them in the header, which says what everything else means.
        end = header if rng.random() < 0.5 else len(data)
        at, size = int(rng.integers(end)), int(rng.integers(1, 9))
        match rng.integers(5):
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                data[at : at + size] = rng.integers(0, 256, len(data[at : at + size]))
            case 2:
                data = np.delete(data, slice(at, at + size))
            case 3:
                data = np.insert(data, at, rng.integers(0, 256, size))
            case 4:
                other = int(rng.integers(len(data) - size))
                data[at : at + size] = data[other : other + size][: len(data[at : at + size])]
        path.write_bytes(data.tobytes())
        try:
            kv = lf.KVCache.load(path, model)
        except lf.CacheError:
            continue
        equal += 1
        state = kv._state()
        assert state.description == expected.description
        assert state.digest() == expected.digest()
    assert equal < MUTATIONS / 4


def test_keys_of_another_dtype_than_the_model_makes(saved: Path, tmp_path: Path) -> None:
    """A file can say so, and a model can be cast while it has a cache."""

    def double(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensors[name].double() for name in ("keys.1", "values.1")}

    model = build("llama")
    kv = lf.KVCache.load(rewritten(saved, tmp_path / "double", double), model)
    call = {"input_ids": torch.tensor([[5], [6]]), cache_keyword(model): kv}
    with pytest.raises(lf.CacheError, match=r"layer 1 makes torch\.float32 keys, the cache holds torch\.float64"):
        model(**call)
    kv = lf.KVCache.load(saved, model)
    model.double()
    with pytest.raises(lf.CacheError, match=r"layer 0 makes torch\.float64 keys"):
        model(**call | {cache_keyword(model): kv})
