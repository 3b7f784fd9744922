"""The plan against what models and caches really take."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import liquidfusion as lf
from benchmodel import directory, loaded
from liquidfusion.bench.caches import CacheOptions
from liquidfusion.bench.cli import main
from liquidfusion.bench.jobs import planning
from liquidfusion.bench.jobs.planning import Device
from liquidfusion.bench.parameters import strategy_names
from liquidfusion.exceptions import ConfigError


@pytest.mark.parametrize("strategy", [name for name in strategy_names() if name != "full"])
def test_bytes_are_those_of_model_and_cache(strategy: str) -> None:
    model = loaded().model
    cache = lf.KVCache(model, strategy, 48)
    ids = torch.randint(2, 90, (3, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids, **{lf.cache_keyword(model): cache})
    found = planning.plan(
        planning.read_config(str(directory())),
        CacheOptions(strategy=strategy, budget=48),
        Device(1e9, 1e12, cuda=True),
        context=200,
        batch=3,
        dtype=torch.float32,
    )
    assert found.bounded_cache_bytes == cache.nbytes
    assert found.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert found.full_cache_bytes == 3 * 2 * 2 * 200 * 2 * 8 * 4


def test_arithmetic() -> None:
    config = planning.read_config(str(directory()))
    options: dict[str, Any] = {"context": 4096, "dtype": torch.float32, "reserve": 0.0}
    found = planning.plan(config, CacheOptions(budget=64), Device(2e6, 1e9, cuda=True), **options)
    row = found.bounded_cache_bytes
    assert found.bounded_largest_batch == (2e6 - found.weight_bytes) // row
    assert found.bounded_fits
    assert found.full_largest_batch == (2e6 - found.weight_bytes) // found.full_cache_bytes
    assert found.speedup == pytest.approx(found.full_step_seconds / found.bounded_step_seconds)
    assert found.bounded_least_seconds < found.bounded_step_seconds
    assert found.full_least_seconds < found.full_step_seconds
    assert found.speedup > 1
    tiny = planning.plan(config, CacheOptions(budget=64), Device(1000.0, 1e9, cuda=True), **options)
    assert not tiny.bounded_fits
    assert tiny.bounded_largest_batch == tiny.bounded_tokens_per_second == 0
    with pytest.raises(ConfigError, match="reserve"):
        planning.plan(config, CacheOptions(), Device(2e6, 1e9), **{**options, "reserve": 1.0})


@pytest.mark.parametrize(
    ("context", "batch", "compiled", "full_ms", "bounded_ms"),
    [
        (131072, 1, True, 74.7, 6.51),
        (131072, 1, False, 74.7, 7.88),
        # an earlier run of the kernels' prototype
        (32768, 1, False, 22.8, None),
        (2048, 1, False, 9.1, None),
        (2048, 64, False, None, 15.7),
        (2048, 64, True, None, 13.6),
        (2048, 192, False, None, 31.3),
    ],
)
def test_times_to_expect_are_those_measured(
    context: int, batch: int, compiled: bool, full_ms: float | None, bounded_ms: float | None
) -> None:
    """docs/performance.md: Llama-3.1-8B's shape on one H100."""
    found = planning.plan(
        planning.read_config("llama-3.1-8b"),
        CacheOptions(budget=2048, how={"compile": compiled}),
        planning.find_device("h100"),
        context=context,
        batch=batch,
    )
    for expected, measured in ((found.full_step_seconds, full_ms), (found.bounded_step_seconds, bounded_ms)):
        if measured is not None and expected is not None:
            assert 1000 * expected == pytest.approx(measured, rel=0.15)


@pytest.mark.filterwarnings("ignore:bits=")
@pytest.mark.parametrize("bits", [16, 8, 4, (4, 2), (16, 2)])
def test_bytes_of_coded_slots(bits: int | tuple[int, int]) -> None:
    model = loaded().model
    cache = lf.KVCache(model, "h2o", 48, bits=bits)
    with torch.no_grad():
        model(torch.randint(2, 90, (2, 100)), **{lf.cache_keyword(model): cache})
    options = CacheOptions.of(strategy="h2o", budget=48, bits=bits)
    config = planning.read_config(str(directory()))
    found = planning.plan(config, options, Device(1e9, 1e12), context=100, batch=2, dtype=torch.float32)
    # a layer whose keys few bits would spoil has more of them; only running the model tells
    assert found.bounded_cache_bytes <= cache.nbytes
    if min(bits if isinstance(bits, tuple) else (bits,)) == 16:
        assert found.bounded_cache_bytes == cache.nbytes


