"""What an engine adds to a static batch, and what its users wait for: one run on one GPU, the table last.

    python benches/engine.py --bits 4                          # Llama-3.1-8B shape, random weights, 256 rows, 60 s
    python benches/engine.py --bits 4 --only load turns        # some of it
    python benches/engine.py --tiny                            # small shapes, on a CPU too

`load` imitates a steady state: requests go on from contexts spread evenly over 1 k to 9 k tokens, which were read once
and are copied into a row, and get 512 new tokens each; the roofline beside it is that of an exact 16-bit engine for the
same requests, as `liquidfusion-bench speed` reckons it: all memory full of weights and contexts, both read once at the
card's bandwidth, prompts for nothing. `prompts` is the same load with every context read, as if nobody had been there
before: reading takes most of the time then, in any engine. Both wait for the engine to settle before they count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import liquidfusion as lf
from liquidfusion.bench.jobs import planning, shapes
from liquidfusion.run.sampling import Sampler, Sampling

PARTS = ("static", "sampling", "load", "prompts", "single", "beside", "turns", "transformers")


class Bench:
    """The model, and rows of the table as they come."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = shapes.build("custom" if args.tiny else args.shape, self.device, dtype)
        self.model.generation_config.eos_token_id = None
        self.vocabulary = self.model.config.vocab_size
        self.cache = {"budget": args.budget} | ({"bits": args.bits} if args.bits else {})
        self.contexts = [args.context + 8 * args.context * i // 7 for i in range(8)]  # 1 k to 9 k
        self.table: list[tuple[str, str]] = []
        self.results: dict[str, Any] = {}

    def say(self, name: str, value: Any, unit: str = "") -> None:
        self.results[name] = value
        shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
        self.table.append((name, f"{shown} {unit}".strip()))
        print(f"{name}: {shown} {unit}", flush=True)

    def prompt(self, length: int, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, self.vocabulary, (length,), generator=generator).tolist()

    def engine(self, rows: int, **options: Any) -> lf.Engine:
        return lf.Engine(self.model, rows=rows, prefixes=0, **self.cache, **options)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def static(self, rows: int) -> float:
        """Seconds of a decode step of a batch that begins and ends together."""
        cache = lf.KVCache(self.model, **self.cache)
        given = {lf.cache_keyword(self.model): cache}
        ids = torch.tensor([self.prompt(8, 0)] * rows, device=self.device)
        with torch.inference_mode():
            ids = self.model(ids, logits_to_keep=1, **given).logits[:, -1:].argmax(-1)
            for step in range(self.args.steps + 8):
                if step == 8:
                    self.wait()
                    start = time.perf_counter()
                ids = self.model(ids, **given).logits[:, -1:].argmax(-1)
            self.wait()
        return (time.perf_counter() - start) / self.args.steps

    def run_static(self) -> None:
        rows = self.args.rows
        batch, one = self.static(rows), self.static(1)
        self.say(f"static batch of {rows}, step", 1e3 * batch, "ms")
        self.say(f"static batch of {rows}", rows / batch, "tokens/s")
        self.say("static batch of 1, step", 1e3 * one, "ms")

    def run_sampling(self) -> None:
        """Milliseconds that drawing adds to a step of all rows."""
        rows = self.args.rows
        logits = torch.randn(rows, self.vocabulary, device=self.device).to(self.model.dtype)
        kinds = {
            "greedy": Sampling(),
            "temperature": Sampling(temperature=0.8),
            "temperature, top-p": Sampling(temperature=0.8, top_p=0.95),
            "temperature, top-k, top-p, min-p": Sampling(temperature=0.8, top_k=50, top_p=0.95, min_p=0.05),
            "repetition penalty": Sampling(repetition_penalty=1.1),
            "all penalties, temperature, top-p": Sampling(
                temperature=0.8, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.2
            ),
            "temperature, top-p, logprobs 5": Sampling(temperature=0.8, top_p=0.95, logprobs=5),
        }
        for name, sampling in kinds.items():
            sampler = Sampler(rows, self.vocabulary, self.device)
            for row in range(rows):
                sampler.set(row, sampling, [1, 2, 3], row)
            times = []
            for _ in range(12):
                self.wait()
                start = time.perf_counter()
                sampler(logits, tuple(range(rows)))
                self.wait()
                times.append(time.perf_counter() - start)
            self.say(f"sampling {rows} rows: {name}", 1e3 * statistics.median(times[2:]), "ms")

    def run_load(self) -> None:
        """Tokens a second of a steady state, and what each request waits for."""
        with self.engine(self.args.rows) as engine:
            states = []
            for i, length in enumerate(self.contexts):
                (request,) = engine.submit(self.prompt(length, i), Sampling(max_tokens=1), keep=True)
                for _ in request:
                    pass
                states.append(request.state)
            self.say("bytes of a row", engine.row_nbytes)

            def ask(number: int, turn: int, sampling: Sampling) -> Any:
                state = states[turn % len(states)]
                return engine.submit([*state.tokens, 1 + number], sampling, resume=state)[0]

            tokens = self.steady(engine, ask, "steady")
        if f"static batch of {self.args.rows}" in self.results:
            self.say("engine ÷ static batch", tokens / self.results[f"static batch of {self.args.rows}"])
        exact = self.roofline()
        self.say("roofline of an exact 16-bit engine", exact, "tokens/s")
        self.say("engine ÷ that roofline", tokens / exact)

    def run_prompts(self) -> None:
        """The same load, its contexts read."""
        prompts = [self.prompt(length, i) for i, length in enumerate(self.contexts)]
        with self.engine(self.args.rows) as engine:

            def ask(number: int, turn: int, sampling: Sampling) -> Any:
                return engine.submit([*prompts[turn % len(prompts)][1:], 1 + number], sampling)[0]

            self.steady(engine, ask, "prompts read")

    def steady(self, engine: lf.Engine, ask: Callable[[int, int, Sampling], Any], name: str) -> float:
        """Tokens a second with as many clients as rows, each with a request at a time."""
        args, rows = self.args, self.args.rows
        firsts: list[float] = []
        gaps: list[float] = []
        end = time.perf_counter() + args.seconds
        start = end - args.seconds * 5 / 6

        async def client(number: int) -> None:
            turn = number
            left = 1 + args.new * (number + 1) // rows  # in the beginning, phases spread evenly
            while time.perf_counter() < end:
                asked = last = time.perf_counter()
                request = ask(number, turn, Sampling(max_tokens=left, temperature=0.8, top_p=0.95))
                turn, left = turn + 1, args.new
                async for _ in request:
                    now = time.perf_counter()
                    if start < now < end and asked > start:
                        (firsts if last == asked else gaps).append(now - last)
                    last = now
                    if now > end:
                        request.cancel()

        async def load() -> tuple[float, float]:
            clients = [asyncio.create_task(client(number)) for number in range(rows)]
            await asyncio.sleep(max(0.0, start - time.perf_counter()))
            before, since = engine.stats(), time.perf_counter()
            await asyncio.sleep(max(0.0, end - time.perf_counter()))
            after, seconds = engine.stats(), time.perf_counter() - since
            await asyncio.gather(*clients)
            steps = max(1, after.steps - before.steps)
            return (after.tokens - before.tokens) / seconds, 1e3 * seconds / steps

        tokens, step = asyncio.run(load())
        self.say(f"engine of {rows} rows, {name}", tokens, "tokens/s")
        self.say(f"{name}, a step", step, "ms")
        self.quantiles(f"{name}, time to first token", firsts)
        self.quantiles(f"{name}, between tokens", gaps)
        return tokens

    def roofline(self) -> float:
        contexts = [context + self.args.new // 2 for context in self.contexts]
        return planning.roofline(self.model, contexts, planning.at_best(self.device), self.args.rows)[1]

    def quantiles(self, name: str, seconds: list[float]) -> None:
        ordered = sorted(seconds) or [float("nan")]
        for share in (0.5, 0.99):
            self.say(f"{name}, p{100 * share:.0f}", 1e3 * ordered[int(share * (len(ordered) - 1))], "ms")

    def run_single(self) -> None:
        """One active row of all."""
        with self.engine(self.args.rows) as engine:
            gaps = list(self.gaps(engine, self.args.steps * 2))
        self.say(f"one active row of {self.args.rows}, between tokens", 1e3 * statistics.median(gaps), "ms")
        if "static batch of 1, step" in self.results:
            ratio = 1e3 * statistics.median(gaps) / self.results["static batch of 1, step"]
            self.say("that ÷ static batch of 1", ratio)

    def gaps(self, engine: lf.Engine, tokens: int, seed: int = 1) -> Iterator[float]:
        (request,) = engine.submit(self.prompt(32, seed), Sampling(max_tokens=tokens))
        last = None
        for _ in request:
            now = time.perf_counter()
            if last is not None:
                yield now - last
            last = now

    def run_beside(self) -> None:
        """What others wait for while a long prompt is read."""
        long = self.prompt(32 * self.args.context, 9)
        for others in sorted({min(8, self.args.rows - 1), self.args.rows - 1}):
            gaps: list[tuple[float, float]] = []

            async def client(request: Any, gaps: list[tuple[float, float]] = gaps) -> None:
                last = None
                async for _ in request:
                    now = time.perf_counter()
                    if last is not None:
                        gaps.append((now, now - last))
                    last = now

            async def read(others: int = others, gaps: list[tuple[float, float]] = gaps) -> tuple[float, float]:
                forever = Sampling(max_tokens=100_000)
                requests = [engine.submit(self.prompt(32, seed), forever)[0] for seed in range(others)]
                clients = [asyncio.create_task(client(request)) for request in requests]
                while len(gaps) < 40 * others:
                    await asyncio.sleep(0.05)
                start = time.perf_counter()
                async for _ in engine.submit(long, Sampling(max_tokens=1))[0]:
                    pass
                end = time.perf_counter()
                for request in requests:
                    request.cancel()
                await asyncio.gather(*clients)
                return start, end

            with self.engine(self.args.rows) as engine:
                start, end = asyncio.run(read())
            quiet = statistics.median(gap for when, gap in gaps if when < start)
            during = [gap for when, gap in gaps if start < when < end]
            self.say(f"{others} rows, between tokens", 1e3 * quiet, "ms")
            self.say(f"{others} rows, while {len(long)} tokens are read", 1e3 * statistics.median(during), "ms")
            self.say(f"{others} rows, that ÷ before", statistics.median(during) / quiet)
            self.say(f"{others} rows, longest", 1e3 * max(during), "ms")
            self.say(f"{others} rows, the long prompt's first token", end - start, "s")

    def run_turns(self) -> None:
        """The next turn of a kept conversation against reading it again."""

        def first(ask: Callable[[], lf.Engine]) -> float:
            start = time.perf_counter()
            next(iter(ask()))
            return time.perf_counter() - start

        with self.engine(min(self.args.rows, 8)) as engine:
            for length in (4 * self.args.context, 32 * self.args.context):
                (request,) = engine.submit(self.prompt(length, 5), Sampling(max_tokens=1), keep=True)
                for _ in request:
                    pass
                state = request.state
                prompt = [*state.tokens, *self.prompt(50, 6)]
                one = Sampling(max_tokens=1)
                goes_on = [first(lambda: engine.submit(prompt, one, resume=state)[0]) for _ in range(5)]  # noqa: B023
                again = [first(lambda: engine.submit(prompt, one)[0]) for _ in range(2)]  # noqa: B023
                self.say(f"next turn at {length}, first token", 1e3 * statistics.median(goes_on), "ms")
                self.say(f"reading {length} again, first token", 1e3 * min(again), "ms")
                self.say(f"that share at {length}", statistics.median(goes_on) / min(again))

    def run_transformers(self) -> None:
        """`generate_batch` of transformers on a part of the requests, prompts included."""
        requests = [self.prompt(self.contexts[i % 8], i) for i in range(min(16, self.args.rows))]
        start = time.perf_counter()
        config = self.model.generation_config
        config.max_new_tokens, config.do_sample = self.args.new, False
        outputs = self.model.generate_batch(requests, config)
        seconds = time.perf_counter() - start
        tokens = sum(len(output.generated_tokens) for output in outputs.values())
        self.say("transformers' attention", self.model.config._attn_implementation)
        self.say(f"transformers' generate_batch of {len(requests)}", tokens / seconds, "tokens/s")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--new", type=int, default=512, help="tokens of an answer")
    parser.add_argument("--context", type=int, default=1024, help="the shortest context; the longest has nine times it")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=None)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    args = parser.parse_args(argv)
    if args.tiny:
        args.rows, args.budget, args.seconds, args.new, args.context, args.steps = 4, 64, 4.0, 16, 32, 8
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    bench = Bench(args)
    bench.say("device", torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu")
    for part in PARTS:
        if part in (args.only or PARTS):
            getattr(bench, f"run_{part}")()
    width = max(len(name) for name, _ in bench.table)
    print()
    for name, value in bench.table:
        print(f"{name:<{width}}  {value}")
    if args.json is not None:
        args.json.write_text(json.dumps(bench.results, indent=1))


if __name__ == "__main__":
    main()
