"""How fast: decode and prefill beside what transformers does, on the same model in the same run."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedModel, StaticCache

from liquidfusion import KVCache, cache_keyword, uninstall
from liquidfusion.bench import machine

PARTS = ("decode", "compile", "generate", "bookkeeping", "batch", "prefill", "memory")


@dataclass
class Plan:
    """What to measure; lengths in tokens."""

    budget: int = 2048
    contexts: tuple[int, ...] = (32768, 131072)
    prefill: tuple[int, ...] = (32768,)
    batch: int = 64
    chunk: int = 4096
    steps: int = 100
    parts: tuple[str, ...] = PARTS
    static: bool = True
    """Also measure StaticCache with torch.compile, whose compilation takes minutes."""


@dataclass
class Results:
    """Figures by name, with what failed and why."""

    figures: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    report: Callable[[str], None] = print

    def add(self, name: str, value: float) -> None:
        """Keep a figure and show it."""
        self.figures[name] = value
        self.report(f"{name}: {shown(value)}")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Run a part; one that fails is recorded, and the rest goes on."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            self.failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
            self.report(f"{name} failed: {self.failures[name]}")
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def shown(value: float) -> str:
    """Write a count in full and a measurement with five digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def repeat(step: Callable[[int], Any], indices: range) -> None:
    """Call `step` with each index."""
    for i in indices:
        step(i)


