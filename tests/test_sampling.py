"""Sampling many rows at once against transformers' logits processors, row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alone import choose, scores_of
from liquidfusion.compute import kernels
from liquidfusion.exceptions import ConfigError
from liquidfusion.run import drawing
from liquidfusion.run.drawing import draw, penalise, threshold, uniform
from liquidfusion.run.sampling import Sampler, Sampling

VOCABULARY = 50
CPU = torch.device("cpu")

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 40, 999]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.7]),
    frequency_penalty=st.sampled_from([0.0, -0.5, 1.5]),
    presence_penalty=st.sampled_from([0.0, 0.7, -1.0]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, 2.5, -1.0]), max_size=3),
    logprobs=st.sampled_from([None, 0, 4]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(SAMPLINGS, min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_many_rows_as_transformers_each_alone(samplings: list[Sampling], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = 7
    sampler = Sampler(rows, VOCABULARY, CPU)
    order = torch.randperm(rows, generator=generator).tolist()
    prompts = {}
    for row, sampling in zip(order, samplings, strict=False):
        prompts[row] = torch.randint(0, VOCABULARY, (6,), generator=generator).tolist()
        sampler.set(row, sampling, prompts[row], seed + row)
    own = dict(zip(order, samplings, strict=False))
    answers: dict[int, list[int]] = {row: [] for row in own}
    for step in range(4):
        here = tuple(row for row in own if step != 2 or row % 2)  # some rows pause
        if not here:
            continue
        logits = 3 * torch.randn(len(here), VOCABULARY, dtype=torch.float64, generator=generator)
        before = logits.clone()
        drawn = sampler(logits, here)
        assert torch.equal(logits, before)
        told = [lane for lane, row in enumerate(here) if own[row].logprobs is not None]
        assert list(drawn.told) == told
        for lane, row in enumerate(here):
            token = int(drawn.ids[lane])
            assert token == choose(own[row], prompts[row], answers[row], logits[lane], seed + row)
            answers[row].append(token)
            if lane in told:
                place, known = told.index(lane), logits[lane].log_softmax(-1)
                number = own[row].logprobs or 0
                assert drawn.logprobs is not None
                assert drawn.top_ids is not None
                assert drawn.top_logprobs is not None
                assert math.isclose(float(drawn.logprobs[place]), float(known[token]))
                torch.testing.assert_close(drawn.top_logprobs[place, :number], known.topk(number).values)
                assert drawn.top_ids[place, :number].tolist() == known.topk(number).indices.tolist()


@pytest.mark.parametrize("candidates", [3, 10, 1024])
@settings(max_examples=40, deadline=None)
@given(SAMPLINGS, st.integers(0, 1000))
def test_the_same_tokens_pass_as_transformers_lets_through(candidates: int, sampling: Sampling, seed: int) -> None:
    logits = 3 * torch.randn(4, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    table = torch.tensor([[1.0, sampling.top_k, sampling.top_p, sampling.min_p]], dtype=torch.float64).expand(4, -1)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "CANDIDATES", candidates)
        passed = weights >= threshold(weights, table)
    warm = Sampling(temperature=1.0, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
    for row in range(4):
        assert torch.equal(passed[row], scores_of(warm, [0], [], logits[row]).isfinite())


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([1.0, 0.0, -torch.inf, 2.0, -1.0])
    noise = uniform(np.full(20_000, 7, np.uint64), np.arange(20_000, dtype=np.uint64))
    assert 0 <= noise.min() < noise.max() < 1
    table = torch.tensor([[1.0, 0, 1, 0]]).expand(20_000, -1)
    ids = draw(logits.expand(20_000, -1), table, torch.from_numpy(noise), None)
    shares = torch.bincount(ids, minlength=5) / 20_000
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.012, rtol=0)
    assert shares[2] == 0


def test_noise_differs_between_steps_and_seeds() -> None:
    seeds, steps = np.meshgrid(np.arange(100, dtype=np.uint64), np.arange(100, dtype=np.uint64))
    noise = uniform(seeds.ravel(), steps.ravel())
    assert len(np.unique(noise)) == 10_000
    table = noise.reshape(100, 100) - 0.5
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_request_alone_and_among_others(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    vocabulary = 3000
    logits = torch.randn(40, 16, vocabulary, generator=generator).to(dtype)
    kinds = [
        Sampling(temperature=1.0), Sampling(temperature=0.7, top_p=0.9), Sampling(),
        Sampling(temperature=1.2, top_k=50),
        Sampling(temperature=2.0, top_p=0.99, repetition_penalty=1.3), Sampling(temperature=1.0, min_p=0.05),
    ]  # fmt: skip
    crowd = Sampler(16, vocabulary, CPU)
    for row in range(16):
        crowd.set(row, kinds[row % len(kinds)], [row, 5], row)
    together = torch.stack([crowd(step, tuple(range(16))).ids for step in logits])
    for row in range(16):
        alone = Sampler(2, vocabulary, CPU)
        alone.set(1, kinds[row % len(kinds)], [row, 5], row)
        own = [int(alone(step[row : row + 1], (1,)).ids) for step in logits]
        assert own == together[:, row].tolist()


def test_nothing_of_the_last_request_stays_in_a_row() -> None:
    sampler, fresh = Sampler(1, VOCABULARY, CPU), Sampler(1, VOCABULARY, CPU)
    logits = torch.randn(10, 1, VOCABULARY, generator=torch.Generator().manual_seed(3))
    strict = Sampling(temperature=1.0, repetition_penalty=3.0, presence_penalty=2.0, logit_bias={3: 5.0}, logprobs=2)
    sampler.set(0, strict, list(range(40)), 1)
    for step in logits:
        sampler(step, (0,))
    for each in (sampler, fresh):
        each.set(0, Sampling(temperature=1.0, frequency_penalty=0.5), [1], 2)
    assert [int(sampler(step, (0,)).ids) for step in logits] == [int(fresh(step, (0,)).ids) for step in logits]
    sampler.set(0, Sampling(), [1], 2)
    assert torch.equal(sampler(logits[0], (0,)).ids, logits[0].argmax(-1))


def test_prompt_tokens_that_have_no_logit() -> None:
    sampler = Sampler(1, VOCABULARY, CPU)
    sampler.set(0, Sampling(repetition_penalty=2.0), [VOCABULARY + 7, 2], 0)
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 2], logits[0, 3] = 1.0, 0.9
    assert int(sampler(logits, (0,)).ids) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0; a whole number, 1 or more"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"temperature": -0.1}, "temperature=-0.1; a finite number from 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": 1e-9}, "temperature=1e-09; 0, and 0.0001 or more"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_p": 0.0}, "top_p=0.0; a finite number above 0 up to 1"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": 1.1}, "min_p=1.1; a finite number from 0 up to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"frequency_penalty": math.inf}, "frequency_penalty=inf; a finite number"),
        ({"presence_penalty": "1"}, "presence_penalty='1'"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"logprobs": 21}, "logprobs=21; a whole number, 0 to 20"),
        ({"logit_bias": [1]}, "logit_bias="),
        ({"logit_bias": {-1: 0.0}}, "token id in logit_bias=-1"),
        ({"logit_bias": {1: math.inf}}, r"logit_bias\[1\]=inf"),
        ({"stop": "word"}, "stop='word'; a tuple"),
        ({"stop": ("",)}, "stop has ''; strings"),
        ({"stop_token_ids": (1, "2")}, "stop_token_ids has '2'; token ids"),
        ({"ignore_eos": 1}, "ignore_eos=1"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)


KERNELS = pytest.mark.skipif(
    not hasattr(kernels, "draw") or torch.cuda.is_available(), reason="needs Triton's interpreter"
)


def logits_like(dtype: torch.dtype, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Rows of logits: any, equal ones that stay or go together, and some that are out."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(4, vocabulary, generator=generator)
    logits[1] = logits[1].round() * torch.where(torch.arange(vocabulary) % 2 == 0, 1.0, -1.0)  # 0 and -0
    logits[2, 3:7] = -torch.inf
    return logits.to(dtype)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "settings", [(0.7, 0, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.3, 5, 1.0, 0.02), (1.0, 40, 0.8, 0.3), (1.0, 1, 0.5, 0.0)]
)
def test_the_kernel_draws_what_torch_draws(settings: tuple[float, ...], dtype: torch.dtype) -> None:
    logits, lanes = logits_like(dtype), torch.tensor([3, 1, 2, 1, 0])
    noise = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    table = torch.tensor([settings] * 5, dtype=torch.float64)
    own = kernels.draw(logits, table.float(), noise, lanes)
    assert torch.equal(own, draw(logits, table, noise, torch.arange(5), lanes))


@KERNELS
def test_the_kernel_draws_from_the_whole_distribution() -> None:
    logits = torch.tensor([[0.3, -torch.inf, 2.0, -1.0, 1.0]] * 1)
    noise = torch.linspace(0, 1, 41, dtype=torch.float64)[:-1] + 1e-4
    noise[-1] = 1 - 2.0**-53
    table = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64).expand(40, -1)
    lanes = torch.zeros(40, dtype=torch.int64)
    own = kernels.draw(logits, table.float().contiguous(), noise, lanes)
    assert torch.equal(own, draw(logits, table, noise, None, lanes))


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_penalises_as_torch_does(dtype: torch.dtype) -> None:
    logits, lanes, rows = logits_like(dtype), torch.tensor([2, 0]), torch.tensor([1, 4])
    seen = torch.randint(0, 7, (5, VOCABULARY), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    table = torch.tensor([[1, 0, 1, 0, 1.7, 0.25, -0.5], [1, 0, 1, 0, 0.5, 0.0, 2.0]], dtype=torch.float64)
    own = kernels.penalise(logits, lanes, seen, rows, table.float())
    torch.testing.assert_close(own, penalise(logits[lanes].float(), seen[rows], table), rtol=1e-6, atol=1e-6)


@KERNELS
def test_the_kernel_adds_up_exponentials() -> None:
    logits, lanes = logits_like(torch.bfloat16), torch.tensor([2, 1])
    torch.testing.assert_close(kernels.log_sum(logits, lanes), logits[lanes].float().logsumexp(-1))