@pytest.mark.parametrize("bits", [None, 4])
def test_largest_budget_is_the_largest_that_fits(bits: int | None) -> None:
    config, options = planning.read_config(str(directory())), {"context": 4096, "batch": 3, "dtype": torch.float32}
    device = Device(3e6, 1e9)
    most = planning.plan(config, CacheOptions.of(bits=bits), device, **options).largest_budget  # type: ignore[arg-type]
    assert most > 64
    for budget, fits in ((most, True), (most + 1, False)):
        found = planning.plan(config, CacheOptions.of(budget=budget, bits=bits), device, **options)  # type: ignore[arg-type]
        assert found.bounded_fits == fits
        assert found.speedup is None


@pytest.mark.parametrize("name", planning.DEVICES)
def test_devices_are_plausible(name: str) -> None:
    device = planning.find_device(name)
    assert 8e9 <= device.memory <= 1e12
    assert 5e10 <= device.bandwidth <= 1e13


def test_this_machine() -> None:
    device = planning.find_device("this")
    assert device.memory > 1e8
    assert device.bandwidth > 1e7


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-m", str(directory()), "--gpu", "l4", "--context", "4096", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["budget"] == 2048
    assert main(["plan", "-m", str(directory()), "--cache-size", "10"]) == 0
    assert "largest batch" in capsys.readouterr().out
    assert main(["plan", "--shape", "custom", "--on", "laptop-ddr5", "--bits", "4"]) == 0
    shown = capsys.readouterr().out
    assert "largest budget that fits" in shown
    assert "to expect" not in shown
    assert main(["plan", "-m", str(directory()), "--gpu", "toaster"]) == 2
    assert "h100" in capsys.readouterr().err
    assert main(["plan", "-m", str(directory()), "--memory", "-1"]) == 2
    assert capsys.readouterr().err == "error: memory -1 GB is not above 0\n"


def test_a_step_reads_the_experts_that_its_tokens_reach() -> None:
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = planning.Weights.of(model)
    experts = 4 * 2 * 8 * 3 * 32 * 48
    dense = sum(p.nbytes for p in model.parameters()) - 4 * 96 * 32 - experts
    assert weights.read(1) == pytest.approx(dense + experts / 4)
    assert weights.read(2) == pytest.approx(dense + experts * (1 / 4 + 3 / 4 / 4))
    assert weights.read(1000) == pytest.approx(dense + experts)


def test_the_roofline_is_what_memory_and_bandwidth_allow() -> None:
    model = loaded().model
    weights = sum(p.nbytes for p in model.parameters())
    read, row = weights - model.get_input_embeddings().weight.nbytes, 2 * 2 * 150 * 2 * 8 * 4
    device = Device(weights + 3.5 * row, 1e9)
    assert planning.roofline(model, [100, 200], device) == (3, pytest.approx(3e9 / (read + 3 * row)))
    assert planning.roofline(model, [100, 200], device, most=2) == (2, pytest.approx(2e9 / (read + 2 * row)))
    assert planning.roofline(model, [2000], device) == (0, 0)


@pytest.mark.parametrize(
    ("card", "rate", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 2.95, 3.35),
        ("NVIDIA H100 PCIe", 1.75, 1.75),
        ("NVIDIA H100 NVL", 3.5, 3.5),
        ("NVIDIA H200", 4.1, 4.8),
        ("NVIDIA L4", 0.26, 0.3),
        ("NVIDIA L40S", 0.75, 0.864),
        ("NVIDIA GeForce RTX 4090", 0.92, 1.008),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0.5, 0.5),
        ("AMD Instinct MI300X", 4.3, 4.3),
    ],
)
def test_the_bandwidth_of_a_card_is_its_data_sheet_s(card: str, rate: float, bandwidth: float) -> None:
    assert planning.published(card, rate * 1e12) == bandwidth * 1e12
