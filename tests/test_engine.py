"""The engine: a request gives the same whatever runs beside it, rows are clean, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

import liquidfusion as lf
from alone import Alone
from liquidfusion.exceptions import CacheError, ConfigError, QueueFull
from liquidfusion.hf.engine import Engine
from liquidfusion.run.request import Request, Token
from liquidfusion.run.sampling import Sampling
from liquidfusion.run.stepper import SEED_STRIDE
from tiny import VOCABULARY, build

CHUNK = 12
STRATEGIES = [info["name"] for info in lf.strategies()]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Tiny Llama in float64: the rounding of larger products changes nothing."""
    return build("llama").double()


@pytest.fixture(params=[0, 1], ids=["at once", "one step of lag"])
def lag(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps that are launched before the tokens of one are read."""
    monkeypatch.setattr("liquidfusion.hf.engine.lag_on", lambda _: request.param)
    return request.param


def prompt_of(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()


def ids_of(request: Request) -> list[int]:
    return [token.id for token in request]


def kept(request: Request) -> list[Tensor]:
    assert request.state is not None
    tensors = request.state.tensors
    positions = [tensors[name] for name in sorted(tensors) if name.startswith("positions")]
    return [layer[0].sort(-1).values for group in positions for layer in group]


def mixed_sampling(dice: random.Random) -> Sampling:
    return Sampling(
        max_tokens=dice.randint(1, 25),
        temperature=dice.choice([0.0, 0.0, 0.7, 1.3]),
        top_k=dice.choice([0, 0, 10]),
        top_p=dice.choice([1.0, 0.9]),
        min_p=dice.choice([0.0, 0.05]),
        repetition_penalty=dice.choice([1.0, 1.0, 1.2]),
        frequency_penalty=dice.choice([0.0, 0.3]),
        presence_penalty=dice.choice([0.0, 0.3]),
        seed=dice.randint(-(2**63), 2**63 - 1),
        logit_bias=dice.choice([{}, {3: 2.0, 5: -100.0}]),
        stop_token_ids=dice.choice([(), (7, 8)]),
        logprobs=dice.choice([None, 2]),
    )


@pytest.mark.filterwarnings("ignore:bits=4 costs")  # random weights forgive little
@pytest.mark.parametrize(
    ("strategy", "bits"),
    [*((name, None) for name in STRATEGIES), *itertools.product(("liquid_fusion", "streaming"), (16, 4))],
)
def test_every_request_as_if_alone(model: PreTrainedModel, strategy: str, bits: int | None, lag: int) -> None:
    dice = random.Random(f"{strategy} {bits} {lag}")
    options: dict[str, Any] = {"strategy": strategy, "budget": 24, "bits": bits}
    work = []
    with Engine(model, rows=5, chunk=CHUNK, step_tokens=2 * CHUNK, prefixes=2, **options) as engine:
        shared = prompt_of(CHUNK + 5, 99)
        for number in range(25):
            prompt = prompt_of(dice.choice([1, 2, 5, CHUNK, CHUNK + 1, 40, 77]), number)
            if dice.random() < 0.3:
                prompt = shared + prompt
            sampling = mixed_sampling(dice)
            n = dice.choice([1, 1, 1, 3])
            requests = engine.submit(prompt, sampling, n=n, keep=True)
            work.append((prompt, sampling, requests))
            time.sleep(dice.choice([0.0, 0.0, 0.01]))
            if dice.random() < 0.2:
                dice.choice(dice.choice(work)[2]).cancel()
        for prompt, sampling, requests in work:
            for number, request in enumerate(requests):
                ids = ids_of(request)
                assert request.error is None
                seed = (sampling.seed or 0) + number * SEED_STRIDE
                own = Alone(model, CHUNK, sampling, seed, **options)
                expected = own.run(prompt, sampling.stop_token_ids)
                if request.finish_reason == "cancelled":
                    assert ids == expected[: len(ids)]
                    continue
                assert ids == expected
                ended = expected[-1] in sampling.stop_token_ids
                assert request.finish_reason == ("stop" if ended else "length")
                assert request.state is not None
                read = len(request.state.tokens)
                assert request.state.tokens == (*prompt, *expected)[:read]
                if read > own.read:
                    own._feed(expected[-1:])  # the step after the last token ran before it was known
                assert read == own.read
                for mine, theirs in zip(kept(request), own.kept(), strict=True):
                    if strategy == "full":
                        mine, theirs = (x[x >= 0].sort().values for x in (mine, theirs))
                    assert torch.equal(mine, theirs)
        assert engine.drain(60)
        stats = engine.stats()
        assert (stats.active, stats.waiting) == (0, 0)


def test_a_row_keeps_nothing_of_its_last_request(model: PreTrainedModel) -> None:
    prompt, sampling = prompt_of(30, 1), Sampling(max_tokens=20)
    with Engine(model, rows=1, budget=24, chunk=CHUNK) as engine:
        ids_of(engine.submit(prompt_of(50, 2), Sampling(max_tokens=30))[0])
        while engine.stats().active:
            time.sleep(0.001)
        for group in engine._own._groups.all:
            assert not group.ledger.host.attention()[0].any()
            assert (group.ledger.host.positions == -1).all()
            for layer in group.slots:
                for tensor in layer.tensors().values():
                    assert not tensor.any()
                    tensor.fill_(1e30)  # what is empty may hold anything
        first = ids_of(engine.submit(prompt, sampling)[0])
    assert first == Alone(model, CHUNK, sampling, 0, budget=24).run(prompt)


def test_conversations_go_on_where_they_were(model: PreTrainedModel, lag: int, tmp_path: Any) -> None:  # noqa: ARG001
    options: dict[str, Any] = {"strategy": "liquid_fusion", "budget": 24}
    sampling = Sampling(max_tokens=9, temperature=0.8, seed=5, stop_token_ids=(3, 4, 5))
    with Engine(model, rows=3, chunk=CHUNK, **options) as engine:
        own, prompt, state = Alone(model, CHUNK, sampling, 5, **options), prompt_of(31, 4), None
        for turn in range(4):
            (request,) = engine.submit(prompt, sampling, keep=True, resume=state)
            ids = ids_of(request)
            assert ids == own.run(prompt, sampling.stop_token_ids)
            assert request.cached_tokens == (0 if state is None else len(state.tokens))
            assert request.prompt_tokens == len(prompt)
            state = request.state
            assert state is not None
            if len(state.tokens) > own.read:
                own._feed(ids[-1:])
            prompt = prompt + ids + prompt_of(3 + 11 * turn, 50 + turn)
            path = tmp_path / "state"
            state.to_file(path)
            assert path.stat().st_mode & 0o777 == 0o600
            state = engine.load_state(path)
            # Any number of answers may go on from one state, in a crowd too.
            crowd = [engine.submit(prompt, sampling, resume=state)[0] for _ in range(5)]
            assert len({tuple(ids_of(request)) for request in crowd}) == 1
    with Engine(model, rows=1, chunk=CHUNK, strategy="liquid_fusion", budget=24) as other:
        # In a new engine, at once.
        assert ids_of(other.submit(prompt, sampling, resume=state)[0]) == own.run(prompt, sampling.stop_token_ids)
    with Engine(model, rows=1, chunk=CHUNK, strategy="h2o", budget=24) as other:
        with pytest.raises(CacheError, match="kept with strategy='liquid_fusion', here it is 'h2o'"):
            other.submit(prompt, sampling, resume=state)
        with pytest.raises(CacheError, match="kept with strategy"):
            other.load_state(path)


def test_a_shared_beginning_is_read_once(model: PreTrainedModel) -> None:
    shared, sampling = prompt_of(5 * CHUNK + 3, 1), Sampling(max_tokens=5)
    prompts = [shared + prompt_of(10, seed) for seed in range(2, 10)]
    for prefixes in (0, 1):
        with Engine(model, rows=8, budget=24, chunk=CHUNK, step_tokens=CHUNK, prefixes=prefixes) as engine:
            requests = [engine.submit(prompt, sampling)[0] for prompt in prompts]
            answers = [ids_of(request) for request in requests]
            stats = engine.stats()
        total = sum(map(len, prompts))
        assert stats.prompt_tokens + stats.cached_tokens == total
        assert (stats.cached_tokens >= 5 * 5 * CHUNK) == bool(prefixes)
        assert sum(request.cached_tokens for request in requests) == stats.cached_tokens
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer == Alone(model, CHUNK, sampling, 0, budget=24).run(prompt)


def test_answers_to_one_prompt_read_it_once(model: PreTrainedModel) -> None:
    prompt, sampling = prompt_of(40, 3), Sampling(max_tokens=12, temperature=1.0, seed=11)
    with Engine(model, rows=4, budget=24, chunk=CHUNK) as engine:
        answers = [ids_of(request) for request in engine.submit(prompt, sampling, n=4)]
        assert engine.stats().prompt_tokens == 40
        assert answers[0] == ids_of(engine.submit(prompt, sampling)[0])
    assert len(set(map(tuple, answers))) == 4


def test_one_token_that_is_left_is_a_decode_step(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, sampling = prompt_of(2 * CHUNK, 3), Sampling(max_tokens=6, temperature=1.0, seed=4)
    with Engine(model, rows=3, budget=24, chunk=CHUNK) as engine:
        (first,) = engine.submit(prompt, Sampling(max_tokens=1), keep=True)
        ids_of(first)
        monkeypatch.setattr(engine._own, "read", None)
        answers = [ids_of(request) for request in engine.submit([*prompt, 5], sampling, n=2, resume=first.state)]
        alone = ids_of(engine.submit([7], sampling)[0])
        assert engine.stats().prompt_tokens == 2 * CHUNK + 2
    for number, answer in enumerate(answers):
        own = Alone(model, CHUNK, sampling, 4 + number * SEED_STRIDE, budget=24)
        assert answer == own.run([*prompt, 5])
    assert alone == Alone(model, CHUNK, sampling, 4, budget=24).run([7])


def test_neighbours_read_equal_chunks_in_one_call(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, sampling = [prompt_of(length, length) for length in (29, 29, 29, 17)], Sampling(max_tokens=4)
    prompts[1] = prompts[1][::-1]
    with Engine(model, rows=4, budget=24, chunk=CHUNK, step_tokens=4 * CHUNK, prefixes=0) as engine:
        calls, call = [], engine._own._call

        def noted(rows: range, lengths: tuple[int, ...], ids: Tensor) -> Tensor:
            calls.append((rows, lengths))
            return call(rows, lengths, ids)

        monkeypatch.setattr(engine._own, "_call", noted)
        with engine._wake:  # it waits
            requests = [engine.submit(prompt, sampling)[0] for prompt in prompts]
        answers = [ids_of(request) for request in requests]
    assert [call for call in calls if max(call[1]) > 1] == [
        (range(4), (CHUNK,) * 4),
        (range(3), (CHUNK,) * 3),
        (range(3, 4), (5,)),
        (range(3), (5,) * 3),
    ]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == Alone(model, CHUNK, sampling, 0, budget=24).run(prompt)


def test_in_an_event_loop(model: PreTrainedModel) -> None:
    async def collect(request: Request) -> list[Token]:
        return [token async for token in request]

    async def main(engine: Engine) -> tuple[list[list[Token]], Request]:
        requests = [engine.submit(prompt_of(20 + i, i), Sampling(max_tokens=8, logprobs=1))[0] for i in range(6)]
        left = engine.submit(prompt_of(5, 1), Sampling(max_tokens=10**6))[0]
        tokens = await asyncio.gather(*map(collect, requests))
        task = asyncio.create_task(collect(left))
        await asyncio.sleep(0.05)
        left.cancel()
        await asyncio.wait_for(task, 5)
        return tokens, left

    with Engine(model, rows=4, budget=24, chunk=CHUNK) as engine:
        tokens, left = asyncio.run(main(engine))
        assert left.finish_reason == "cancelled"
        assert engine.drain(5)
    for i, own in enumerate(tokens):
        assert [token.id for token in own] == Alone(model, CHUNK, Sampling(max_tokens=8), 0, budget=24).run(
            prompt_of(20 + i, i)
        )
        for token in own:
            # Greedy: the token is the likeliest.
            assert token.top_logprobs == ((token.id, token.logprob),)


def test_end_tokens(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(20, 8)
    expected = Alone(model, CHUNK, Sampling(max_tokens=30), 0, budget=24).run(prompt)
    end = expected[4]
    first = expected.index(end) + 1
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
    with Engine(model, rows=2, budget=24, chunk=CHUNK) as engine:
        for sampling, length, reason in (
            (Sampling(max_tokens=30), first, "stop"),
            (Sampling(max_tokens=30, ignore_eos=True), 30, "length"),
            (Sampling(max_tokens=30, ignore_eos=True, stop_token_ids=(end,)), first, "stop"),
        ):
            (request,) = engine.submit(prompt, sampling)
            assert ids_of(request) == expected[:length]
            assert request.finish_reason == reason


class Words:
    """A tokenizer whose every token is a word."""

    eos_token_id = None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:  # noqa: ARG002
        return "".join(f"<{token}>" for token in token_ids)


def test_stop_strings(model: PreTrainedModel) -> None:
    prompt = prompt_of(20, 8)
    expected = Alone(model, CHUNK, Sampling(max_tokens=30), 0, budget=24).run(prompt)
    border = f"{expected[6]}><{expected[7]}"[1:]
    with Engine(model, rows=2, budget=24, chunk=CHUNK, tokenizer=Words()) as engine:
        (request,) = engine.submit(prompt, Sampling(max_tokens=30, stop=("nothing", border)))
        ids = ids_of(request)
        assert ids == expected[: len(ids)]
        assert len(ids) <= 8
        assert request.finish_reason == "stop"
    with Engine(model, rows=2, budget=24, chunk=CHUNK) as engine, pytest.raises(ConfigError, match="tokenizer"):
        engine.submit(prompt, Sampling(stop=("a",)))


def test_positions_of_the_model_are_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    short = build("llama")
    monkeypatch.setattr(short.config, "max_position_embeddings", 40)
    with Engine(short, rows=1, budget=24, chunk=CHUNK) as engine:
        assert engine.positions == 40
        (request,) = engine.submit(prompt_of(38, 1), Sampling(max_tokens=30))
        assert len(ids_of(request)) == 3
        assert request.finish_reason == "length"
        with pytest.raises(ConfigError, match="prompt of 41 tokens; the model has 40"):
            engine.submit(prompt_of(41, 1))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([],), {}, "prompt of 0 tokens"),
        (([1, VOCABULARY],), {}, f"token id {VOCABULARY}; 0 to {VOCABULARY - 1}"),
        (([1, -1],), {}, "token id -1"),
        (([1],), {"n": 3}, "n=3 answers; 1 to 2"),
        (([1], Sampling(logit_bias={VOCABULARY: 1.0})), {}, f"token id {VOCABULARY}"),
        (([1], {"max_tokens": 3}), {}, "sampling is a dict"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    model: PreTrainedModel, arguments: Any, options: dict[str, Any], message: str
) -> None:
    with Engine(model, rows=2, budget=24) as engine:
        with pytest.raises(ConfigError, match=message):
            engine.submit(*arguments, **options)
        assert engine.stats().steps == 0


def test_a_full_queue_says_so_and_drains(model: PreTrainedModel) -> None:
    with Engine(model, rows=1, budget=24, chunk=CHUNK, queue_limit=2) as engine:
        accepted, refused = [], 0
        for seed in range(30):
            try:
                accepted += engine.submit(prompt_of(30, seed), Sampling(max_tokens=20))
            except QueueFull:
                refused += 1
        assert refused
        assert engine.drain(60)
        assert all(len(ids_of(request)) == 20 for request in accepted)
        with pytest.raises(CacheError, match="takes no more requests"):
            engine.submit([1])


def test_closing_ends_everything(model: PreTrainedModel) -> None:
    engine = Engine(model, rows=1, budget=24, chunk=CHUNK)
    requests = [engine.submit(prompt_of(30, seed), Sampling(max_tokens=10**6))[0] for seed in range(4)]
    next(iter(requests[0]))
    assert not engine.drain(0.01)
    engine.close()
    for request in requests:
        ids_of(request)
        assert request.finish_reason == "cancelled"
    assert not engine.healthy
    engine.close()


def test_a_failing_step_fails_those_it_served_and_no_others(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, sampling = prompt_of(20, 1), Sampling(max_tokens=10)
    with Engine(model, rows=1, budget=24, chunk=CHUNK) as engine:
        cache = engine._own
        read, failures = cache.read, [RuntimeError("out of luck")]

        def failing(chunks: Any) -> Tensor:
            if failures:
                raise failures.pop()
            return read(chunks)

        monkeypatch.setattr(cache, "read", failing)
        requests = [engine.submit(prompt, sampling)[0] for _ in range(3)]
        answers = [ids_of(request) for request in requests]
        assert [request.finish_reason for request in requests] == ["error", "length", "length"]
        assert str(requests[0].error) == "out of luck"
        assert answers[1] == answers[2] == Alone(model, CHUNK, sampling, 0, budget=24).run(prompt)
        assert engine.healthy
        with engine._wake:  # it waits
            failures[:] = [RuntimeError("again"), RuntimeError("and again")]
            requests = [engine.submit(prompt, sampling)[0] for _ in range(3)]
        assert [ids_of(request) for request in requests] == [[], [], []]
        assert {request.finish_reason for request in requests} == {"error"}
        engine._thread.join(5)
        assert not engine.healthy
        with pytest.raises(CacheError, match="the engine has failed"):
            engine.submit(prompt)


def test_many_threads(model: PreTrainedModel) -> None:
    prompts = [prompt_of(5 + 3 * seed, seed) for seed in range(12)]
    answers: dict[int, list[int]] = {}
    with Engine(model, rows=3, budget=24, chunk=CHUNK) as engine:

        def ask(number: int) -> None:
            answers[number] = ids_of(engine.submit(prompts[number], Sampling(max_tokens=6))[0])

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for number, prompt in enumerate(prompts):
        assert answers[number] == Alone(model, CHUNK, Sampling(max_tokens=6), 0, budget=24).run(prompt)


def test_generate_batch_inside_use(model: PreTrainedModel) -> None:
    prompts = [prompt_of(5 + 9 * seed, seed) for seed in range(4)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None)
    with lf.use(model, "h2o", 24):
        outputs = model.generate_batch(prompts, config, progress_bar=False)
        for prompt, output in zip(prompts, outputs.values(), strict=True):
            expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
            assert output.generated_tokens == expected.tolist()
            assert (output.prompt_ids, output.is_finished(), output.error) == (prompt, True, None)
        assert model.generate_batch([]) == {}
        sampled = GenerationConfig(max_new_tokens=6, do_sample=True, num_return_sequences=2, eos_token_id=None)
        torch.manual_seed(1)
        first = model.generate_batch(prompts[:1], sampled, max_new_tokens=9)
        torch.manual_seed(1)
        again = model.generate_batch(prompts[:1], sampled, max_new_tokens=9)
        tokens = [output.generated_tokens for output in first.values()]
        assert list(map(len, tokens)) == [9, 9]
        assert tokens[0] != tokens[1]
        assert tokens == [output.generated_tokens for output in again.values()]
        with pytest.raises(ConfigError, match="num_beams=2"):
            model.generate_batch(prompts, GenerationConfig(num_beams=2))
    assert "liquidfusion" not in model.generate_batch.__module__


@pytest.mark.parametrize("method", ["read", "decode", "copy_row", "load_row", "release"])
def test_wherever_a_step_fails_everyone_hears_and_the_engine_goes_on(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    prompt, sampling = prompt_of(20, 1), Sampling(max_tokens=5)
    with Engine(model, rows=3, budget=24, chunk=CHUNK) as engine:
        (kept_one,) = engine.submit(prompt[:-1], Sampling(max_tokens=1), keep=True)
        ids_of(kept_one)
        cache, failures = engine._own, [RuntimeError("out of luck")]
        own = getattr(cache, method)

        def failing(*arguments: Any) -> Any:
            if failures:
                raise failures.pop()
            return own(*arguments)

        monkeypatch.setattr(cache, method, failing)
        with engine._wake:  # it waits
            requests = engine.submit(prompt, sampling, n=2)
            requests += engine.submit(prompt, sampling, resume=kept_one.state)
            requests += engine.submit(prompt, sampling)
        answers = [ids_of(request) for request in requests]
        assert not failures
        assert {request.finish_reason for request in requests[:3]} <= {"error", "length"}
        assert "error" in {request.finish_reason for request in requests}
        assert engine.healthy
        assert ids_of(engine.submit(prompt, sampling)[0]) == Alone(model, CHUNK, sampling, 0, budget=24).run(prompt)
        assert engine.drain(30)
    assert all(len(ids) <= 5 for ids in answers)