class Bench:
    """One model on one device."""

    def __init__(self, model: PreTrainedModel, plan: Plan, results: Results) -> None:
        self.model, self.plan, self.results = model, plan, results
        self.device, self.config = model.device, model.config.get_text_config(decoder=True)
        self.key = cache_keyword(model)
        self.kv_heads = self.config.num_key_value_heads
        self.head_dim = getattr(self.config, "head_dim", None) or (
            self.config.hidden_size // self.config.num_attention_heads
        )

    def run(self) -> None:
        """Measure every part of the plan."""
        with torch.inference_mode():
            for part in self.plan.parts:
                getattr(self, part)()

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any], repeats: int = 1) -> float:
        """Median wall time of a piece of work."""
        times = []
        for _ in range(repeats):
            self.sync()
            began = time.perf_counter()
            work()
            self.sync()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def tokens(self, batch: int, count: int) -> Tensor:
        """Random token ids `[batch, count]`."""
        return torch.randint(1, self.config.vocab_size, (batch, count), device=self.device)

    def cache(self, batch: int, context: int, **options: Any) -> KVCache:
        """A bounded cache that has seen `context` tokens."""
        cache = KVCache(self.model, budget=self.plan.budget, **options)
        for start in range(0, context, self.plan.chunk):
            size = min(self.plan.chunk, context - start)
            self.model(self.tokens(batch, size), **{self.key: cache}, logits_to_keep=1)
        return cache

    def step_time(self, step: Callable[[Tensor, int], Any], batch: int, context: int) -> float:
        """Seconds per decode step, after warming up."""
        token, warm = self.tokens(batch, 1), 5
        for i in range(warm):
            step(token, context + i)

        def work() -> None:
            for i in range(self.plan.steps):
                step(token, context + warm + i)

        return self.seconds(work) / self.plan.steps

    def our_step(self, cache: KVCache) -> Callable[[Tensor, int], Any]:
        """A decode step with our cache."""

        def step(token: Tensor, position: int) -> Any:
            del position
            return self.model(token, **{self.key: cache}, logits_to_keep=1)

        return step

    def floor(self, batch: int) -> float:
        """Seconds that reading the weights and the slots takes at the measured copy rate."""
        rate = machine.copy_rate(self.device)
        # One row of the embedding is read, unless it is the output layer as well.
        embedding = 0 if self.config.tie_word_embeddings else self.config.vocab_size * self.config.hidden_size
        element = next(self.model.parameters()).element_size()
        weights = sum(p.nbytes for p in self.model.parameters()) - embedding * element
        slots = self.config.num_hidden_layers * batch * self.kv_heads * self.plan.budget
        self.results.add("copy rate, TB/s", rate / 1e12)
        return float((weights + slots * (2 * self.head_dim * element + 12)) / rate)

    def decode(self) -> None:
        """Step time at B = 1: ours after the shortest context, and what transformers offers at each."""
        self.results.add("floor B=1, ms", 1e3 * self.floor(1))
        with self.results.part("ours, graph"):
            prompt = max(2 * self.plan.budget, min(self.plan.contexts))
            cache = self.cache(1, prompt)
            self.results.add("ours, graph, ms", 1e3 * self.step_time(self.our_step(cache), 1, prompt))
            element = next(self.model.parameters()).element_size()
            slots = self.config.num_hidden_layers * self.kv_heads * self.plan.budget
            self.results.add("cache, bytes", cache.nbytes)
            self.results.add("cache by the formula, bytes", slots * (2 * self.head_dim * element + 12))
        for context in self.plan.contexts:
            with self.results.part(f"DynamicCache {context}"):
                dynamic = DynamicCache(config=self.config)
                self._fill(dynamic, 1, context)
                self.results.add(f"DynamicCache {context}, ms", 1e3 * self._hf_step(dynamic, 1, context, steps=20))
            if self.plan.static:
                with self.results.part(f"StaticCache+compile {context}"):
                    self.results.add(f"StaticCache+compile {context}, ms", 1e3 * self._static_step(1, context))

    def compile(self) -> None:
        """Step time at B = 1 with torch.compile between the kernels."""
        with self.results.part("ours, compile"):
            cache = self.cache(1, 2 * self.plan.budget, compile=True)
            began = time.perf_counter()
            step = self.our_step(cache)
            step(self.tokens(1, 1), 0)
            self.results.add("compilation, s", time.perf_counter() - began)
            self.results.add("ours, compile, ms", 1e3 * self.step_time(step, 1, 2 * self.plan.budget))

    def generate(self) -> None:
        """Tokens per second of `model.generate` against the rate of the step."""
        with self.results.part("generate"):
            prompt = self.tokens(1, self.plan.chunk)
            mask = torch.ones_like(prompt)
            cache = KVCache(self.model, budget=self.plan.budget)

            def run(count: int) -> None:
                cache.reset()
                self.model.generate(  # type: ignore[operator]
                    prompt, attention_mask=mask, **{self.key: cache}, max_new_tokens=count, do_sample=False
                )

            run(4)
            few, many = self.seconds(lambda: run(4)), self.seconds(lambda: run(4 + self.plan.steps))
            self.results.add("generate, ms per token", 1e3 * (many - few) / self.plan.steps)

    def bookkeeping(self) -> None:
        """What eviction costs: the same steps with it and without."""
        for batch in (1, self.plan.batch):
            for interval in (None, 1):
                with self.results.part(f"bookkeeping B={batch}, interval {interval}"):
                    self._eviction_cost(batch, interval)

    def _eviction_cost(self, batch: int, interval: int | None) -> None:
        on, off = (self.cache(batch, self.plan.budget + 64, eviction_interval=interval) for _ in range(2))
        off.evicting = False
        ratios = [
            self.step_time(self.our_step(on), batch, 0) / self.step_time(self.our_step(off), batch, 0) for _ in range(3)
        ]
        name = f"step with / without eviction, B={batch}, interval {on.spec.interval}"
        self.results.add(name, statistics.median(ratios))

    def batch(self) -> None:
        """Throughput: ours at the plan's batch and the largest that fits, transformers' at the longest context."""
        for name, options in (("graph", {}), ("compile", {"compile": True})):
            if name == "compile" and "compile" not in self.plan.parts:
                continue
            with self.results.part(f"B={self.plan.batch}, {name}"):
                self._throughput(self.plan.batch, name, **options)
        self.results.add(f"floor B={self.plan.batch}, ms", 1e3 * self.floor(self.plan.batch))
        if self.device.type != "cuda":
            return
        context = max(self.plan.contexts)
        element = next(self.model.parameters()).element_size()
        per_token = 2 * self.config.num_hidden_layers * self.kv_heads * self.head_dim * element
        free = torch.cuda.mem_get_info(self.device)[0]
        for name, make in (
            ("DynamicCache", lambda: DynamicCache(config=self.config)),
            ("StaticCache", lambda: StaticCache(config=self.config, max_cache_len=context + 64)),
        ):
            for count in range(max(1, int(0.95 * free / per_token / context)), 0, -1):
                figure = f"{name} B={count} at {context}, tokens/s"
                with self.results.part(figure):
                    self._their_throughput(figure, make(), count, context)
                if figure in self.results.figures:
                    break
        ours = int(0.8 * free / per_token / self.plan.budget) // 16 * 16
        with self.results.part(f"B={ours}, graph"):
            self._throughput(ours, "graph")

    def prefill(self) -> None:
        """Whole-model prefill with scores against transformers' sdpa and eager attention."""
        for length in self.plan.prefill:
            prompt = self.tokens(1, length)

            def ours(prompt: Tensor = prompt) -> None:
                self.model(prompt, **{self.key: KVCache(self.model, budget=self.plan.budget)}, logits_to_keep=1)

            def theirs(prompt: Tensor = prompt) -> None:
                cache = DynamicCache(config=self.config)
                self.model(prompt, **{self.key: cache}, logits_to_keep=1)

            def eager(theirs: Callable[[], None] = theirs) -> None:
                usual = self.config._attn_implementation
                self.model.set_attn_implementation(
                    "eager"
                )  # the whole matrix of probabilities: long prompts do not fit
                try:
                    theirs()
                finally:
                    self.model.set_attn_implementation(usual)

            for name, work in (("ours", ours), ("sdpa", theirs), ("eager", eager)):
                with self.results.part(f"prefill {length}, {name}"):
                    work()
                    self.results.add(f"prefill {length}, {name}, ms", 1e3 * self.seconds(work, 3))
            if self.device.type == "cuda":
                with self.results.part(f"prefill {length}, cuDNN"), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    theirs()
                    self.results.add(f"prefill {length}, cuDNN, ms", 1e3 * self.seconds(theirs, 3))

    def memory(self) -> None:
        """Peak memory of a long prompt in chunks, and of one chunk."""
        if self.device.type != "cuda":
            return
        context = max(self.plan.contexts)
        for length, chunk in ((context // 4, self.plan.chunk), (context, self.plan.chunk), (context, context)):
            with self.results.part(f"memory of {length} in chunks of {chunk}"):
                torch.cuda.reset_peak_memory_stats(self.device)
                cache = KVCache(self.model, budget=self.plan.budget)

                def work(length: int = length, chunk: int = chunk, cache: KVCache = cache) -> None:
                    for _ in range(0, length, chunk):
                        self.model(self.tokens(1, chunk), **{self.key: cache}, logits_to_keep=1)

                seconds = self.seconds(work)
                name = f"{length} tokens in chunks of {chunk}"
                self.results.add(f"{name}, peak GiB", torch.cuda.max_memory_allocated(self.device) / 2**30)
                self.results.add(f"{name}, s", seconds)

    def _throughput(self, batch: int, name: str, **options: Any) -> None:
        cache = KVCache(self.model, budget=self.plan.budget, **options)
        for _ in range(0, self.plan.budget + 64, 64):  # short chunks leave memory for more rows
            self.model(self.tokens(batch, 64), **{self.key: cache}, logits_to_keep=1)
        seconds = self.step_time(self.our_step(cache), batch, 0)
        self.results.add(f"B={batch}, {name}, tokens/s", batch / seconds)

    def _their_throughput(self, figure: str, cache: Any, batch: int, context: int) -> None:
        self._fill(cache, batch, context)
        self.results.add(figure, batch / self._hf_step(cache, batch, context, steps=10))

    def _fill(self, cache: Any, batch: int, context: int) -> None:
        shape = (batch, self.kv_heads, context, self.head_dim)
        dtype = next(self.model.parameters()).dtype
        for layer in range(self.config.num_hidden_layers):
            keys, values = (torch.randn(shape, dtype=dtype, device=self.device) for _ in range(2))
            cache.update(keys, values, layer)

    def _hf_step(self, cache: Any, batch: int, context: int, steps: int) -> float:
        token, warm = self.tokens(batch, 1), 3
        positions = torch.arange(context, context + steps + warm, device=self.device)[:, None]

        def step(i: int) -> None:
            self.model(token, position_ids=positions[i : i + 1], **{self.key: cache}, logits_to_keep=1)

        repeat(step, range(warm))
        return self.seconds(lambda: repeat(step, range(warm, warm + steps))) / steps

    def _static_step(self, batch: int, context: int) -> float:
        """StaticCache with the whole step compiled and graphed, as transformers recommends."""
        uninstall(self.model)
        cache = StaticCache(config=self.config, max_cache_len=context + 64)
        self._fill(cache, batch, context)
        torch.compiler.reset()
        compiled = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
        token, steps = self.tokens(batch, 1), 20
        position = torch.full((1, 1), context, device=self.device)

        def step(_: int) -> None:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            compiled(token, position_ids=position, **{self.key: cache}, logits_to_keep=1)
            position.add_(1)

        repeat(step, range(4))
        seconds = self.seconds(lambda: repeat(step, range(steps))) / steps
        torch.compiler.reset()
        return seconds
