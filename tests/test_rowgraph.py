"""Decode steps of rows that come and go, each at its own distance from the host's ledger: as each row alone.

A plain twin stands in for the decode kernel, beside copies of the host's memory as on a GPU.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import liquidfusion as lf
import plain_decode
from alone import Alone
from liquidfusion.compute import kernels
from liquidfusion.hf.engine import Engine
from liquidfusion.run.sampling import Sampling
from test_engine import ids_of, kept, prompt_of
from tiny import build

CHUNK = 12

pytestmark = pytest.mark.skipif(not hasattr(kernels, "decode"), reason="needs Triton to be installed")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Tiny Llama in float64."""
    return build("llama").double()


@pytest.fixture(params=[0, 1], ids=["at once", "one step of lag"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as if the kernels ran on it."""
    monkeypatch.setattr("liquidfusion.hf.engine.lag_on", lambda _: request.param)
    monkeypatch.setattr("liquidfusion.hf.rows.kernels_run_on", lambda _: True)
    monkeypatch.setattr("liquidfusion.state.group.shares_memory", lambda *_: False)
    monkeypatch.setattr("liquidfusion.hf.rows.SIZES", (1, 2))
    monkeypatch.setattr("liquidfusion.run.rowscores.AT_ONCE", (1, 2))  # the scores of three rows go in two turns
    monkeypatch.setattr(kernels, "decode", plain_decode.decode)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("strategy", ["liquid_fusion", "h2o", "streaming", "tova", "keydiff"])
@pytest.mark.usefixtures("device")
def test_every_row_as_if_alone(model: PreTrainedModel, strategy: str, interval: int) -> None:
    dice = random.Random(f"{strategy} {interval}")
    options: dict[str, Any] = {"strategy": lf.Strategy(strategy, eviction_interval=interval), "budget": 28}
    with Engine(model, rows=4, chunk=CHUNK, step_tokens=2 * CHUNK, **options) as engine:
        assert engine._own._row_graph is not None
        work = []
        for number in range(8):
            prompt = prompt_of(dice.choice([1, 3, 20, 40, 31]), number)
            sampling = Sampling(
                max_tokens=dice.randint(2, 30), temperature=dice.choice([0.0, 0.9]), seed=number, repetition_penalty=1.1
            )
            work.append((prompt, sampling, engine.submit(prompt, sampling, keep=True)[0]))
        work[3][2].cancel()
        for prompt, sampling, request in work:
            ids = ids_of(request)
            assert request.error is None
            own = Alone(model, CHUNK, sampling, sampling.seed or 0, **options)
            expected = own.run(prompt)
            assert ids == expected[: len(ids)]
            if request.finish_reason == "cancelled":
                continue
            assert len(ids) == len(expected)
            for mine, theirs in zip(kept(request), own.kept(), strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("device")
def test_the_device_keeps_what_the_host_says(model: PreTrainedModel) -> None:
    with Engine(model, rows=2, chunk=CHUNK, budget=28) as engine:
        (first,) = engine.submit(prompt_of(30, 1), Sampling(max_tokens=25), keep=True)
        ids_of(first)
        state = first.state
        assert state is not None
        # Resumed beside another one: what the device held has reached the host and goes back.
        (other,) = engine.submit(prompt_of(9, 2), Sampling(max_tokens=30))
        prompt = [*state.tokens, 5, 6, 7]
        (again,) = engine.submit(prompt, Sampling(max_tokens=20), resume=state)
        ids = ids_of(again)
        ids_of(other)
    own = Alone(model, CHUNK, Sampling(max_tokens=25), 0, budget=28)
    own.run(prompt_of(30, 1))
    own.sampling = Sampling(max_tokens=20)
    if len(state.tokens) > own.read:
        own._feed(own.tokens[-1:])
    assert ids == own.run(prompt)
